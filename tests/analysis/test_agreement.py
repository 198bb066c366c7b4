"""Agreement of judges: known values, ties, orientation of pairs, and what is left out."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from analysis.agreement import agreement_rows, auc, compared, frame_of, kappa, spearman
from analysis.tables import columns_of


def bools(text: str) -> np.ndarray:
    return np.array([letter == "1" for letter in text])


def test_auc_is_the_share_of_pairs_that_are_ranked_rightly() -> None:
    draw = np.random.default_rng(3)
    shown, scores = draw.random(40) < 0.4, draw.integers(0, 6, 40).astype(float)  # many ties
    pairs = list(itertools.product(scores[shown], scores[~shown]))
    expected = np.mean([1.0 if one > other else 0.5 if one == other else 0.0 for one, other in pairs])
    assert auc(shown, scores) == pytest.approx(expected, abs=1e-12)
    assert auc(shown, -scores) == pytest.approx(1 - expected, abs=1e-12)
    assert auc(bools("111"), np.arange(3.0)) is None
    assert auc(bools("01"), np.array([7.0, 7.0])) == 0.5


def test_kappa_of_a_known_table() -> None:
    """Cohen's own kind of table: 20 both yes, 5 and 10 one yes, 15 both no: p_o .7, p_e .5, kappa .4."""
    one = bools("1" * 25 + "0" * 25)
    other = bools("1" * 20 + "0" * 5 + "1" * 10 + "0" * 15)
    assert kappa(one, other) == pytest.approx(0.4)
    assert kappa(one, one) == 1.0
    assert kappa(bools("11"), bools("11")) is None, "both say always the same"
    assert kappa(bools("1100"), bools("1010")) == 0.0


def test_spearman_is_one_for_any_rising_relation() -> None:
    one = np.array([1.0, 5.0, 2.0, 9.0])
    assert spearman(one, one**3) == pytest.approx(1.0)
    assert spearman(one, -one) == pytest.approx(-1.0)
    assert spearman(one, np.ones(4)) is None


def test_the_interval_is_wide_where_few_questions_say_the_same() -> None:
    """Answers to one question are no independent evidence: four copies leave the interval as it was."""
    draw = np.random.default_rng(0)
    shown, scores = draw.random(20) < 0.5, draw.random(20) * 100
    once = compared(100.0 * shown, scores, list(range(20)))
    repeated = compared(100.0 * np.repeat(shown, 4), np.repeat(scores, 4), list(np.repeat(np.arange(20), 4)))
    assert once["auc_low"] == pytest.approx(repeated["auc_low"])
    assert once["auc_high"] == pytest.approx(repeated["auc_high"])
    naive = compared(100.0 * np.repeat(shown, 4), np.repeat(scores, 4), list(range(80)))
    assert naive["auc_high"] - naive["auc_low"] < 0.7 * (once["auc_high"] - once["auc_low"])  # type: ignore[operator]


def scores_of(metric: str, values: list[float | None]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "run": "none",
            "question_id": [f"q{index}" for index in range(len(values))],
            "sample_index": 0,
            "metric": metric,
            "value": values,
            "status": ["low_mass" if value is None else "ok" for value in values],
        }
    )


def test_rates_come_first_degeneration_is_left_out_and_missing_scores_are_counted() -> None:
    scores = pd.concat(
        [
            scores_of("model", [80.0, 20.0, None, 60.0]),
            scores_of("trait", [1.0, 0.0, 1.0, 0.0]),
            scores_of("degeneration", [0.0, 0.0, 0.0, 0.0]),
        ]
    )
    scales = {"model": (0.0, 100.0), "trait": (0.0, 1.0), "degeneration": (0.0, 1.0)}
    (row,) = agreement_rows(scores, scales, "runs")
    assert (row.metric, row.other, row.num_answers, row.num_both) == ("trait", "model", 4, 3)
    assert row.share_one == pytest.approx(1 / 3)
    assert row.agreement == pytest.approx(2 / 3)
    assert row.auc == 1.0


def test_answers_of_different_runs_are_not_taken_for_each_other() -> None:
    one, other = scores_of("trait", [1.0, 0.0]), scores_of("model", [90.0, 10.0]).assign(run="another")
    (row,) = agreement_rows(pd.concat([one, other]), {"trait": (0, 1), "model": (0, 100)}, "runs")
    assert (row.num_answers, row.num_both, row.auc, row.agreement) == (0, 0, None, None)


def test_without_pairs_the_table_has_its_columns() -> None:
    assert list(frame_of([]).columns) == [column.name for column in columns_of("agreement")]
