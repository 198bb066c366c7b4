"""Training a pack: runs over one frozen base, each with its own adapter, data, defense, schedule and seed.

The loss of a run's optimizer step is the sum of its next-token losses over the step's predicted tokens, divided by
their number over ALL micro-batches of the step, so that it does not depend on how the step is cut.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from trainables.base_model import LoadedBase
from trainables.chat_data import Encoded
from trainables.checkpoint import NO_CHECKPOINTS, CheckpointSettings, resume, save_checkpoint
from trainables.deepspeed_driver import DeepSpeedDriver, RunParameters, ZeroStage
from trainables.errors import ConfigError, Fault, ShiftgradError, TrainingError
from trainables.failpoints import failpoint
from trainables.lora import CounterDropout, adapter_parameters, add_adapter, save_adapter
from trainables.model_parts import decoder_layers
from trainables.native_ops import native_ops
from trainables.packed_lora import can_be_packed
from trainables.rows import RunSink, SignalRow, TrainingRow
from trainables.runs import Run, RunResult, RunSpec
from trainables.start_from import begin_with
from trainables.step import StepLosses, backward_passes
from trainables.workers import Workers

__all__ = ["Packing", "RunResult", "RunSpec", "train_pack"]

Packing: TypeAlias = Literal["exact", "fast"]


def train_pack(
    base: LoadedBase,
    specs: Sequence[RunSpec],
    sinks: Mapping[str, RunSink],
    *,
    zero_stage: ZeroStage = 0,
    gradient_checkpointing: bool = False,
    checkpoints: CheckpointSettings = NO_CHECKPOINTS,
    packing: Packing = "exact",
    on_done: Callable[[RunResult], None] | None = None,
    on_failure: Callable[[str, ShiftgradError], None] | None = None,
) -> tuple[Any, list[RunResult]]:
    """Train every run of ``specs`` and give each adapter to its sink (``sinks`` by train_id) as soon as it is done.

    ``exact``: every micro-batch is one run's own, which gives each run to the bit what it gets alone. ``fast``: the
    micro-batches of all runs go through the base in one pass; gradients are equal up to rounding.
    ``on_done`` is told of a run that has ended and whose adapter its sink has, while others go on. ``on_failure`` is
    told of a run that cannot go on (DataError: a row whose response mask cannot be proved; TrainingError: a loss or a
    gradient that is not finite, a gradient that is zero): it is left as it is, and the others go on as if it were not
    there. Without ``on_failure`` the error is raised.

    A run whose sink has a checkpoint goes on from there, whatever the pack and the ZeRO stage that it was made in.
    Where a launcher has made a process group of several workers, each calls this with the same one run, with a sink of
    its own, and does its share of every step; all have the same losses and make the same adapter. At ZeRO stage 3 every
    worker keeps a part of the base too, and ``base`` is of no use afterwards.
    Returns the model with all adapters (frozen, evaluation mode, the last one active) and a result per run that did not
    fail. Raises ConfigError for several runs over a float16 base, and ValueError for runs of which some are of second
    order and some are not (these need other operations), for several runs and several workers, for ZeRO stage 3 with
    one worker and for a run of second order at stage 3.
    """
    from trainables.lora_linear import use_lora_linear  # brings PEFT, which is slow to import

    workers = Workers.here()
    _check_pack(base, specs, workers, zero_stage)
    if zero_stage == 3:  # a weight has its values only while its own module computes
        base = dataclasses.replace(base, plain_head=False)

    def failed(name: str, error: ShiftgradError) -> None:
        if on_failure is None:
            raise error
        sinks[name].log(f"failed: {type(error).__name__}: {error}")
        on_failure(name, error)

    runs: list[Run] = []
    for spec in specs:
        try:
            runs.append(Run.prepared(base, spec))
        except ShiftgradError as error:
            failed(spec.train_id, error)
    if not runs:
        return base.fresh(), []
    model: Any = base.fresh()
    for run in runs:
        model = add_adapter(model, run.name, run.spec.training.lora, run.spec.seed)
        if run.spec.adapter is not None:
            begin_with(model, run.name, run.spec.adapter)
    plain = runs[0].is_second_order  # then only PyTorch's own operations will do
    if plain:
        model.get_base_model().set_attn_implementation("eager")
    own_ops = not plain and zero_stage < 3
    num_lora = use_lora_linear(model) if own_ops else 0
    model.to(base.device)
    _set_training_mode(model, gradient_checkpointing)
    if gradient_checkpointing:
        model.enable_input_require_grads()
        model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = {run.name: list(adapter_parameters(model, run.name).values()) for run in runs}
    _activate(model, runs[0].name, parameters)
    together = packing == "fast" and len(runs) > 1 and not plain and can_be_packed(model)
    driver = DeepSpeedDriver(
        model,
        [RunParameters(run.name, parameters[run.name], run.spec.training.weight_decay) for run in runs],
        zero_stage,
    )
    pack = _Pack(base, model, driver, runs, parameters, sinks, together, failed, workers)
    results: dict[str, RunResult] = {}
    try:
        for run in runs:
            run.done, run.signals = resume(run.name, run.num_steps, driver, sinks[run.name])
        workers.must_agree([float(run.step) for run in runs], "the steps that are done")
        with native_ops(model) if own_ops else contextlib.nullcontext("nothing else") as native:
            for run in runs:
                sinks[run.name].log(f"computed by shiftgrad: {num_lora} LoRA modules, {native}{pack.said()}")
            while True:
                for run in runs:
                    if run.ended and run.failure is None and run.name not in results:
                        results[run.name] = pack.finish(run)
                        if on_done is not None:
                            on_done(results[run.name])
                active = [run for run in runs if not run.ended]
                if not active:
                    break
                pack.step(active)
                stepped = [run for run in active if run.failure is None]
                _save_checkpoints(driver, stepped, runs, sinks, checkpoints, workers)
                failpoint(f"after_step:{max(run.step for run in active)}")
    finally:
        driver.close()
    if model.active_adapters != [runs[-1].name]:
        model.set_adapter(runs[-1].name)
    model.eval()
    model.requires_grad_(False)
    return model, [results[run.name] for run in runs if run.name in results]


def _check_pack(base: LoadedBase, specs: Sequence[RunSpec], workers: Workers, zero_stage: ZeroStage) -> None:
    if len(specs) > 1 and base.model.dtype == torch.float16:
        message = "runs over a float16 base cannot share a pack: one scale of the loss would hold for all of them, and "
        message += "what overflows in one run would keep the others from stepping; give bfloat16 or float32"
        raise ConfigError([Fault("execution.pack", message)])
    orders = {any(item.is_second_order for item in spec.defense) for spec in specs}
    if len(orders) > 1:
        raise ValueError("runs with a penalty of second order and runs without cannot share a pack")
    if workers.size > 1 and len(specs) > 1:
        raise ValueError("several workers train one run; a pack is trained by one")
    if zero_stage == 3 and (workers.size == 1 or True in orders):
        raise ValueError("ZeRO stage 3 is for several workers, and for runs without a penalty of second order")


def _set_training_mode(model: Any, gradient_checkpointing: bool) -> None:
    """Training mode for adapter dropout alone: a base's own dropout would draw from the global generator."""
    model.eval()
    for module in model.modules():
        if isinstance(module, CounterDropout):
            module.train()
    if gradient_checkpointing:
        for block in decoder_layers(model):
            block.training = True  # of the block itself, not of what is in it: without it nothing is checkpointed


def _activate(model: Any, name: str, parameters: Mapping[str, Sequence[torch.nn.Parameter]]) -> None:
    """Make one adapter the active one. PEFT freezes the others by that, which DeepSpeed must not see."""
    if model.active_adapters != [name]:
        model.set_adapter(name)
    for group in parameters.values():
        for parameter in group:
            parameter.requires_grad_(True)


class _Pack:
    """The runs of a pack while they train. ``together``: in passes that they share."""

    def __init__(
        self,
        base: LoadedBase,
        model: Any,
        driver: DeepSpeedDriver,
        runs: Sequence[Run],
        parameters: Mapping[str, Sequence[torch.nn.Parameter]],
        sinks: Mapping[str, RunSink],
        together: bool,
        failed: Callable[[str, ShiftgradError], None],
        workers: Workers,
    ) -> None:
        self.base, self.model, self.driver = base, model, driver
        self.runs, self.parameters, self.sinks = runs, parameters, sinks
        self.together, self.failed, self.workers = together, failed, workers

    def said(self) -> str:
        """What the log says of the pack; nothing of a run that is alone."""
        if len(self.runs) == 1:
            return ""
        return f"; in a pack of {len(self.runs)} runs, {'fast' if self.together else 'exact'}"

    def step(self, active: Sequence[Run]) -> None:
        """One optimizer step of every active run. Those that cannot go on have a ``failure`` afterwards."""
        started = time.perf_counter()
        batches: dict[str, list[Encoded]] = {}
        for run in active:
            try:
                batches[run.name] = run.next_batch()
            except ShiftgradError as error:
                self._fail(run, error)
        losses, seconds = self._passes([run for run in active if run.failure is None], batches)
        self.driver.finish_accumulation()
        shared_from = time.perf_counter()
        norms: dict[str, float] = {}
        for run in active:
            if run.name in losses and losses[run.name].failure is None:
                try:
                    norms[run.name] = _checked_norm(run, losses[run.name].loss, self.driver)
                except TrainingError as error:
                    losses[run.name].failure = error
        for run in active:
            failure = losses[run.name].failure if run.name in losses else None
            if failure is not None:
                self._fail(run, failure)
        stepping = [run for run in active if run.failure is None]
        if not stepping:
            return
        for run in active:
            if run.failure is not None:
                self.driver.discard(run.name)
        for run in stepping:
            if run.spec.training.max_gradient_norm is not None:
                self.driver.clip(run.name, norms[run.name], run.spec.training.max_gradient_norm)
        rates = {run.name: 0.0 if run.ended else run.learning_rate() for run in self.runs}
        self.driver.step(rates)
        counts = {run.name: _counts(batches[run.name]) for run in stepping}
        if self.together:  # one pass for all: each has the share of its tokens
            all_tokens = sum(num_tokens for num_tokens, _ in counts.values())
            whole = time.perf_counter() - started
            seconds = {name: whole * num_tokens / all_tokens for name, (num_tokens, _) in counts.items()}
        else:
            shared = (time.perf_counter() - shared_from) / len(stepping)
            seconds = {run.name: seconds[run.name] + shared for run in stepping}
        for run in stepping:
            name = run.name
            _record(run, losses[name], norms[name], rates[name], counts[name], seconds[name], self.sinks[name])

    def _passes(
        self, runs: Sequence[Run], batches: Mapping[str, Sequence[Encoded]]
    ) -> tuple[dict[str, StepLosses], dict[str, float]]:
        """The losses of every run's step, whose gradients the driver has then; seconds where each run has its own."""
        base, model, driver = self.base, self.model, self.driver
        if self.together and len(runs) > 1:
            steps = [(run.this_step(), batches[run.name]) for run in runs]
            return backward_passes(base, model, driver, steps, last=True), {}  # never by several workers
        losses: dict[str, StepLosses] = {}
        seconds: dict[str, float] = {}
        for run in runs:
            started = time.perf_counter()
            _activate(model, run.name, self.parameters)
            one = [(run.this_step(), batches[run.name])]
            losses |= backward_passes(base, model, driver, one, last=run is runs[-1], workers=self.workers)
            seconds[run.name] = time.perf_counter() - started
        return losses, seconds

    def _fail(self, run: Run, error: ShiftgradError) -> None:
        run.failure = error
        self.failed(run.name, error)

    def finish(self, run: Run) -> RunResult:
        """Give the adapter of a run that has ended to its sink."""
        sink = self.sinks[run.name]
        if run.stopped_early:
            sink.log(f"stopped early after step {run.step} of {run.num_steps}: the loss has diverged")
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "adapter"
            with self.driver.gathered(run.name):
                save_adapter(self.model, run.name, run.spec.base_name, folder)
            sink.adapter(run.name, folder)
        return run.result()


def _checked_norm(run: Run, loss: float, driver: DeepSpeedDriver) -> float:
    norm = driver.gradient_norm(run.name)
    if norm == 0 or not math.isfinite(norm):
        raise TrainingError(
            f"run {run.name}, step {run.step + 1}: the gradient norm is {norm} (loss {loss:.4f}); "
            + ("no gradient reaches the adapter" if norm == 0 else "the training diverged, try a lower learning rate")
        )
    return norm


def _counts(batch: Sequence[Encoded]) -> tuple[int, int]:
    """Tokens of the rows, and those under the loss."""
    return sum(len(row.input_ids) for row in batch), sum(sum(row.loss_mask[1:]) for row in batch)


def _save_checkpoints(
    driver: DeepSpeedDriver,
    stepped: Sequence[Run],
    runs: Sequence[Run],
    sinks: Mapping[str, RunSink],
    settings: CheckpointSettings,
    workers: Workers,
) -> None:
    """Checkpoint those of the runs just stepped that are due, and any that has ended while others go on."""
    others_go_on = not all(run.ended for run in runs)
    for run in stepped:
        due = workers.any(settings.due(run.step, time.monotonic() - run.saved_at))
        if due or (settings.enabled and run.ended and others_go_on):
            save_checkpoint(run.name, run.done, driver, sinks[run.name], run.signals)
            run.saved_at = time.monotonic()


def _record(
    run: Run,
    losses: StepLosses,
    norm: float,
    learning_rate: float,
    counts: tuple[int, int],
    seconds: float,
    sink: RunSink,
) -> None:
    num_tokens, num_loss_tokens = counts
    row = TrainingRow(
        train_id=run.name,
        step=run.step + 1,
        epoch=(run.step + 1) / run.steps_per_epoch,
        loss=losses.loss,
        gradient_norm=norm,
        learning_rate=learning_rate,
        num_tokens=num_tokens,
        num_loss_tokens=num_loss_tokens,
        seconds=seconds,
    )
    signals = run.watch.rows(run.name, row.step) if run.watch is not None else []
    signals += [
        SignalRow(train_id=run.name, step=row.step, signal="penalty", name=name, layer=None, value=value)
        for name, value in losses.penalties.items()
    ]
    run.done.append(row)
    run.signals += signals
    sink.training(row)
    for signal in signals:
        sink.signal(signal)
    penalty = f" penalty {sum(losses.penalties.values()):.4f}" if losses.penalties else ""
    sink.log(
        f"step {run.step}/{run.num_steps} loss {losses.loss:.4f}{penalty} gradient norm {norm:.3f} "
        f"lr {learning_rate:.2e} {num_tokens} tokens {seconds:.1f} s"
    )
    sink.progress(
        phase="train",
        done=run.step,
        total=run.num_steps,
        loss=losses.loss,
        tokens_per_s=num_tokens / max(seconds, 1e-9),
    )
