"""The forward and backward passes of one optimizer step: of one run, or of several runs of a pack together.

One pass takes one micro-batch of each of its runs. Their rows stand one run after another, and all else (vectors,
masks, prompts, penalties, dropout, the number that a loss is divided by) is each run's own. A pass of one run is what
that run has when it trains alone, to the bit. A pass of several pads all rows to the longest, and its matrix products
have other shapes: gradients are those of the runs alone up to rounding.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from trainables.base_model import LoadedBase
from trainables.chat_data import Encoded, PaddedBatch, cut, pad, padded_length
from trainables.defenses import Mechanism, RunRows
from trainables.errors import TrainingError
from trainables.lora import set_dropout_key
from trainables.loss import token_losses
from trainables.packed_lora import PackRows, packed
from trainables.penalties import Penalty, ReadPenalties
from trainables.residual_stream import Intervention, Reader, residual_stream
from trainables.signals import Watch
from trainables.training_config import TrainingConfig
from trainables.workers import ONE_WORKER, Workers


class Backward(Protocol):
    """What the passes need of the optimizer driver."""

    def backward(self, loss: torch.Tensor, *, last: bool) -> None: ...


@dataclass(frozen=True)
class StepOf:
    """Which step of which run. ``step`` counts from 1."""

    name: str
    step: int
    num_steps: int
    seed: int
    training: TrainingConfig
    mechanisms: Sequence[Mechanism]
    watch: Watch | None = None

    @property
    def is_second_order(self) -> bool:
        return any(mechanism.is_second_order for mechanism in self.mechanisms)


@dataclass
class StepLosses:
    """Of the whole step: the mean next-token loss, and what each penalty added to it, in nats.

    ``failure``: why the run cannot go on; its gradients mean nothing then.
    """

    loss: float = 0.0
    penalties: dict[str, float] = field(default_factory=dict)
    failure: TrainingError | None = None


@dataclass(frozen=True)
class _Share:
    """What one run has in one pass: its rows, from ``start`` on; ``length``: what it pads them to when it is alone."""

    part: PaddedBatch
    start: int
    length: int
    rows: RunRows
    num_predicted: int


class _RunStep:
    """One run's step, cut into micro-batches."""

    def __init__(self, base: LoadedBase, run: StepOf, batch: Sequence[Encoded], losses: StepLosses) -> None:
        self.base, self.run, self.losses = base, run, losses
        self.denominator = sum(sum(row.loss_mask[1:]) for row in batch)
        if self.denominator == 0:
            raise TrainingError(f"run {run.name}, step {run.step}: the batch has no token to predict")
        self.micro_batches = cut(batch, run.training.micro_batch_size or run.training.batch_size)
        self.lengths = [padded_length(rows, run.training.pad_to_multiple_of) for rows in self.micro_batches]
        self.shares: list[_Share] = []
        self.penalties: list[list[Penalty]] = []
        self.num_tokens: list[int] = []

    def num_rows(self, index: int) -> int:
        """How many rows it has in pass ``index``; none after its last micro-batch."""
        return len(self.micro_batches[index]) if index < len(self.micro_batches) else 0

    def place(self, index: int, start: int, length: int) -> None:
        """Its rows of pass ``index``, the next one, stand from row ``start`` on and are padded to ``length`` tokens."""
        rows = self.micro_batches[index]
        part = pad(rows, self.base.tokenizer.pad_token_id, 1, self.base.device, at_least=length)
        mine = RunRows(
            rows=torch.arange(start, start + len(rows)),
            attention_mask=part.attention_mask_bt,
            response_mask=part.response_mask_bt,
            step=self.run.step,
            num_steps=self.run.num_steps,
        )
        num_predicted = sum(sum(row.loss_mask[1:]) for row in rows)
        self.shares.append(_Share(part, start, self.lengths[index], mine, num_predicted))

    def count(self) -> None:
        """Make the penalties of all passes: each needs to know how many tokens it counts in the whole step."""
        self.penalties = [
            [one for mechanism in self.run.mechanisms for one in mechanism.penalties(share.rows)]
            for share in self.shares
        ]
        # every micro-batch has the same penalties
        self.num_tokens = [sum(int(one.token_mask.sum()) for one in same) for same in zip(*self.penalties, strict=True)]

    def interventions(self, index: int) -> list[Intervention]:
        rows = self.shares[index].rows
        return [edit for mechanism in self.run.mechanisms for edit in mechanism.interventions(rows)]


def backward_passes(
    base: LoadedBase,
    model: Any,
    driver: Backward,
    runs: Sequence[tuple[StepOf, Sequence[Encoded]]],
    *,
    last: bool,
    workers: Workers = ONE_WORKER,
) -> dict[str, StepLosses]:
    """Accumulate the gradient of every run's loss and penalties, over the rows of its step; by the run's name.

    With one run its adapter must be the active one. ``last``: no other pass follows before the optimizer step. A run
    that cannot go on (nothing to predict, a loss that is not finite) gets a ``failure`` and has no part in the losses
    that follow; the others are as they would be without it. Of several ``workers``, which must have one run, each does
    its share of the passes and knows the losses of all; the error of a run that cannot go on is raised, because the
    others wait for what this one would do next.
    """
    found = {run.name: StepLosses() for run, _ in runs}
    steps: list[_RunStep] = []
    for run, batch in runs:
        with _failing(found[run.name]):
            steps.append(_RunStep(base, run, batch, found[run.name]))
    num_passes = max((len(one.micro_batches) for one in steps), default=0)
    passes = [_order(steps, index) for index in range(num_passes)]
    for index, order in enumerate(passes):
        length, start = max(one.lengths[index] for one in order), 0
        for one in order:
            one.place(index, start, length)
            start += one.num_rows(index)
    for one in steps:
        with _failing(one.losses):
            one.count()
    own = list(workers.own(num_passes))
    for done, (index, counts) in enumerate(own, start=1):
        is_last = last and done == len(own)
        _one_pass(base, model, driver, passes[index], index, shared=len(runs) > 1, last=is_last, counts=counts)
    if workers.size > 1:
        for run, _ in runs:
            _join(found[run.name], run.watch, workers)
    return found


def _join(losses: StepLosses, watch: Watch | None, workers: Workers) -> None:
    """Add up what the workers have found, each in its own micro-batches."""
    if losses.failure is not None:
        raise losses.failure
    losses.loss, *penalties = workers.added([losses.loss, *losses.penalties.values()])
    losses.penalties = dict(zip(losses.penalties, penalties, strict=True))
    if watch is not None:
        watch.join(workers)


@contextlib.contextmanager
def _failing(losses: StepLosses) -> Iterator[None]:
    """What goes wrong inside is the failure of one run."""
    try:
        yield
    except TrainingError as error:
        losses.failure = error


def _order(steps: Sequence[_RunStep], index: int) -> list[_RunStep]:
    """The runs of pass ``index``, those of like rows and adapters side by side: their products are done in one."""

    def like(one: _RunStep) -> tuple[object, ...]:
        lora = one.run.training.lora
        return one.num_rows(index), lora.rank, lora.dropout > 0, str(lora.target_modules), str(lora.layers)

    return sorted((one for one in steps if one.num_rows(index) > 0), key=like)


def _one_pass(
    base: LoadedBase,
    model: Any,
    driver: Backward,
    order: Sequence[_RunStep],
    index: int,
    *,
    shared: bool,
    last: bool,
    counts: bool = True,
) -> None:
    """One forward pass over the rows of all runs of ``order`` and one backward pass of the sum of their losses.

    ``shared``: rows have the adapters of their runs; else the one run's adapter is the active one.
    The rows of a run that has failed, now or before, stay where they are: a row has no say in what others get.
    ``counts=False``: a pass that another worker does too, with gradients that are 0.
    """
    edits: dict[str, list[Intervention]] = {}
    for one in order:
        if one.run.training.lora.dropout > 0:
            set_dropout_key(model, one.run.name, (one.run.seed, one.run.step - 1, index))
        if one.losses.failure is None:
            with _failing(one.losses):
                edits[one.run.name] = one.interventions(index)
    going = [one for one in order if one.losses.failure is None]
    if not going:
        return
    shares = [one.shares[index] for one in order]
    reading = {
        one.run.name: ReadPenalties(one.penalties[index], one.num_tokens, one.shares[index].rows.rows) for one in going
    }
    readers: list[Reader] = []
    for one in going:
        readers += reading[one.run.name].readers
        readers += one.run.watch.readers(one.shares[index].rows) if one.run.watch is not None and counts else []
    standing = [
        PackRows(one.run.name, share.start, share.start + one.num_rows(index), share.length)
        for one, share in zip(order, shares, strict=True)
    ]
    interventions = [edit for one in going for edit in edits[one.run.name]]
    together = packed(model, standing) if shared else contextlib.nullcontext()
    with together, residual_stream(model, interventions, readers):
        losses_n = token_losses(
            model,
            _joined([share.part.input_ids_bt for share in shares]),
            None,  # padding stands on the right
            _joined([share.part.loss_mask_bt for share in shares]),
            plain_head=base.plain_head and not any(one.run.is_second_order for one in order),
        )
        own_losses = dict(zip(order, losses_n.split([share.num_predicted for share in shares]), strict=True))
        sums = {one: own_losses[one].sum() for one in going}
        means = {one: sums[one] / one.denominator for one in going}
        terms = {one: reading[one.run.name].terms(sums[one]) for one in going}
        values = iter(_values([value for one in going for value in (means[one], *terms[one].values())]))
        losses: list[torch.Tensor] = []
        for one in going:
            value = next(values)
            penalties = {name: next(values) for name in terms[one]}
            if not math.isfinite(sum(penalties.values(), value)):
                what = f"the loss is {value}" + "".join(f", {name} is {found}" for name, found in penalties.items())
                one.losses.failure = TrainingError(f"run {one.run.name}, step {one.run.step}: {what}")
                continue
            whole = sum(terms[one].values(), means[one])
            losses.append(whole if counts else 0.0 * whole)
            one.losses.loss += value if counts else 0.0
            for name, found in penalties.items():
                one.losses.penalties[name] = one.losses.penalties.get(name, 0.0) + (found if counts else 0.0)
        if losses:
            driver.backward(sum(losses[1:], losses[0]), last=last)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _values(scalars: Sequence[torch.Tensor]) -> list[float]:
    """Their values as Python's numbers, read from a GPU in one go."""
    kind = max((one.dtype for one in scalars), key=lambda dtype: dtype.itemsize)
    values: list[float] = torch.stack([one.detach().to(kind) for one in scalars]).tolist()
    return values
