"""Synthetic activations with a known axis: how near the estimators of ``analysis.axes`` come to it.

Two sets of n rows around means that lie ``separation`` apart along a unit axis a of ``dimension`` d:

    h = m + (+ or -)(separation / 2) a + s e,   e ~ N(0, I_d),   s^2 = spread^2 + noise^2

``spread`` is what rows vary by themselves, ``noise`` what is added to it. For the mean difference the alignment
<a^, a> is near separation / sqrt(separation^2 + 2 s^2 (d - 1) / n). Everything is a function of the seed: noise levels
share their draws.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy import stats

from analysis.axes import ESTIMATORS
from analysis.measured_rows import AxisAlignmentRow, AxisSummaryRow, AxisTestRow
from analysis.statistics import clustered_mean
from trainables.randomness import generator

_FLIPS = 20_000


@dataclass(frozen=True)
class Setting:
    """One draw of two sets."""

    noise: float
    num_rows: int  # of each set
    seed: int
    dimension: int
    separation: float
    spread: float

    @property
    def expected(self) -> float:
        """Alignment of the mean difference to first order: what the means' error leaves of the axis."""
        error = 2 * (self.spread**2 + self.noise**2) * (self.dimension - 1) / self.num_rows
        return self.separation / math.sqrt(self.separation**2 + error)


def known_axis(setting: Setting) -> torch.Tensor:
    """The axis [d] of length 1; the same at every noise and number of rows."""
    draw = generator("axis study", "axis", setting.seed, setting.dimension)
    axis_d = torch.randn(setting.dimension, generator=draw, dtype=torch.float64)
    return axis_d / axis_d.norm()


def two_sets(setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    """Positive and negative rows, [n, d] float64 each."""
    draw = generator("axis study", "rows", setting.seed, setting.dimension, setting.num_rows)
    shape = (2, setting.num_rows, setting.dimension)
    rows_2nd = math.hypot(setting.spread, setting.noise) * torch.randn(shape, generator=draw, dtype=torch.float64)
    shift_d = setting.separation / 2 * known_axis(setting)
    return rows_2nd[0] + shift_d, rows_2nd[1] - shift_d


def alignment_rows(setting: Setting, measure_id: str) -> Iterator[AxisAlignmentRow]:
    """The cosine of every estimator's direction with the axis."""
    axis_d = known_axis(setting)
    x_nd, y_nd = two_sets(setting)
    for name, estimator in ESTIMATORS.items():
        yield AxisAlignmentRow(
            measure_id=measure_id,
            estimator=name,
            noise=setting.noise,
            num_rows=setting.num_rows,
            seed=setting.seed,
            alignment=float(estimator(x_nd, y_nd) @ axis_d),
        )


def summary_rows(
    alignments: pd.DataFrame, settings: Mapping[tuple[float, int], Setting], measure_id: str
) -> Iterator[AxisSummaryRow]:
    """Per noise, number of rows and estimator the mean over seeds with its bootstrap interval. ``settings``: any
    setting of every noise and number of rows."""
    for (noise, num_rows), setting in settings.items():
        here = _at(alignments, noise, num_rows)
        for estimator in ESTIMATORS:
            part = here[here["estimator"] == estimator]
            found = clustered_mean(list(part["alignment"]), list(part["seed"]), (-1.0, 1.0))
            yield AxisSummaryRow(
                measure_id=measure_id,
                estimator=estimator,
                noise=noise,
                num_rows=num_rows,
                num_seeds=len(part),
                alignment=found.mean,
                alignment_low=_known(found.low),
                alignment_high=_known(found.high),
                expected=setting.expected if estimator == "mean_difference" else None,
            )


def comparison_rows(
    alignments: pd.DataFrame, settings: Iterable[tuple[float, int]], measure_id: str
) -> Iterator[AxisTestRow]:
    """Every two estimators against each other at every noise and number of rows, paired by seed."""
    for noise, num_rows in settings:
        table = _at(alignments, noise, num_rows).pivot(index="seed", columns="estimator", values="alignment")
        for first, second in itertools.combinations(ESTIMATORS, 2):
            a, b = table[first].to_numpy(), table[second].to_numpy()
            yield AxisTestRow(
                measure_id=measure_id,
                noise=noise,
                num_rows=num_rows,
                first=first,
                second=second,
                num_seeds=len(table),
                difference=float((a - b).mean()),
                cohens_d=cohens_d(a, b),
                p_sign_flip=sign_flip_p(a - b),
                p_t=_paired_t(a - b),
            )


def cohens_d(a: np.ndarray, b: np.ndarray) -> float | None:
    """(mean a - mean b) / sqrt((var a + var b) / 2) with unbiased variances; None where neither varies."""
    if len(a) < 2:
        return None
    pooled = math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    return float((a.mean() - b.mean()) / pooled) if pooled > 0 else None


def sign_flip_p(differences: np.ndarray) -> float:
    """Two-sided p of a paired permutation test: the share of sign patterns whose mean is at least as far from 0.

    All 2^n patterns up to n = 14, else 20000 drawn ones, with that which was found among them.
    """
    n = len(differences)
    if n <= 14:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=n)))
    else:
        drawn = np.random.default_rng(n).choice((1.0, -1.0), size=(_FLIPS - 1, n))
        signs = np.vstack([np.ones(n), drawn])
    sums = np.abs(signs @ differences)
    found = abs(float(differences.sum()))
    return float((sums >= found - 1e-12 * np.abs(differences).sum()).mean())


def _at(alignments: pd.DataFrame, noise: float, num_rows: int) -> pd.DataFrame:
    return alignments[(alignments["noise"] == noise) & (alignments["num_rows"] == num_rows)]


def _paired_t(differences: Sequence[float] | np.ndarray) -> float | None:
    array = np.asarray(differences)
    if len(array) < 2 or array.std(ddof=1) == 0:
        return None
    return float(stats.ttest_1samp(array, 0.0).pvalue)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
