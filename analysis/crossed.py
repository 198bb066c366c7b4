"""The mean over runs that answered the same questions, and how exact it is.

Letters at the end of names: r run, c training seed, g question (of a loss: data row).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Crossed:
    """Values in cells of runs and questions: float64 [r, g], no row and no column without a value.

    A question is the same for all runs, so runs and questions are crossed, not nested. Runs of one seed share their
    luck: they stand together in ``seed_r`` (int64 [r], numbers from 0).
    """

    sums_rg: np.ndarray  # sum of the values in the cell
    weights_rg: np.ndarray  # their number (of a loss: tokens), 0 for none
    seed_r: np.ndarray
    num_values: int

    @classmethod
    def of(
        cls, sums_rg: np.ndarray, weights_rg: np.ndarray, seeds: Sequence[Hashable], num_values: int | None = None
    ) -> Crossed:
        """From cells with gaps: rows and columns without a value go. ``num_values`` not given: the sum of weights."""
        rows, columns = np.flatnonzero((weights_rg > 0).any(axis=1)), np.flatnonzero((weights_rg > 0).any(axis=0))
        kept = np.ix_(rows, columns)
        number_of: dict[Hashable, int] = {}
        numbers = [number_of.setdefault(seeds[row], len(number_of)) for row in rows.tolist()]
        count = int(weights_rg.sum()) if num_values is None else num_values
        return cls(sums_rg[kept], weights_rg[kept], np.array(numbers, dtype=np.int64), count)

    @property
    def num_runs(self) -> int:
        return self.sums_rg.shape[0]

    @property
    def num_questions(self) -> int:
        return self.sums_rg.shape[1]

    @property
    def num_seeds(self) -> int:
        return int(self.seed_r.max()) + 1 if self.num_runs else 0


@dataclass(frozen=True)
class Spread:
    """A mean with its squared standard error and the degrees of freedom of that; NaN where there is too little."""

    mean: float
    variance: float
    degrees_of_freedom: float


def spread(table: Crossed) -> Spread:
    """The mean over runs of the mean of each, every run weighing the same, and how exact it is.

    With weights n_rg, run means m_r = sum_g y_rg / sum_g n_rg and their mean m, a cell's share of the mean is
    a_rg = n_rg / (R sum_g n_rg), its residual e_rg = a_rg (y_rg / n_rg - m), and what is left of it without run and
    question is d_rg = a_rg (y_rg / n_rg - m_r - m_g + m), where m_g is the mean of question g weighted by a_rg. Then,
    for C seeds and G questions,

        V_seeds     = C/(C-1)          sum_c (sum_{r in c, g} e_rg)^2
        V_questions =          G/(G-1) sum_g (sum_r e_rg)^2
        V_cells     = C/(C-1)  G/(G-1) sum_c,g (sum_{r in c} d_rg)^2
        V = V_seeds + V_questions - V_cells, at least the largest of the three

    V_seeds and V_questions both hold the noise of the cells, hence the subtraction: with a full table this is the
    unbiased estimate of var(seed)/C + var(question)/G + var(cell)/(C G) of a two-way analysis of variance with random
    rows and columns, (MS_seeds + MS_questions - MS_cells) / (C G). In expectation none of the three is above V, so the
    floor only keeps luck from giving a variance that is too small, or negative. Degrees of freedom are Satterthwaite's,
    V^2 / (V_seeds^2/(C-1) + V_questions^2/(G-1) + V_cells^2/((C-1)(G-1))).

    With one seed V is V_questions alone with G - 1 degrees of freedom: how seeds differ is unknown. With fewer than two
    questions it is NaN: one question says nothing about how questions differ.
    """
    if not table.num_runs:
        return Spread(math.nan, math.nan, math.nan)
    totals_r1 = table.weights_rg.sum(axis=1, keepdims=True)
    mean_r1 = table.sums_rg.sum(axis=1, keepdims=True) / totals_r1
    mean = float(mean_r1.mean())
    seeds, questions = table.num_seeds, table.num_questions
    if questions < 2:
        return Spread(mean, math.nan, math.nan)
    parts_rg = table.sums_rg / (table.num_runs * totals_r1)
    shares_rg = table.weights_rg / (table.num_runs * totals_r1)
    residuals_rg = parts_rg - mean * shares_rg
    small_g, small_c = questions / (questions - 1), seeds / (seeds - 1) if seeds > 1 else math.nan
    by_question = small_g * float(np.square(residuals_rg.sum(axis=0)).sum())
    if seeds < 2:
        return Spread(mean, by_question, questions - 1)
    mean_g = parts_rg.sum(axis=0) / shares_rg.sum(axis=0)
    cells_rg = parts_rg - shares_rg * (mean_r1 + mean_g - mean)
    by_seed = small_c * float(np.square(np.bincount(table.seed_r, weights=residuals_rg.sum(axis=1))).sum())
    cells_cg = np.zeros((seeds, questions))
    np.add.at(cells_cg, table.seed_r, cells_rg)
    by_cell = small_c * small_g * float(np.square(cells_cg).sum())
    variance = max(by_seed + by_question - by_cell, by_seed, by_question, by_cell)
    uncertainty = by_seed**2 / (seeds - 1) + by_question**2 / (questions - 1)
    uncertainty += by_cell**2 / ((seeds - 1) * (questions - 1))
    return Spread(mean, variance, variance**2 / uncertainty if uncertainty else math.nan)
