"""Training a pack: runs over one frozen base, each with its own adapter, data, defense, schedule and seed.

The loss of a run's optimizer step is the sum of its next-token losses over the step's predicted tokens, divided by
their number over ALL micro-batches of the step, so that it does not depend on how the step is cut.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainables.base_model import LoadedBase
from trainables.chat_data import ChatEncoder, DataConfig, Encoded, encode_all
from trainables.checkpoint import NO_CHECKPOINTS, CheckpointSettings, resume, save_checkpoint
from trainables.deepspeed_driver import DeepSpeedDriver, RunParameters, ZeroStage
from trainables.defenses import DefenseConfig, Message, SampleKey
from trainables.errors import DataError, TrainingError
from trainables.failpoints import failpoint
from trainables.lora import CounterDropout, adapter_parameters, add_adapter, save_adapter
from trainables.model_parts import decoder_layers
from trainables.native_ops import native_ops
from trainables.randomness import permutation
from trainables.rows import RunSink, SignalRow, TrainingRow
from trainables.schedule import learning_rate_factor, num_warmup_steps
from trainables.signals import Watch
from trainables.start_from import begin_with
from trainables.step import StepLosses, StepOf, backward_passes
from trainables.training_config import TrainingConfig, has_diverged, num_optimizer_steps


@dataclass(frozen=True)
class RunSpec:
    """Everything that one run is, with nothing left to look up."""

    train_id: str
    rows: Sequence[Sequence[Message]]
    data: DataConfig
    defense: Sequence[DefenseConfig]
    vectors: Mapping[str, torch.Tensor]  # by the name that the defense's items and ``training.watch`` use
    training: TrainingConfig
    seed: int
    base_name: str = ""
    adapter: Mapping[str, torch.Tensor] | None = None  # saved values to go on with; None: A drawn by the seed, B zero


@dataclass(frozen=True)
class RunResult:
    """What a finished training says of itself."""

    train_id: str
    num_steps: int
    num_tokens: int
    num_loss_tokens: int
    num_rows: int
    seconds_training: float
    train_loss_last_epoch: float
    losses: tuple[float, ...]
    stopped_early: bool
    chat_format: Mapping[str, object]


@dataclass
class _Run:
    """One run while it trains."""

    spec: RunSpec
    encoder: ChatEncoder
    kept: list[int]
    num_steps: int
    steps_per_epoch: int
    done: list[TrainingRow] = field(default_factory=list)  # a row per optimizer step so far
    signals: list[SignalRow] = field(default_factory=list)  # of these steps
    order: tuple[int, list[int]] = (-1, [])

    def __post_init__(self) -> None:
        self.mechanisms = [item.mechanism(self.spec.vectors) for item in self.spec.defense]
        self.saved_at = time.monotonic()  # the last checkpoint; at first the start
        watch = self.spec.training.watch
        named = {name: self.spec.vectors[name] for name in watch.vectors} if watch is not None else {}
        self.watch = Watch(named, watch.layers) if watch is not None else None

    @property
    def name(self) -> str:
        return self.spec.train_id

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return len(self.done)

    @property
    def stopped_early(self) -> bool:
        return self.step < self.num_steps and has_diverged([row.loss for row in self.done], self.spec.training)

    @property
    def ended(self) -> bool:
        return self.step >= self.num_steps or self.stopped_early

    @property
    def is_second_order(self) -> bool:
        return any(mechanism.is_second_order for mechanism in self.mechanisms)

    def this_step(self) -> StepOf:
        """What the passes of the next step need to know."""
        spec = self.spec
        return StepOf(self.name, self.step + 1, self.num_steps, spec.seed, spec.training, self.mechanisms, self.watch)

    def learning_rate(self) -> float:
        training = self.spec.training
        warmup = training.warmup_steps or num_warmup_steps(training.warmup_ratio, self.num_steps)
        factor = learning_rate_factor(training.schedule, self.step, self.num_steps, warmup)
        return training.learning_rate * factor

    def next_batch(self) -> list[Encoded]:
        """The rows of the next optimizer step, as this run's defense wants them, proved as tokens."""
        training = self.spec.training
        epoch, position = divmod(self.step, self.steps_per_epoch)
        if self.order[0] != epoch:
            self.order = (epoch, permutation(len(self.kept), self.spec.seed, epoch))
        start = position * training.batch_size
        batch = []
        for index in self.order[1][start : start + training.batch_size]:
            row = self.kept[index]
            messages = self.spec.rows[row]
            for mechanism in self.mechanisms:
                messages = mechanism.rewrite(messages, SampleKey(self.spec.seed, epoch, row))
            encoded = self.encoder.encode(messages, prove=True)
            if not any(encoded.response_mask) and not self.spec.data.allow_truncated_away:
                raise DataError(
                    f"run {self.name}, step {self.step + 1}: row {row + 1} has its whole response beyond "
                    f"max_length={self.encoder.max_length} tokens once its defense has rewritten it; raise max_length, "
                    "or set allow_truncated_away"
                )
            batch.append(encoded)
        return batch

    def result(self) -> RunResult:
        last = self.done[max(0, self.step - self.steps_per_epoch) :]
        weighted = sum(row.loss * row.num_loss_tokens for row in last)
        return RunResult(
            train_id=self.name,
            num_steps=self.step,
            num_tokens=sum(row.num_tokens for row in self.done),
            num_loss_tokens=sum(row.num_loss_tokens for row in self.done),
            num_rows=len(self.kept),
            seconds_training=sum(row.seconds for row in self.done),
            train_loss_last_epoch=weighted / sum(row.num_loss_tokens for row in last),
            losses=tuple(row.loss for row in self.done),
            stopped_early=self.stopped_early,
            chat_format=self.encoder.describe(),
        )


def train_pack(
    base: LoadedBase,
    specs: Sequence[RunSpec],
    sinks: Mapping[str, RunSink],
    *,
    zero_stage: ZeroStage = 0,
    gradient_checkpointing: bool = False,
    checkpoints: CheckpointSettings = NO_CHECKPOINTS,
) -> tuple[Any, list[RunResult]]:
    """Train every run of ``specs`` and give each adapter to its sink (``sinks`` by train_id).

    A run whose sink has a checkpoint goes on from there, whatever the pack and the ZeRO stage that it was made in.
    Returns the model with all adapters (frozen, evaluation mode, the last one active) and a result per run. Raises
    DataError if a row's response mask cannot be proved and TrainingError if a loss or gradient is not finite or a
    gradient is zero.
    """
    from trainables.lora_linear import use_lora_linear  # brings PEFT, which is slow to import

    runs = [_prepare(base, spec) for spec in specs]
    model: Any = base.fresh()
    for spec in specs:
        model = add_adapter(model, spec.train_id, spec.training.lora, spec.seed)
        if spec.adapter is not None:
            begin_with(model, spec.train_id, spec.adapter)
    plain = any(run.is_second_order for run in runs)  # of second order: only PyTorch's own operations will do
    if plain:
        model.get_base_model().set_attn_implementation("eager")
    num_lora = 0 if plain else use_lora_linear(model)
    model.to(base.device)
    _set_training_mode(model, gradient_checkpointing)
    if gradient_checkpointing:
        model.enable_input_require_grads()
        model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = {run.name: list(adapter_parameters(model, run.name).values()) for run in runs}
    _activate(model, runs[0].name, parameters)
    driver = DeepSpeedDriver(
        model,
        [RunParameters(run.name, parameters[run.name], run.spec.training.weight_decay) for run in runs],
        zero_stage,
    )
    try:
        for run in runs:
            run.done, run.signals = resume(run.name, run.num_steps, driver, sinks[run.name])
        with contextlib.nullcontext("nothing else") if plain else native_ops(model) as native:
            for run in runs:
                sinks[run.name].log(f"computed by shiftgrad: {num_lora} LoRA modules, {native}")
            while active := [run for run in runs if not run.ended]:
                _optimizer_step(base, model, driver, runs, active, parameters, sinks)
                _save_checkpoints(driver, active, sinks, checkpoints)
                failpoint(f"after_step:{max(run.step for run in active)}")
    finally:
        driver.close()
    model.eval()
    model.requires_grad_(False)
    for run in runs:
        if run.stopped_early:
            sinks[run.name].log(f"stopped early after step {run.step} of {run.num_steps}: the loss has diverged")
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "adapter"
            save_adapter(model, run.name, run.spec.base_name, folder)
            sinks[run.name].adapter(run.name, folder)
    return model, [run.result() for run in runs]


def _prepare(base: LoadedBase, spec: RunSpec) -> _Run:
    encoder = ChatEncoder(base.tokenizer, spec.data.max_length, spec.data.loss_on)
    _, kept = encode_all(spec.rows, encoder, spec.data.allow_truncated_away)
    steps_per_epoch = math.ceil(len(kept) / spec.training.batch_size)
    return _Run(spec, encoder, list(kept), num_optimizer_steps(len(kept), spec.training), steps_per_epoch)


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


def _optimizer_step(
    base: LoadedBase,
    model: Any,
    driver: DeepSpeedDriver,
    runs: Sequence[_Run],
    active: Sequence[_Run],
    parameters: Mapping[str, Sequence[torch.nn.Parameter]],
    sinks: Mapping[str, RunSink],
) -> None:
    losses: dict[str, StepLosses] = {}
    counts: dict[str, tuple[int, int]] = {}
    seconds: dict[str, float] = {}
    for run in active:
        started = time.perf_counter()
        _activate(model, run.name, parameters)
        batch = run.next_batch()
        losses[run.name] = backward_passes(base, model, driver, run.this_step(), batch, last_run=run is active[-1])
        counts[run.name] = (
            sum(len(row.input_ids) for row in batch),
            sum(sum(row.loss_mask[1:]) for row in batch),
        )
        seconds[run.name] = time.perf_counter() - started
    started = time.perf_counter()
    norms = {run.name: _checked_norm(run, losses[run.name].loss, driver) for run in active}
    for run in active:
        if run.spec.training.max_gradient_norm is not None:
            driver.clip(run.name, norms[run.name], run.spec.training.max_gradient_norm)
    rates = {run.name: 0.0 if run.ended else run.learning_rate() for run in runs}
    driver.step(rates)
    shared_seconds = (time.perf_counter() - started) / len(active)
    for run in active:
        _record(
            run,
            losses[run.name],
            norms[run.name],
            rates[run.name],
            counts[run.name],
            seconds[run.name] + shared_seconds,
            sinks[run.name],
        )


def _save_checkpoints(
    driver: DeepSpeedDriver, stepped: Sequence[_Run], sinks: Mapping[str, RunSink], settings: CheckpointSettings
) -> None:
    """Checkpoint those of the runs just stepped that are due, and any that has ended while others go on."""
    others_go_on = not all(run.ended for run in stepped)
    for run in stepped:
        due = settings.due(run.step, time.monotonic() - run.saved_at)
        if due or (settings.enabled and run.ended and others_go_on):
            save_checkpoint(run.name, run.done, driver, sinks[run.name], run.signals)
            run.saved_at = time.monotonic()


def _checked_norm(run: _Run, loss: float, driver: DeepSpeedDriver) -> float:
    norm = driver.gradient_norm(run.name)
    if norm == 0 or not math.isfinite(norm):
        raise TrainingError(
            f"run {run.name}, step {run.step + 1}: the gradient norm is {norm} (loss {loss:.4f}); "
            + ("no gradient reaches the adapter" if norm == 0 else "the training diverged, try a lower learning rate")
        )
    return norm


def _record(
    run: _Run,
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
