"""Means and their errors against formulas written out, plain statistics, and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from analysis.statistics import clustered_mean, difference, ratio


def test_the_clustered_error_is_the_formula_by_hand() -> None:
    # mean 3; residuals a: -2, -1; b: 0, 3; cluster sums -3 and 3; sqrt(2/1 * 18) / 4 = 1.5
    estimate = clustered_mean([1, 2, 3, 6], ["a", "a", "b", "b"])
    assert (estimate.mean, estimate.standard_error) == (3.0, pytest.approx(1.5, abs=1e-15))
    assert (estimate.num_values, estimate.num_clusters) == (4, 2)


def test_unequal_clusters_weigh_by_their_values() -> None:
    # mean 3; residuals a: -2; b: -1, 3; cluster sums -2 and 2; sqrt(2 * 8) / 3
    estimate = clustered_mean([1, 2, 6], ["a", "b", "b"])
    assert estimate.mean == 3.0
    assert estimate.standard_error == pytest.approx(4 / 3, abs=1e-15)


def test_one_value_in_each_cluster_is_the_plain_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=17)
    estimate = clustered_mean(values.tolist(), range(17))
    assert estimate.standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(17), rel=1e-12)


def test_equal_clusters_are_the_plain_standard_error_of_their_means() -> None:
    values_gk = np.random.default_rng(1).normal(size=(9, 4)) + np.random.default_rng(2).normal(size=(9, 1))
    order = np.random.default_rng(3).permutation(36)
    estimate = clustered_mean(values_gk.ravel()[order].tolist(), np.repeat(np.arange(9), 4)[order].tolist())
    assert estimate.mean == pytest.approx(values_gk.mean(), rel=1e-12)
    assert estimate.standard_error == pytest.approx(values_gk.mean(1).std(ddof=1) / 3, rel=1e-12)


def test_answers_that_repeat_their_question_add_no_certainty() -> None:
    once = clustered_mean([0, 1, 1, 0, 1], "abcde")
    thrice = clustered_mean([0, 1, 1, 0, 1] * 3, "abcde" * 3)
    assert thrice.standard_error == pytest.approx(once.standard_error, rel=1e-12)
    assert clustered_mean([0, 1, 1, 0, 1] * 3, range(15)).standard_error < 0.6 * once.standard_error


def test_the_clustered_error_is_the_spread_of_the_mean() -> None:
    rng = np.random.default_rng(0)
    drawn = [(rng.normal(size=(30, 1)) + rng.normal(size=(30, 3))).ravel().tolist() for _ in range(2000)]
    clusters = np.repeat(np.arange(30), 3).tolist()
    estimates = [clustered_mean(values, clusters) for values in drawn]
    spread = np.std([estimate.mean for estimate in estimates])
    assert np.mean([estimate.standard_error**2 for estimate in estimates]) == pytest.approx(spread**2, rel=0.1)


def test_too_little_has_no_error_and_nothing_has_no_mean() -> None:
    one = clustered_mean([1, 2], ["a", "a"])
    assert one.mean == 1.5
    assert math.isnan(one.standard_error)
    nothing = clustered_mean([], [])
    assert math.isnan(nothing.mean)
    assert math.isnan(nothing.standard_error)
    assert (nothing.num_values, nothing.num_clusters) == (0, 0)
    assert math.isnan(ratio([], []).mean)
    assert ratio([3], [2]).mean == 1.5
    assert math.isnan(ratio([3], [2]).standard_error)


def test_what_is_no_value_is_refused() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite"):
            clustered_mean([1, bad], ["a", "b"])
        with pytest.raises(ValueError, match="not finite"):
            difference({"a": [bad]}, {"a": [1]})
    with pytest.raises(ValueError, match="2 values but 1 clusters"):
        clustered_mean([1, 2], ["a"])
    with pytest.raises(ValueError, match="1 numerators but 2 denominators"):
        ratio([1], [1, 2])
    with pytest.raises(ValueError, match="must be positive"):
        ratio([1, 2], [1, 0])


def test_the_ratio_is_the_mean_over_tokens_clustered_by_row() -> None:
    losses = [[1.0, 2.0], [3.0], [0.5, 0.25, 2.0]]
    estimate = ratio([sum(row) for row in losses], [len(row) for row in losses])
    tokens = [loss for row in losses for loss in row]
    reference = clustered_mean(tokens, [0, 0, 1, 2, 2, 2])
    assert estimate.mean == pytest.approx(reference.mean, rel=1e-12)
    assert estimate.standard_error == pytest.approx(reference.standard_error, rel=1e-12)
    assert (estimate.num_values, estimate.num_clusters) == (3, 3)


def test_a_difference_is_paired_by_question() -> None:
    a: dict[str, list[float]] = {"easy": [1, 1], "hard": [0.5, 0.5], "middle": [0.75, 0.75], "only a": [100]}
    b: dict[str, list[float]] = {
        "hard": [0.25, 0.25],
        "easy": [0.5, 0.5],
        "middle": [0.5, 0.5],
        "only b": [100],
        "none": [],
    }
    estimate = difference(a, b)
    differences = np.array([0.5, 0.25, 0.25])
    assert estimate.mean == pytest.approx(differences.mean())
    assert estimate.standard_error == pytest.approx(differences.std(ddof=1) / math.sqrt(3))
    assert (estimate.num_values, estimate.num_clusters) == (12, 3)
    assert difference(b, a).mean == -estimate.mean


def test_in_a_difference_every_question_weighs_the_same() -> None:
    a, b = {"x": [1.0, 1.0, 1.0, 1.0], "y": [0.0]}, {"x": [0.0], "y": [0.0, 0.0]}
    estimate = difference(a, b)
    assert estimate.mean == 0.5
    assert estimate.num_values == 8


def test_a_difference_without_shared_questions_is_nothing() -> None:
    none: list[float] = []
    estimate = difference({"x": [1.0], "y": none}, {"y": [1.0]})
    assert math.isnan(estimate.mean)
    assert (estimate.num_values, estimate.num_clusters) == (0, 0)
    alone = difference({"x": [1]}, {"x": [0]})
    assert alone.mean == 1.0
    assert math.isnan(alone.standard_error)
