"""What every run of a sweep showed, as arrays: scores by question, losses by data row.

Letters at the end of names: r row of the sweep (run or base) in the manifest's order, g question (of a loss: data row).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.bootstrap import Bounds
from analysis.crossed import Crossed
from analysis.manifest import RunEntry
from analysis.rows import NO_CONDITION, OK
from analysis.undefended import Partner, partners_of
from trainables.errors import StoreError

NOT_JUDGED = "not_judged"
"""Status under which an answer is counted that no judgement exists of."""

PLAIN_LOSS = "plain_loss"
RATE: Bounds = (0.0, 1.0)
_ANSWER = ["run", "question_id", "sample_index"]


@dataclass(frozen=True, eq=False)
class Quantity:
    """One number per answer or token: its sums and how many there are, float64 [r, g] with 0 where nothing is.

    ``bounds`` is (0, 1) for a rate. ``by_token``: a question weighs by its tokens, also in a paired difference.
    """

    name: str
    bounds: Bounds | None
    sums_rg: np.ndarray
    weights_rg: np.ndarray
    by_token: bool

    def values(self, rows: Sequence[int], seeds: Sequence[object]) -> Crossed:
        """What these rows showed."""
        sums, weights = self.sums_rg[list(rows)], self.weights_rg[list(rows)]
        return Crossed.of(sums, weights, [repr(seed) for seed in seeds])

    def differences(self, rows: Sequence[int], others: Sequence[int], seeds: Sequence[object]) -> Crossed:
        """Row minus other row, paired: what both have on a question. ``statistics.difference`` for a metric; for a
        loss the difference of the sums over the tokens of the shared data rows."""
        sums_rg, weights_rg = self.sums_rg[list(rows)], self.weights_rg[list(rows)]
        other_sums_rg, other_weights_rg = self.sums_rg[list(others)], self.weights_rg[list(others)]
        shared_rg = (weights_rg > 0) & (other_weights_rg > 0)
        count = int(((weights_rg + other_weights_rg) * shared_rg).sum())
        labels = [repr(seed) for seed in seeds]
        if self.by_token:
            if (weights_rg != other_weights_rg)[shared_rg].any():
                raise StoreError(f"{self.name}: runs with the same data have other numbers of tokens in a row of it")
            differences_rg = np.where(shared_rg, sums_rg - other_sums_rg, 0.0)
            return Crossed.of(differences_rg, weights_rg * shared_rg, labels, count)
        means_rg, other_means_rg = _means(sums_rg, weights_rg), _means(other_sums_rg, other_weights_rg)
        differences_rg = np.where(shared_rg, means_rg - other_means_rg, 0.0)
        return Crossed.of(differences_rg, shared_rg.astype(np.float64), labels, count)

    @property
    def difference_bounds(self) -> Bounds | None:
        return None if self.bounds is None else (self.bounds[0] - self.bounds[1], self.bounds[1] - self.bounds[0])


@dataclass(frozen=True, eq=False)
class Measured:
    """All that a summary is made of. ``row_of``, ``statuses``, ``train_losses`` and ``num_answers`` are by label,
    counts by (label, metric)."""

    entries: tuple[RunEntry, ...]
    row_of: Mapping[str, int]
    metrics: tuple[str, ...]
    statuses: Mapping[str, str]
    train_losses: Mapping[str, float]  # NaN if there is none
    num_answers: Mapping[str, int]
    num_scored: Mapping[tuple[str, str], int]
    missing: Mapping[tuple[str, str], Mapping[str, int]]  # status -> answers
    quantities: Mapping[str, Quantity]  # the metrics in order, then plain_loss
    partners: Mapping[str, Partner]

    def is_counted(self, entry: RunEntry, metric: str) -> bool:
        """Whether there are answers that the metric was asked of."""
        scored = self.num_scored.get((entry.label, metric), 0)
        return metric in entry.judge_ids and bool(
            self.num_answers.get(entry.label) or scored or self.missing.get((entry.label, metric))
        )


def measured(
    entries: Sequence[RunEntry],
    runs: pd.DataFrame,
    generations: pd.DataFrame,
    scores: pd.DataFrame,
    losses: pd.DataFrame,
) -> Measured:
    """The tables of a sweep as arrays. The order of rows in the tables does not matter."""
    row_of = {entry.label: row for row, entry in enumerate(entries)}
    metrics = tuple(dict.fromkeys(metric for entry in entries for metric in entry.judge_ids))
    scored = scores[scores["status"] == OK].sort_values(["question_id", "sample_index"], kind="stable")
    quantities = {}
    for metric in metrics:
        of_metric = scored[scored["metric"] == metric]
        bounds = bounds_of(metric, entries, of_metric["value"])
        ones = np.ones(len(of_metric))
        sums_rg, weights_rg = _cells(row_of, of_metric, "question_id", of_metric["value"].to_numpy(), ones)
        quantities[metric] = Quantity(metric, bounds, sums_rg, weights_rg, by_token=False)
    plain = losses[losses["condition"] == NO_CONDITION]
    sums_rg, weights_rg = _cells(row_of, plain, "row", plain["loss_sum"].to_numpy(), plain["num_tokens"].to_numpy())
    quantities[PLAIN_LOSS] = Quantity(PLAIN_LOSS, None, sums_rg, weights_rg, by_token=True)
    return Measured(
        entries=tuple(entries),
        row_of=row_of,
        metrics=metrics,
        statuses=dict(zip(runs["run"], runs["status"], strict=True)),
        train_losses=dict(zip(runs["run"], runs["train_loss_last_epoch"].astype("float64"), strict=True)),
        num_answers={str(run): int(count) for run, count in generations["run"].value_counts().items()},
        num_scored={
            (entry.label, metric): int(quantities[metric].weights_rg[row].sum())
            for row, entry in enumerate(entries)
            for metric in metrics
        },
        missing=_missing(generations, scores, metrics),
        quantities=quantities,
        partners=partners_of(entries),
    )


def bounds_of(metric: str, entries: Sequence[RunEntry], values: pd.Series) -> Bounds | None:
    """Between which numbers the values of a metric lie in this sweep: as its judges say, the widest if they differ.

    Of a sweep that does not say it, a metric is taken as a rate if none of its scores lies outside 0 to 1. None if
    nothing is known, or if a score shows that it is not so.
    """
    scales = [entry.scales.get(metric) for entry in entries if metric in entry.judge_ids]
    known = [scale for scale in scales if scale is not None]
    bounds = RATE
    if known and len(known) == len(scales):
        bounds = (min(low for low, _ in known), max(high for _, high in known))
    return bounds if values.between(*bounds).all() else None


def _cells(
    row_of: Mapping[str, int], table: pd.DataFrame, column: str, values: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(sums, weights), [r, g] with questions in sorted order, so that they do not depend on who was asked first."""
    columns, names = pd.factorize(table[column], sort=True)
    shape = (len(row_of), len(names))
    cells = table["run"].map(row_of).to_numpy(dtype=np.int64) * shape[1] + columns
    size = shape[0] * shape[1]
    # the bincount of nothing is an int, whatever the weights
    sums = np.bincount(cells, weights=values, minlength=size).astype(np.float64)
    counts = np.bincount(cells, weights=weights, minlength=size).astype(np.float64)
    return sums.reshape(shape), counts.reshape(shape)


def _missing(
    generations: pd.DataFrame, scores: pd.DataFrame, metrics: Sequence[str]
) -> dict[tuple[str, str], dict[str, int]]:
    missing: dict[tuple[str, str], dict[str, int]] = {}
    without = scores[scores["status"] != OK]
    for row in without.groupby(["run", "metric", "status"]).size().reset_index(name="count").to_dict("records"):
        missing.setdefault((str(row["run"]), str(row["metric"])), {})[str(row["status"])] = int(row["count"])
    answers = generations[_ANSWER].drop_duplicates()
    for metric in metrics:
        judged = scores.loc[scores["metric"] == metric, _ANSWER].drop_duplicates()
        both = answers.merge(judged, how="left", on=_ANSWER, indicator="found")
        for run, count in both.loc[both["found"] == "left_only", "run"].value_counts(sort=False).items():
            missing.setdefault((str(run), metric), {})[NOT_JUDGED] = int(count)
    return missing


def _means(sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """sums / weights, 0 where there is nothing."""
    return np.divide(sums, weights, out=np.zeros_like(sums), where=weights > 0)
