"""Predictions from tables, and how well they held, against scipy and by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.predictions import auc, held, prediction_rows

GRADIENTS = pd.DataFrame(
    [
        (row, condition, layer, vector, value * (1 if vector == "evil" else -5) + 0.01 * layer)
        for condition, values in {"none": (-0.2, -0.1, -0.3), "pps": (0.1, -0.05, 0.2), "ip": (-0.1, 0.0, -0.2)}.items()
        for row, value in enumerate(values)
        for layer in (2, 1)
        for vector in ("evil", "other")
    ],
    columns=["row", "condition", "layer", "vector", "cosine"],
)
LOSSES = pd.DataFrame(
    [
        (row, condition, loss + row)
        for condition, loss in {"none": 2.0, "pps": 2.5, "ip": 1.5}.items()
        for row in range(3)
    ],
    columns=["row", "condition", "loss_mean"],
)


def test_shift_gap_and_flips_are_means_over_rows() -> None:
    found = {
        (row.condition, row.layer): row for row in prediction_rows(GRADIENTS, LOSSES, trait="evil", measure_id="m")
    }
    assert set(found) == {("pps", 1), ("pps", 2), ("ip", 1), ("ip", 2)}
    pps = found["pps", 2]
    shifts = [0.3, 0.05, 0.5]
    assert (pps.vector, pps.num_rows, pps.projection_difference) == ("evil", 3, None)
    assert pps.cosine_without == pytest.approx(-0.2 + 0.02)
    assert pps.cosine_with == pytest.approx(0.25 / 3 + 0.02)
    assert pps.shift == pytest.approx(np.mean(shifts))
    assert pps.shift_error == pytest.approx(np.std(shifts, ddof=1) / math.sqrt(3))
    assert pps.flipped_share == pytest.approx(2 / 3)
    assert (pps.loss_without, pps.loss_with, pps.loss_gap) == pytest.approx((3.0, 3.5, -0.5))
    assert found["ip", 1].loss_gap == pytest.approx(0.5)


def test_only_rows_with_both_cosines_are_compared() -> None:
    gone = (GRADIENTS["row"] == 2) & (GRADIENTS["condition"] == "pps")
    some = GRADIENTS.assign(cosine=GRADIENTS["cosine"].mask(gone))
    found = {(row.condition, row.layer): row for row in prediction_rows(some, LOSSES, trait="evil", measure_id="m")}
    pps, ip = found["pps", 1], found["ip", 1]
    assert (pps.num_rows, ip.num_rows) == (2, 3)
    assert pps.shift == pytest.approx(np.mean([0.3, 0.05]))
    assert pps.loss_without == pytest.approx(2.5), "over the same rows"


def test_the_projection_difference_is_that_of_the_candidates_vector_where_it_is_added() -> None:
    differences = pd.DataFrame(
        [(0, 2, "evil", 1.0), (1, 2, "evil", 3.0), (0, 1, "evil", 70.0), (0, 2, "other", 80.0)],
        columns=["row", "layer", "vector", "difference"],
    )
    rows = prediction_rows(
        GRADIENTS, LOSSES, trait="evil", measure_id="m", places={"pps": ("evil", 2)}, differences=differences
    )
    assert {(row.condition, row.projection_difference) for row in rows} == {("pps", 2.0), ("ip", None)}


def test_what_was_not_measured_is_said() -> None:
    with pytest.raises(ValueError, match="vector 'kind'"):
        list(prediction_rows(GRADIENTS, LOSSES, trait="kind", measure_id="m"))
    with pytest.raises(ValueError, match="condition 'base'"):
        list(prediction_rows(GRADIENTS, LOSSES, trait="evil", measure_id="m", reference="base"))


@pytest.mark.parametrize("count", [5, 7, 20])
def test_correlations_and_their_p_values_equal_scipys(count: int) -> None:
    draw = np.random.default_rng(count)
    x = draw.normal(size=count)
    y = x + draw.normal(size=count)
    found = held(x.tolist(), y.tolist())
    assert found.num_candidates == count
    assert found.rank_correlation == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.pooled_r == pytest.approx(stats.pearsonr(x, y).statistic)
    assert found.rank_low <= found.rank_correlation <= found.rank_high
    assert found.pooled_low <= found.pooled_r <= found.pooled_high
    if count <= 7:
        orders = [stats.spearmanr(x, y[list(order)]).statistic for order in itertools.permutations(range(count))]
        assert found.rank_p == pytest.approx(np.mean(np.abs(orders) >= abs(found.rank_correlation) - 1e-12))
    else:
        expected = stats.permutation_test(
            (x,), lambda one: stats.spearmanr(one, y).statistic, permutation_type="pairings", n_resamples=5000, rng=0
        ).pvalue
        # both are estimates from thousands of orders: their errors are below 0.005 each
        assert found.rank_p == pytest.approx(expected, abs=0.02)


def test_equal_data_gives_equal_numbers() -> None:
    x, y = [0.1, 0.4, 0.3, 0.9, 0.5], [1.0, 2.0, 1.5, 3.0, 1.0]
    assert held(x, y, [False, True, False, True, True]) == held(x, y, [False, True, False, True, True])


def test_the_area_under_the_curve_counts_pairs() -> None:
    assert auc([3, 2, 1], [True, True, False]) == 1
    assert auc([1, 2, 3], [True, True, False]) == 0
    assert auc([1, 1, 1], [True, False, False]) == 0.5
    assert auc([1, 2, 2, 4], [False, True, False, True]) == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert math.isnan(auc([1, 2], [True, True]))
    assert held([1, 2, 3, 4], [1, 2, 3, 4], [False, False, True, True]).auc == 1


def test_too_little_to_say_is_not_a_number() -> None:
    few = held([1, 2], [1, 2])
    assert math.isnan(few.rank_correlation)
    assert math.isnan(few.rank_p)
    flat = held([1, 1, 1, 1], [1, 2, 3, 4])
    assert math.isnan(flat.pooled_r)
    assert math.isnan(flat.rank_low)
    with pytest.raises(ValueError, match="finite"):
        held([1, math.nan, 2], [1, 2, 3])
