"""The mean over crossed runs and questions: against loops, against an analysis of variance, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.crossed import Crossed, Spread, spread
from analysis.statistics import clustered_mean

# plain sums of a few hundred terms; nothing in the formulas cancels
ROUNDING = 1e-12


def full(values_rg: np.ndarray, seeds: list[int] | None = None, count: int = 1) -> Crossed:
    """A table without gaps of means of ``count`` answers each."""
    labels = list(range(len(values_rg))) if seeds is None else seeds
    return Crossed.of(values_rg * count, np.full(values_rg.shape, float(count)), labels)


def by_loops(table: Crossed) -> Spread:
    """The formulas of the docstring, written out cell by cell."""
    y, n, runs, questions = table.sums_rg, table.weights_rg, range(table.num_runs), range(table.num_questions)
    seeds = range(table.num_seeds)
    total = [sum(n[r, g] for g in questions) for r in runs]
    means = [sum(y[r, g] for g in questions) / total[r] for r in runs]
    mean = sum(means) / len(means)
    a = {(r, g): n[r, g] / (len(means) * total[r]) for r in runs for g in questions}
    cell = {(r, g): y[r, g] / n[r, g] if n[r, g] else 0.0 for r in runs for g in questions}
    of_question = [sum(a[r, g] * cell[r, g] for r in runs) / sum(a[r, g] for r in runs) for g in questions]
    e = {key: a[key] * (cell[key] - mean) for key in a}
    d = {(r, g): a[r, g] * (cell[r, g] - means[r] - of_question[g] + mean) for r, g in a}
    of_seed = [[r for r in runs if table.seed_r[r] == c] for c in seeds]
    c_factor, g_factor = len(seeds) / (len(seeds) - 1), len(questions) / (len(questions) - 1)
    v_seeds = c_factor * sum(sum(e[r, g] for r in of_seed[c] for g in questions) ** 2 for c in seeds)
    v_questions = g_factor * sum(sum(e[r, g] for r in runs) ** 2 for g in questions)
    v_cells = c_factor * g_factor * sum(sum(d[r, g] for r in of_seed[c]) ** 2 for c in seeds for g in questions)
    variance = max(v_seeds + v_questions - v_cells, v_seeds, v_questions, v_cells)
    c1, g1 = len(seeds) - 1, len(questions) - 1
    return Spread(mean, variance, variance**2 / (v_seeds**2 / c1 + v_questions**2 / g1 + v_cells**2 / (c1 * g1)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(2, 6))
def test_the_formulas_by_loops_with_gaps_and_runs_that_share_a_seed(seed: int, runs: int, questions: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 4, (runs, questions)).astype(float)
    weights[:, 0] = weights[0, :] = 1.0  # no empty row or column
    table = Crossed.of(rng.normal(size=weights.shape) * weights, weights, [0, *rng.integers(1, 3, runs - 1).tolist()])
    found, expected = spread(table), by_loops(table)
    assert found.mean == pytest.approx(expected.mean, rel=ROUNDING, abs=ROUNDING)
    assert found.variance == pytest.approx(expected.variance, rel=1e-9)
    assert found.degrees_of_freedom == pytest.approx(expected.degrees_of_freedom, rel=1e-8)


def test_a_full_table_is_the_two_way_analysis_of_variance() -> None:
    y = np.random.default_rng(4).normal(size=(3, 7)) + np.arange(3)[:, None] + np.arange(7)
    mean_r, mean_g, mean = y.mean(axis=1), y.mean(axis=0), y.mean()
    ms_r = 7 * ((mean_r - mean) ** 2).sum() / 2
    ms_g = 3 * ((mean_g - mean) ** 2).sum() / 6
    ms_rg = ((y - mean_r[:, None] - mean_g + mean) ** 2).sum() / 12
    found = spread(full(y, count=5))
    assert found.mean == pytest.approx(mean)
    assert found.variance == pytest.approx((ms_r + ms_g - ms_rg) / 21, rel=ROUNDING)
    df = (ms_r + ms_g - ms_rg) ** 2 / (ms_r**2 / 2 + ms_g**2 / 6 + ms_rg**2 / 12)
    assert found.degrees_of_freedom == pytest.approx(df, rel=ROUNDING)


@pytest.mark.parametrize("components", [(1.0, 1.0, 1.0), (0.5, 1.0, 0.5), (1.0, 0.2, 0.5)])
@pytest.mark.parametrize("num_seeds", [2, 3, 8])
def test_the_variance_is_that_of_the_mean_when_all_components_are_known(
    num_seeds: int, components: tuple[float, float, float]
) -> None:
    of_seed, of_question, of_cell = components
    rng, shape = np.random.default_rng(0), (num_seeds, 20)
    found = [
        spread(
            full(
                of_seed * rng.normal(size=(num_seeds, 1))
                + of_question * rng.normal(size=(1, 20))
                + of_cell * rng.normal(size=shape)
            )
        ).variance
        for _ in range(3000)
    ]
    true = of_seed**2 / num_seeds + of_question**2 / 20 + of_cell**2 / (20 * num_seeds)
    # with 2 seeds the estimate's relative standard deviation is about 1.4, of 3000 means 0.026; four of those.
    # Questions alone, as for one run, would give (of_question^2 + of_cell^2) / 20, a fifth of it and less
    assert np.mean(found) == pytest.approx(true, rel=0.1)


def test_seeds_that_do_not_differ_take_nothing_from_the_questions_part() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        y = rng.normal(size=(3, 10))
        found = spread(full(y)).variance
        assert found >= np.var(y.mean(axis=0), ddof=1) / 10 - ROUNDING
        assert found >= np.var(y.mean(axis=1), ddof=1) / 3 - ROUNDING


def test_one_seed_has_the_error_of_the_questions_alone() -> None:
    y = np.random.default_rng(0).normal(size=(1, 9))
    found = spread(full(y))
    reference = clustered_mean(y[0].tolist(), range(9))
    assert math.sqrt(found.variance) == pytest.approx(reference.standard_error, rel=ROUNDING)
    assert found.degrees_of_freedom == 8
    twice = spread(full(np.concatenate([y, y + 1]), seeds=[5, 5]))
    assert twice.mean == pytest.approx(found.mean + 0.5)
    assert twice.variance == pytest.approx(found.variance, rel=ROUNDING)


def test_a_setting_that_every_seed_has_all_values_of_is_no_luck() -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(size=(3, 1)) + rng.normal(size=(3, 12))
    both = full(np.concatenate([y, y + 100.0]), seeds=[0, 1, 2, 0, 1, 2])
    # values near 100 leave about 1e-12 of their squares
    assert spread(both).variance == pytest.approx(spread(full(y)).variance, rel=1e-9)
    as_luck = full(np.concatenate([y, y + 100.0]), seeds=list(range(6)))
    assert spread(as_luck).variance > 100


def test_rows_and_columns_without_a_value_are_not_there() -> None:
    weights = np.array([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
    table = Crossed.of(weights * 3, weights, ["a", "b", "c"])
    assert (table.num_runs, table.num_questions, table.num_seeds, table.num_values) == (2, 2, 2, 5)
    found = spread(table)
    assert (found.mean, found.variance) == (3.0, 0.0)


def test_too_little_is_nan() -> None:
    nothing = spread(Crossed.of(np.zeros((2, 3)), np.zeros((2, 3)), [0, 1]))
    assert all(math.isnan(value) for value in (nothing.mean, nothing.variance))
    one_question = spread(full(np.array([[1.0], [2.0]])))
    assert one_question.mean == 1.5
    assert math.isnan(one_question.variance)
