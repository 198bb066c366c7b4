"""Means with honest standard errors and intervals. Pure functions over plain numbers."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.bootstrap import Bounds, intervals
from analysis.crossed import Crossed, spread


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error, its 95 % interval (``bootstrap.intervals``) and what they rest on.

    NaN where there is too little to say.
    """

    mean: float
    standard_error: float
    low: float
    high: float
    num_values: int
    num_clusters: int  # questions, or data rows
    num_runs: int
    num_seeds: int  # 1: how training seeds differ is in neither error nor interval


NOTHING = Estimate(math.nan, math.nan, math.nan, math.nan, 0, 0, 0, 0)


def estimates(tables: Sequence[Crossed], bounds: Sequence[Bounds | None]) -> list[Estimate]:
    """One estimate per table, ``bounds`` being those of its values; many at once are faster than one by one."""
    spreads = [spread(table) for table in tables]
    return [
        Estimate(
            mean=one.mean,
            standard_error=math.sqrt(one.variance),
            low=low,
            high=high,
            num_values=table.num_values,
            num_clusters=table.num_questions,
            num_runs=table.num_runs,
            num_seeds=table.num_seeds,
        )
        for table, one, (low, high) in zip(tables, spreads, intervals(tables, spreads, bounds), strict=True)
    ]


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable], bounds: Bounds | None = None) -> Estimate:
    """The mean over all values, with the standard error clustered by ``clusters[i]`` (the question of value i).

    Answers to one question resemble each other, so they are not independent draws: with residuals
    e_i = y_i - mean and cluster sums u_g = sum of e_i over cluster g, for G clusters and n values,

        SE = sqrt(G / (G - 1) * sum_g u_g^2) / n

    (the cluster-robust variance of a mean with the small-sample factor G / (G - 1)). With one value in each cluster it
    is the plain standard error, std(ddof=1) / sqrt(n). NaN with fewer than two clusters: one question says nothing
    about how questions differ.

    Raises ValueError if the lengths differ or a value is not finite.
    """
    y_n = _finite(values)
    if len(clusters) != len(y_n):
        raise ValueError(f"{len(y_n)} values but {len(clusters)} clusters")
    index_of: dict[Hashable, int] = {}
    cluster_n = np.array([index_of.setdefault(cluster, len(index_of)) for cluster in clusters], dtype=np.int64)
    return _of_one_run(np.bincount(cluster_n, weights=y_n), np.bincount(cluster_n), bounds, len(y_n))


def ratio(numerators: Sequence[float], denominators: Sequence[float], bounds: Bounds | None = None) -> Estimate:
    """sum(numerators) / sum(denominators), such as nats per token over rows of unequal length.

    The standard error is the ratio estimator's, for n rows drawn independently, with R the ratio:

        SE = sqrt(n / (n - 1) * sum_i (numerator_i - R * denominator_i)^2) / sum(denominators)

    It is ``clustered_mean`` over tokens with rows as clusters. NaN with fewer than two rows; ``num_values`` and
    ``num_clusters`` are the number of rows.

    Raises ValueError if the lengths differ, a number is not finite, or the denominators are not all positive.
    """
    top_n, bottom_n = _finite(numerators), _finite(denominators)
    if len(top_n) != len(bottom_n):
        raise ValueError(f"{len(top_n)} numerators but {len(bottom_n)} denominators")
    if len(bottom_n) and bottom_n.min() <= 0:
        raise ValueError(f"denominators must be positive, one is {bottom_n.min()}")
    return _of_one_run(top_n, bottom_n, bounds, len(top_n))


def difference(
    a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]], bounds: Bounds | None = None
) -> Estimate:
    """Mean of ``a`` minus mean of ``b``, paired by question. Each maps a question's id to the values of its answers.

    Only questions with a value in both count (``num_clusters`` says how many). Each of them contributes one difference,
    mean of its values in ``a`` minus mean of its values in ``b``, and all weigh the same, however many answers either
    side has: unequal counts change how exact a question's difference is, not its weight. With equal counts throughout
    this is the difference of the two means over the shared questions. The standard error is that of the mean over
    questions, std(ddof=1) / sqrt(questions): what the two runs share on a question drops out of it. NaN with fewer
    than two shared questions. ``num_values`` counts the answers of both sides that entered; ``bounds`` are those of a
    difference, such as (-1, 1) for rates.

    Raises ValueError if a value is not finite.
    """
    shared = [question for question in a if len(a[question]) and len(b.get(question, ()))]
    per_question = [float(_finite(a[q]).mean() - _finite(b[q]).mean()) for q in shared]
    num_values = sum(len(a[question]) + len(b[question]) for question in shared)
    return _of_one_run(np.array(per_question), np.ones(len(shared)), bounds, num_values)


def _of_one_run(sums_g: np.ndarray, weights_g: np.ndarray, bounds: Bounds | None, num_values: int) -> Estimate:
    if not len(sums_g):
        return NOTHING
    table = Crossed.of(sums_g[None], weights_g[None].astype(np.float64), [None], num_values)
    return estimates([table], [bounds])[0]


def _finite(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError("a value is not finite; leave out what has no value and count it as missing")
    return array
