"""Rows that measurements produce, declared as in trainables/rows.py: the fields are the columns."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainables.rows import column

OK = "ok"
STATUSES = (
    OK,
    "refused",
    "unparsable",
    "low_mass",
    "api_error",
    "budget_exhausted",
    "unrecorded",  # imported: another project's table has no score and does not say why
    "filtered",  # imported: its rule leaves the answer out, such as an incoherent one
)
NO_CONDITION = "none"


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """One judgement of one answer by one metric. A status of ``ok`` means that there is a finite value."""

    judge_id: str = column("identity of the judging task")
    sample_id: str = column("identity of the sampling task whose answer is judged")
    question_id: str = column("id of the question")
    sample_index: int = column("number of the answer to this question, from 0")
    value: float | None = column("the score; only values whose status is ok enter a mean")
    status: str = column(f"one of: {', '.join(STATUSES)}")
    judge: str = column("which judge gave it, such as rule")
    reply: str | None = column("the judge's raw reply; null: it gives none")

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status {self.status!r} is not one of {', '.join(STATUSES)}")
        if self.status == OK and (self.value is None or not math.isfinite(self.value)):
            raise ValueError(f"a judgement whose status is ok needs a finite value, not {self.value}")


@dataclass(frozen=True, kw_only=True)
class LossRow:
    """The next-token loss of one row of a data file under one condition."""

    measure_id: str = column("identity of the measuring task")
    row: int = column("index of the row in the data file, from 0")
    condition: str = column("what was present in the forward pass; none: nothing")
    num_tokens: int = column("response tokens that the loss is taken over", "tokens")
    loss_sum: float = column("sum of their next-token losses", "nats")
    loss_mean: float = column("loss_sum / num_tokens", "nats/token")


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """The fixed columns of the derived table ``runs``; every config field follows as a column of its own name."""

    run: str = column("label of the run in its sweep")
    kind: str = column("run: a training; base: a model that runs start from; imported: answers of another project")
    run_id: str = column("identity of the run")
    sample_id: str = column("identity of its sampling task")
    status: str = column("done, failed, skipped (what it needs failed) or missing (not done yet)")
    reason: str | None = column("why it failed or was skipped")
    log_tail: str | None = column("the last lines of its log, if it failed")
    seconds_training: float | None = column("wall time of the training", "s")
    num_steps: int | None = column("optimizer steps of the training")
    num_tokens: int | None = column("tokens that were trained on without padding", "tokens")
    train_loss_last_epoch: float | None = column("training loss over the last epoch", "nats/token")
    started_utc: str | None = column("when the training started", "UTC")
    finished_utc: str | None = column("when the training ended", "UTC")
