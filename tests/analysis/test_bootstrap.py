"""Intervals: fixed draws, the same bits whatever stands beside, and what is said where nothing differs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis.bootstrap import NUM_RESAMPLES, Bounds, intervals, resampled_counts
from analysis.crossed import Crossed, spread
from analysis.statistics import clustered_mean, difference, ratio

RATE: Bounds = (0.0, 1.0)
FIRST_DRAWS = [[0.0, 1.0, 0.0, 1.0, 3.0], [3.0, 0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 2.0, 3.0]]


def interval(table: Crossed, bounds: Bounds | None = None) -> tuple[float, float]:
    return intervals([table], [spread(table)], [bounds])[0]


def one_run(values: np.ndarray, weights: np.ndarray | None = None) -> Crossed:
    weights = np.ones(len(values)) if weights is None else weights
    return Crossed.of((values * weights)[None], weights[None], [0])


def random_table(rng: np.random.Generator, num_questions: int) -> Crossed:
    """One to three runs with gaps."""
    runs = int(rng.integers(1, 4))
    weights = rng.integers(0, 3, (runs, num_questions)).astype(float)
    weights[:, 0] = weights[0, :] = 1.0
    return Crossed.of(rng.normal(size=weights.shape) * weights, weights, range(runs))


def test_draws_depend_on_the_count_alone_and_are_fixed() -> None:
    # numpy promises that the words of Philox stay what they are
    assert resampled_counts(5, 1)[:3].tolist() == FIRST_DRAWS
    for count in (2, 7, 48):
        counts = resampled_counts(count, 1)
        assert counts.shape == (NUM_RESAMPLES, count)
        assert (counts.sum(axis=1) == count).all()
        # each is drawn binomially, once on average: five standard deviations of the mean
        assert np.abs(counts.mean(axis=0) - 1).max() < 5 / math.sqrt(NUM_RESAMPLES)
    assert not np.array_equal(resampled_counts(7, 1), resampled_counts(7, 2))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_an_interval_has_the_same_bits_whatever_is_in_the_table_beside_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tables = [random_table(rng, int(rng.choice([3, 6]))) for _ in range(40)]
    spreads = [spread(table) for table in tables]
    order = rng.permutation(40).tolist()
    together = intervals([tables[i] for i in order], [spreads[i] for i in order], [None] * 40)
    assert together == [interval(tables[i]) for i in order]


def test_many_tables_are_done_in_parts() -> None:
    rng = np.random.default_rng(0)
    tables = [random_table(rng, 4) for _ in range(400)]
    spreads = [spread(table) for table in tables]
    assert intervals(tables, spreads, [None] * 400) == [interval(table) for table in tables]


def test_the_width_is_that_of_student_and_the_skewness_that_of_the_bootstrap() -> None:
    rng = np.random.default_rng(0)
    normal = rng.normal(size=12)
    low, high = interval(one_run(normal))
    error = normal.std(ddof=1) / math.sqrt(12)
    t_low, t_high = stats.t.interval(0.95, 11, normal.mean(), error)
    # percentiles of 2000 resamples lie within some hundredths of a standard error of where they should
    assert (low, high) == pytest.approx((t_low, t_high), abs=0.25 * error)
    skewed = rng.lognormal(0, 1.5, 15)
    low, high = interval(one_run(skewed))
    mean = skewed.mean()
    resampled = skewed[rng.integers(0, 15, (20_000, 15))].mean(axis=1)
    plain_low, plain_high = np.quantile(resampled, [0.025, 0.975])
    skewness = (plain_high - mean) / (mean - plain_low)
    assert skewness > 1.2
    # the luck of an end is 0.06 of its distance of 2 standard errors, twice in a ratio
    assert (high - mean) / (mean - low) == pytest.approx(skewness, rel=0.08)
    stretch = stats.t.ppf(0.975, 14) * skewed.std(ddof=1) / math.sqrt(15) / (1.96 * resampled.std())
    assert high - low == pytest.approx(stretch * (plain_high - plain_low), rel=0.05)


def test_with_many_questions_it_is_the_percentile_bootstrap_of_scipy() -> None:
    rng = np.random.default_rng(0)
    values, weights = rng.lognormal(0, 1, 400), rng.integers(1, 9, 400).astype(float)

    def mean(values: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
        return (values * weights).sum(axis=axis) / weights.sum(axis=axis)

    reference = stats.bootstrap(
        (values, weights), mean, paired=True, vectorized=True, method="percentile", n_resamples=5000, rng=rng
    )
    table = one_run(values, weights)
    error = math.sqrt(spread(table).variance)
    ends = (reference.confidence_interval.low, reference.confidence_interval.high)
    # the luck of 2000 resamples is 0.06 standard errors at each end, that of 5000 another 0.04
    assert interval(table) == pytest.approx(ends, abs=0.25 * error)
    assert reference.standard_error == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize("num_questions", [2, 8, 48])
def test_none_of_n_questions_has_the_exact_bound(num_questions: int) -> None:
    exact = stats.binomtest(0, num_questions).proportion_ci(0.95, method="exact")
    assert interval(one_run(np.zeros(num_questions)), RATE) == pytest.approx((exact.low, exact.high))
    full = stats.binomtest(num_questions, num_questions).proportion_ci(0.95, method="exact")
    assert interval(one_run(np.ones(num_questions)), RATE) == pytest.approx((full.low, full.high))
    # answers to one question and further seeds are no further questions
    many = Crossed.of(np.zeros((3, num_questions)), np.full((3, num_questions), 10.0), [0, 1, 2])
    assert interval(many, RATE) == pytest.approx((exact.low, exact.high))


def test_questions_that_are_all_alike_have_no_interval_of_no_width() -> None:
    low, high = interval(one_run(np.full(4, 0.5)), RATE)
    assert (low, high) == pytest.approx((0.5 * 0.025**0.25, 1 - 0.5 * 0.025**0.25))
    low, high = interval(one_run(np.zeros(48)), (-1.0, 1.0))
    assert (low, high) == pytest.approx((-(1 - 0.025 ** (1 / 48)), 1 - 0.025 ** (1 / 48)))
    # on a scale that nobody has told there is no bound
    assert all(math.isnan(end) for end in interval(one_run(np.full(4, 70.0))))


def test_cells_that_cancel_in_every_question_are_questions_that_are_all_alike() -> None:
    # two runs of one seed: 1 and 0, 0 and 1; every resample of questions has the mean 0.5
    table = Crossed.of(np.array([[1.0, 0.0], [0.0, 1.0]]), np.ones((2, 2)), [0, 0])
    assert interval(table, RATE) == interval(one_run(np.full(2, 0.5)), RATE)


def test_values_that_differ_by_rounding_alone_are_alike() -> None:
    values = np.full(6, 0.1) * (1 + 1e-15 * np.arange(6))
    assert interval(one_run(values), RATE) == pytest.approx(interval(one_run(np.full(6, 0.1)), RATE))


def test_a_rate_holds_wilsons_interval_and_ends_at_its_bounds() -> None:
    values = np.zeros(30)
    values[:2] = 1.0
    low, high = interval(one_run(values), RATE)
    assert low >= 0
    # Wilson's of 29 answers (the variance of a sample of 30 is that of 29) with t in place of 1.96: the end p solves
    # |p - m| = t sqrt(p (1 - p) / 29)
    mean, t = 2 / 30, stats.t.ppf(0.975, 29)
    assert high >= mean
    assert high - mean >= t * math.sqrt(high * (1 - high) / 29) - 1e-12
    unbounded = interval(one_run(values))
    assert unbounded[0] < 0
    assert unbounded[1] < high


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=3), min_size=2, max_size=9))
def test_every_rate_has_an_interval_that_holds_it_inside_0_and_1(questions: list[list[float]]) -> None:
    values = [value for answers in questions for value in answers]
    clusters = [number for number, answers in enumerate(questions) for _ in answers]
    found = clustered_mean(values, clusters, RATE)
    assert 0 <= found.low <= found.mean <= found.high <= 1
    assert found.high - found.low > 0.05
    mirrored = clustered_mean([1 - value for value in values], clusters, RATE)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((found.low, found.high), abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=9), st.floats(-1000, 1000), st.floats(0.01, 100))
def test_an_interval_moves_and_grows_with_its_values(values: list[float], shift: float, scale: float) -> None:
    found = clustered_mean(values, range(len(values)))
    moved = clustered_mean([scale * value + shift for value in values], range(len(values)))
    if np.ptp(values) > 1e-3:
        ends = (scale * found.low + shift, scale * found.high + shift)
        assert (moved.low, moved.high) == pytest.approx(ends, rel=1e-6, abs=1e-6)


def test_one_question_and_nothing_have_no_interval() -> None:
    for found in (clustered_mean([1.0, 0.0], ["q", "q"], RATE), clustered_mean([], []), ratio([3.0], [2.0])):
        assert math.isnan(found.low)
        assert math.isnan(found.high)


def test_statistics_carry_their_intervals() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.random((10, 2)) for _ in range(2))
    paired = difference({str(q): a[q].tolist() for q in range(10)}, {str(q): b[q].tolist() for q in range(10)})
    assert (paired.low, paired.high) == interval(one_run(a.mean(axis=1) - b.mean(axis=1)))
    tokens = np.arange(1.0, 11.0)
    loss = ratio((a[:, 0] * tokens).tolist(), tokens.tolist())
    assert (loss.low, loss.high) == interval(one_run(a[:, 0], tokens))


def test_a_resample_without_any_answer_of_a_run_uses_the_others() -> None:
    # run 1 has one question: most resamples of questions do not hold it
    weights = np.ones((2, 6))
    weights[1, 1:] = 0
    low, high = interval(Crossed.of(weights * np.arange(6.0), weights, [0, 1]))
    assert math.isfinite(low)
    assert low < high
