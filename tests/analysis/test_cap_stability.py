"""Ceilings over draws of their reference, against closed forms for normal projections."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist
from typing import Any

import pytest
import torch

from analysis.cap_stability import stability_rows
from analysis.measured_rows import CapStabilityRow
from trainables.interventions.base import Bound
from trainables.randomness import generator

MEAN, SIGMA, LENGTH = 3.0, 2.0, 4.0
NORMAL = NormalDist()
# 200 rows of 200 tokens: a share over 20,000 held-out tokens has an error of at most 0.0035, and a percentile of 20,000
# calibration tokens one of 0.04 sigma at the 95th; 50 draws share most tokens. Five errors are allowed.
TOLERANCE = 0.02


def projections(num_rows: int = 200) -> list[torch.Tensor]:
    draws = generator("test of cap stability")
    return [MEAN + SIGMA * torch.randn(200, generator=draws) for _ in range(num_rows)]


def found(values: list[torch.Tensor], **changes: Any) -> list[CapStabilityRow]:
    settings: dict[str, Any] = {
        "calibration_rows": [100],
        "shifts": [0.0],
        "strengths": [1.0],
        "draws": 50,
        "measure_id": "m",
        "vector": "v",
        "layer": 1,
    }
    return list(stability_rows(values, LENGTH, changes.pop("ceiling", Bound(percentile=95)), **settings | changes))


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("strength", [0.5, 2.0])
@pytest.mark.parametrize("ceiling", [Bound(percentile=95), Bound(percentile=90, stretch=2.0)])
def test_shares_of_normal_projections(shift: float, strength: float, ceiling: Bound) -> None:
    (row,) = found(projections(), shifts=[shift], strengths=[strength], ceiling=ceiling)
    at = ceiling.stretch * NORMAL.inv_cdf(ceiling.percentile / 100)  # in standard deviations from the median
    wide = math.sqrt(1 + shift**2)
    kept = NORMAL.cdf(at / wide)
    caught = 1 - NORMAL.cdf((at - strength * LENGTH / SIGMA) / wide)
    assert row.ceiling == pytest.approx(MEAN + at * SIGMA, abs=5 * 0.04 * SIGMA)
    assert row.reference_sd == pytest.approx(SIGMA, rel=0.02)
    assert (row.kept, row.caught) == pytest.approx((kept, caught), abs=TOLERANCE)
    assert row.f1 == pytest.approx(2 * kept * caught / (kept + caught), abs=TOLERANCE)
    assert row.f1_low <= row.f1 <= row.f1_high


def test_a_ceiling_varies_less_the_more_rows_it_is_calibrated_on() -> None:
    spread = [row.ceiling_sd for row in found(projections(), calibration_rows=[1, 4, 16, 64])]
    assert all(one is not None for one in spread)
    ratios = [one / other for one, other in itertools.pairwise(spread) if one and other]
    # as 1 / sqrt(rows): 2 each; a standard deviation of 50 draws has an error of 10 %, their ratio one of 15 %
    assert ratios == pytest.approx([2, 2, 2], rel=0.5)


def test_settings_share_their_draws_and_come_in_order() -> None:
    values = projections(12)
    rows = found(values, calibration_rows=[2, 5], shifts=[0.0, 1.0], strengths=[1.0, 2.0], draws=3)
    assert [(row.num_rows, row.shift, row.strength) for row in rows] == [
        (n, shift, strength) for n in (2, 5) for shift in (0.0, 1.0) for strength in (1.0, 2.0)
    ]
    assert found(values, calibration_rows=[5], shifts=[1.0], strengths=[2.0], draws=3) == rows[-1:]
    assert {row.ceiling for row in rows if row.num_rows == 5} == {rows[-1].ceiling}


def test_one_draw_has_no_spread() -> None:
    (row,) = found(projections(4), calibration_rows=[3], draws=1)
    assert row.ceiling_sd is None
    assert row.f1_low == row.f1 == row.f1_high
