"""The summary: per run, each metric's mean with its error and its gaps, beside what shows that a model is broken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from analysis.manifest import RunEntry
from analysis.rows import NO_CONDITION, OK
from analysis.statistics import NOTHING, clustered_mean, ratio
from trainables.errors import StoreError

NOT_JUDGED = "not_judged"
"""Status under which an answer is counted that no judgement exists of."""


def summarize(
    entries: Sequence[RunEntry],
    runs: pd.DataFrame,
    generations: pd.DataFrame,
    scores: pd.DataFrame,
    losses: pd.DataFrame,
) -> pd.DataFrame:
    """One row per entry, in the order given but bases first; a run of which nothing is there stays as a row of NaN.

    ``run``, ``kind``, ``status``, then for each metric

    - ``<metric>``: mean over the judgements that are ok; NaN without one
    - ``<metric>_se``: its standard error clustered by question (``clustered_mean``)
    - ``<metric>_num_scored``, ``<metric>_num_missing``: answers with a value and without; <NA> before there are answers
      or if the metric is not asked of this run
    - ``<metric>_missing_by_status``: why without, such as ``{"refused": 2}``; ``not_judged``: no judgement exists

    then ``plain_loss`` (nats/token on held-out plain answers, every token weighing the same) with
    ``plain_loss_se`` (``ratio``), ``train_loss`` (over the last epoch, nats/token) and ``num_answers``.
    """
    metrics = list(dict.fromkeys(metric for entry in entries for metric in entry.judge_ids))
    dtypes = _dtypes(metrics)
    by_run = runs.set_index("run")
    rows = []
    for entry in sorted(entries, key=lambda entry: entry.kind != "base"):
        answers = generations[generations["run"] == entry.label]
        row: dict[str, Any] = {"run": entry.label, "kind": entry.kind}
        row["status"] = by_run.at[entry.label, "status"]
        for metric in metrics:
            judged = scores[(scores["run"] == entry.label) & (scores["metric"] == metric)]
            row |= _metric_columns(metric, answers, judged, asked=metric in entry.judge_ids)
        loss = losses[(losses["run"] == entry.label) & (losses["condition"] == NO_CONDITION)]
        plain = ratio(loss["loss_sum"].tolist(), loss["num_tokens"].tolist())
        row["plain_loss"], row["plain_loss_se"] = plain.mean, plain.standard_error
        row["train_loss"] = by_run.at[entry.label, "train_loss_last_epoch"]
        row["num_answers"] = len(answers) if len(answers) else None
        rows.append(row)
    return pd.DataFrame({name: pd.Series([row[name] for row in rows], dtype=dtype) for name, dtype in dtypes.items()})


def repeated_columns(metrics: Sequence[str]) -> list[str]:
    """Columns that a summary of these metrics would have twice: a metric cannot be called ``status`` or ``run``."""
    names = [name for name, _ in _columns(metrics)]
    return sorted({name for name in names if names.count(name) > 1})


def _columns(metrics: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, pandas dtype) of the summary's columns, in order."""
    yield from (("run", "str"), ("kind", "str"), ("status", "str"))
    for metric in metrics:
        yield from ((metric, "float64"), (f"{metric}_se", "float64"))
        yield from ((f"{metric}_num_scored", "Int64"), (f"{metric}_num_missing", "Int64"))
        yield f"{metric}_missing_by_status", "object"
    yield from (("plain_loss", "float64"), ("plain_loss_se", "float64"), ("train_loss", "float64"))
    yield "num_answers", "Int64"


def _dtypes(metrics: Sequence[str]) -> dict[str, str]:
    repeated = repeated_columns(metrics)
    if repeated:
        raise StoreError(
            f"the summary would have the column {', '.join(repeated)} twice; give the metric another name in the sweep"
        )
    return dict(_columns(metrics))


def _metric_columns(metric: str, answers: pd.DataFrame, judged: pd.DataFrame, asked: bool) -> dict[str, Any]:
    estimate, num_scored, num_missing = NOTHING, None, None
    missing: dict[str, int] = {}
    if asked and (len(answers) or len(judged)):
        scored = judged[judged["status"] == OK]
        estimate = clustered_mean(scored["value"].tolist(), scored["question_id"].tolist())
        missing = {str(k): int(v) for k, v in judged.loc[judged["status"] != OK, "status"].value_counts().items()}
        keys = ["question_id", "sample_index"]
        not_judged = len(set(answers[keys].itertuples(index=False)) - set(judged[keys].itertuples(index=False)))
        if not_judged:
            missing[NOT_JUDGED] = not_judged
        num_scored, num_missing = len(scored), sum(missing.values())
    return {
        metric: estimate.mean,
        f"{metric}_se": estimate.standard_error,
        f"{metric}_num_scored": num_scored,
        f"{metric}_num_missing": num_missing,
        f"{metric}_missing_by_status": missing,
    }
