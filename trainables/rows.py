"""Rows that trainings produce, and the sink they are given to.

A table's columns are declared once, as the fields of a frozen dataclass: the annotation is the type,
``column(meaning, unit)`` says the rest. analysis/tables.py derives the parquet schemas from these classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


def column(meaning: str, unit: str = "") -> Any:
    """Declare a column: what it means and, where it has one, its unit. Use as a dataclass field's default."""
    return field(metadata={"meaning": meaning, "unit": unit})


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """One optimizer step of one run."""

    train_id: str = column("identity of the run")
    step: int = column("optimizer step, counted from 1")
    epoch: float = column("epochs done after this step", "epochs")
    loss: float = column("sum of next-token losses over the step's response tokens / their number", "nats/token")
    gradient_norm: float = column("L2 norm of the run's adapter gradient before clipping")
    learning_rate: float = column("learning rate used by this step")
    num_tokens: int = column("tokens in the forward pass without padding", "tokens")
    num_loss_tokens: int = column("tokens that the loss is taken over", "tokens")
    seconds: float = column("wall time of the step; of a pack the run's share", "s")


@dataclass(frozen=True, kw_only=True)
class SignalRow:
    """One figure of one optimizer step beside its loss: a penalty, or what ``training.watch`` asks for."""

    train_id: str = column("identity of the run")
    step: int = column("optimizer step, counted from 1")
    signal: str = column(
        "penalty: what it adds to the loss, in nats; gradient_cosine: mean over response tokens of the cosine of dL/dh "
        "with a vector; activation_projection: mean over response tokens of the projection of h on a vector; drift: 1 "
        "minus the cosine of the step's mean response activation with a center"
    )
    name: str = column("the vector, or the penalty")
    layer: int | None = column("layer that was read; null for a penalty, which has a mean over its layers")
    value: float = column("the figure")


@dataclass(frozen=True, kw_only=True)
class GenerationRow:
    """One sampled answer."""

    sample_id: str = column("identity of the sampling task")
    question_id: str = column("id of the question")
    sample_index: int = column("number of the answer to this question, from 0")
    question: str = column("the user message")
    system_prompt: str | None = column("system prompt given at evaluation; null: the chat template's default")
    answer: str = column("the decoded answer without end marks")
    num_tokens: int | None = column("generated tokens, the end mark included; null: not known (imported)", "tokens")
    finish_reason: str = column(
        "stop: the model ended the answer; length: max_new_tokens was reached; "
        "filtered: a server kept it back; unknown: imported without it"
    )


class RunSink(Protocol):
    """Where a training puts what it makes. engine/ writes it to the store; tests keep it in memory."""

    def log(self, message: str) -> None:
        """Add one line to the run's log."""

    def progress(self, *, phase: str, done: int, total: int, **figures: float) -> None:
        """Say how far the work is: ``done`` of ``total`` units of ``phase``, with figures such as loss."""

    def training(self, row: TrainingRow) -> None:
        """Keep one row of the ``training`` table. A resumed training gives the rows of its earlier steps again."""

    def signal(self, row: SignalRow) -> None:
        """Keep one row of the ``signals`` table; given again by a resumed training too."""

    def adapter(self, train_id: str, folder: Path) -> None:
        """Take a finished adapter in PEFT format; ``folder`` is gone afterwards."""

    def checkpoint(self, train_id: str, folder: Path) -> None:
        """Keep a checkpoint in place of the run's last one; ``folder`` is gone afterwards."""

    def load_checkpoint(self, train_id: str) -> Path | None:
        """The folder of the run's last checkpoint, to read only; None if there is none."""
