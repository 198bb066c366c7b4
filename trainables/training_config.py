"""The optimizer's side of a run, as the user writes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, model_validator

from trainables.config import AddedLater, Config
from trainables.lora import LoraSettings
from trainables.schedule import Schedule
from trainables.signals import WatchConfig


class TrainingConfig(Config):
    """The optimizer's side of a run: AdamW over LoRA parameters. Every field is part of the run's identity."""

    epochs: float = Field(default=1, gt=0)
    """Passes over the data; may be a fraction."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, in place of ``epochs``. null: as many as the epochs have."""
    batch_size: int = Field(default=8, ge=1)
    """Rows per optimizer step. The last batch of an epoch may be short."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Rows per forward pass: fewer take less memory for the same steps. null: ``batch_size``."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate of AdamW. It has no default on purpose: calibrate it on the undefended run."""
    schedule: Schedule = "linear"
    """What the learning rate does after the warmup: to 0 in a line, to 0 along a cosine, or constant."""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps, rounded down, over which the learning rate rises from 0."""
    warmup_steps: Annotated[int | None, Field(ge=1), AddedLater()] = None
    """Steps over which the learning rate rises from 0, in place of ``warmup_ratio``."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decoupled weight decay of the adapter."""
    max_gradient_norm: float | None = Field(default=1.0, gt=0)
    """L2 norm to which each run's adapter gradient is clipped. null: no clipping."""
    pad_to_multiple_of: int = Field(default=8, ge=1)
    """Micro-batches are padded to a multiple of this many tokens."""
    lora: LoraSettings = LoraSettings()
    """The adapter."""
    stop_if_loss_above: Annotated[float | None, Field(gt=1), AddedLater()] = None
    """End the training, with the adapter as it is then, once the mean loss of its last 5 steps is more than this many
    times that of its first 5. null: every step is done."""
    watch: Annotated[WatchConfig | None, AddedLater()] = None
    """Figures along vectors, kept for every step in the table ``signals``. null: none."""

    @model_validator(mode="after")
    def _one_warmup(self) -> TrainingConfig:
        if self.warmup_steps is not None and self.warmup_ratio > 0:
            raise ValueError("warmup_steps stands beside warmup_ratio; give one of them")
        return self


def num_optimizer_steps(num_rows: int, training: TrainingConfig) -> int:
    """Optimizer steps of a run: ``max_steps``, or epochs times ceil(rows / batch size), rounded up."""
    if training.max_steps is not None:
        return training.max_steps
    return math.ceil(
        training.epochs * math.ceil(num_rows / training.batch_size) - 1e-9
    )  # 1.1 * 50 is 55.00000000000001


STOP_WINDOW = 5  # steps whose mean loss is compared


def has_diverged(losses: Sequence[float], training: TrainingConfig) -> bool:
    """Whether ``stop_if_loss_above`` says that a training with these losses, one per step so far, ends here."""
    limit = training.stop_if_loss_above
    if limit is None or len(losses) < 2 * STOP_WINDOW:
        return False
    return sum(losses[-STOP_WINDOW:]) > limit * sum(losses[:STOP_WINDOW])
