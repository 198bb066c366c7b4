"""One run: what it is made of, how far it is while it trains, and what it says of itself in the end."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from trainables.base_model import LoadedBase
from trainables.chat_data import ChatEncoder, DataConfig, Encoded, encode_all
from trainables.defenses import DefenseConfig, Message, SampleKey
from trainables.errors import DataError, ShiftgradError
from trainables.randomness import permutation
from trainables.rows import SignalRow, TrainingRow
from trainables.schedule import learning_rate_factor, num_warmup_steps
from trainables.signals import Watch
from trainables.step import StepOf
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
class Run:
    """One run while it trains."""

    spec: RunSpec
    encoder: ChatEncoder
    kept: list[int]
    num_steps: int
    steps_per_epoch: int
    done: list[TrainingRow] = field(default_factory=list)  # a row per optimizer step so far
    signals: list[SignalRow] = field(default_factory=list)  # of these steps
    failure: ShiftgradError | None = None  # why it does not go on
    order: tuple[int, list[int]] = (-1, [])

    def __post_init__(self) -> None:
        self.mechanisms = [item.mechanism(self.spec.vectors) for item in self.spec.defense]
        self.saved_at = time.monotonic()  # the last checkpoint; at first the start
        watch = self.spec.training.watch
        self.watch = None
        if watch is not None:
            directions = {name: self.spec.vectors[name] for name in watch.vectors}
            self.watch = Watch(directions, watch.layers, {name: self.spec.vectors[name] for name in watch.centers})

    @staticmethod
    def prepared(base: LoadedBase, spec: RunSpec) -> Run:
        """The run before its first step. Raises DataError if a row's response mask cannot be proved."""
        encoder = ChatEncoder(base.tokenizer, spec.data.max_length, spec.data.loss_on)
        _, kept = encode_all(spec.rows, encoder, spec.data.allow_truncated_away)
        steps_per_epoch = math.ceil(len(kept) / spec.training.batch_size)
        return Run(spec, encoder, list(kept), num_optimizer_steps(len(kept), spec.training), steps_per_epoch)

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
        return self.failure is not None or self.step >= self.num_steps or self.stopped_early

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
