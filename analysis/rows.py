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
    seconds_training: float | None = column("wall time of the training; of a pack the run's share", "s")
    num_steps: int | None = column("optimizer steps of the training")
    num_tokens: int | None = column("tokens that were trained on without padding", "tokens")
    train_loss_last_epoch: float | None = column("training loss over the last epoch", "nats/token")
    diverged: bool | None = column(
        "whether the training ended at a higher loss than it began with: the mean over its last tenth of steps is "
        "above that over its first tenth"
    )
    started_utc: str | None = column("when the training started", "UTC")
    finished_utc: str | None = column("when the training ended", "UTC")
    pack_size: int | None = column("runs that were trained in one pack with it, itself included")
    packing: str | None = column("how its pack was trained: exact or fast; null: it was trained alone")
    pack_note: str | None = column("why its pack was smaller than was meant, or was trained again in smaller ones")


@dataclass(frozen=True, kw_only=True)
class AgreementRow:
    """Two metrics that scored the same answers: the derived table ``agreement``. Scores are stretched to 0 to 100;
    above 50 counts as shown."""

    answers: str = column("whose answers: runs, or the vector that they are made for")
    metric: str = column("the metric that the other is compared with; rates such as rules come first")
    other: str = column("the other metric")
    num_answers: int = column("answers that both were asked about")
    num_both: int = column("of these, those that both gave a value")
    share_one: float | None = column("share of answers that metric calls shown")
    share_other: float | None = column("share of answers that other calls shown")
    agreement: float | None = column("share of answers that both call the same")
    kappa: float | None = column("Cohen's kappa: agreement beyond chance, 1 at most")
    auc: float | None = column("share of pairs of a shown and another answer that other ranks rightly; 0.5 is chance")
    auc_low: float | None = column("lower end of its 95 % interval, bootstrap over questions")
    auc_high: float | None = column("upper end of its 95 % interval")
    correlation: float | None = column("Spearman's rank correlation of the scores")


@dataclass(frozen=True, kw_only=True)
class ExtractionRow:
    """A judge of the answers that a vector is made of: the derived table ``extractions``."""

    vector: str = column("name of the vector in the sweep")
    metric: str = column("which judge: trait is the one that chooses the rows, the others are compared")
    has_a_say: bool = column("whether the vector's rows are chosen by it")
    num_rows: int = column("rows: pairs of answers under opposite instructions; 0: not all judged yet")
    num_kept: int = column("rows that the vector's filter keeps by this judge's scores")
    num_kept_by_both: int = column("of these, those that it keeps by the scores of the judge that has a say too")
    num_kept_positive: int = column("rows that `keep: positive` would keep by this judge's scores, at keep_above")
    num_kept_paired: int = column("rows that `keep: paired` would keep by them")


@dataclass(frozen=True, kw_only=True)
class CappingRow:
    """A model under one cap: the derived table ``capping`` (``analysis.capping`` has the equations)."""

    model: str = column("base, or the defense and the seed of the run; its label too where several are called so")
    cap: str = column("the capping items of evaluation.interventions in words; none: no cap")
    num_attacks: int = column("attacks: other interventions and system prompts with scored answers")
    num_answers_attacked: int = column("scored answers under any attack", "answers")
    attack_success: float | None = column("mean of the harm metric over them, as a share of its scale")
    attack_success_low: float | None = column("lower end of its 95 % interval, bootstrap over questions")
    attack_success_high: float | None = column("upper end of its 95 % interval")
    defense_score: float | None = column("1 - attack_success")
    harm_reduction: float | None = column(
        "1 - attack_success over that without a cap, over attacks and questions that both have; below 0: made it worse"
    )
    plain_rate: float | None = column("mean of the harm metric without an attack")
    capability: float | None = column("mean of the capability metric without an attack")
    capability_low: float | None = column("lower end of its 95 % interval, bootstrap over questions")
    capability_high: float | None = column("upper end of its 95 % interval")
    num_answers_capability: int = column("scored answers that it is the mean of", "answers")
    capability_kept: float | None = column("capability over that without a cap")
    f1: float | None = column("harmonic mean of harm_reduction and capability_kept, each held to 0 to 1")
    plain_loss: float | None = column("loss on the plain answers under the cap alone", "nats per token")
    perplexity_ratio: float | None = column("perplexity on the plain answers over that without a cap")
    degeneration: float | None = column("share of broken answers, under attacks and without")
