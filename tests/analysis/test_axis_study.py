"""The study of synthetic axes against its closed form, and its tests against values worked out by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis.axes import ESTIMATORS
from analysis.axis_study import Setting, alignment_rows, cohens_d, known_axis, sign_flip_p, two_sets
from analysis.manifest import MeasureEntry
from analysis.measurements import STUDIES, Part, SyntheticAxes
from analysis.report_axes import axis_blocks

SETTING = Setting(noise=1.0, num_rows=100, seed=0, dimension=32, separation=2.0, spread=0.5)
CONFIG = SyntheticAxes(noise=(0.1, 2.0), num_rows=(20, 60), seeds=4, dimension=8)


def nothing(done: int, total: int) -> None:
    del done, total


def test_the_sets_are_as_they_are_said_to_be() -> None:
    x, y = two_sets(replace(SETTING, num_rows=20_000))
    axis = known_axis(SETTING)
    assert float(axis.norm()) == pytest.approx(1)
    for rows, sign in ((x, 1), (y, -1)):
        # mean and spread of 20,000 draws of standard deviation 1.118: errors 0.008 and 0.006; five of them
        np.testing.assert_allclose(rows.mean(0).numpy(), sign * axis.numpy(), atol=0.04)
        np.testing.assert_allclose(rows.std(0).numpy(), np.hypot(1.0, 0.5), atol=0.03)


def test_the_mean_difference_comes_as_near_as_its_closed_form_says() -> None:
    found = [
        next(row.alignment for row in alignment_rows(replace(SETTING, seed=seed), "m") if row.estimator == name)
        for seed, name in itertools.product(range(30), ["mean_difference"])
    ]
    error = np.std(found, ddof=1) / np.sqrt(30)
    assert abs(np.mean(found) - SETTING.expected) < 4 * error + 0.002  # 0.002: what first order leaves out
    assert 0.8 < SETTING.expected < 0.95  # far enough from 1 to see a wrong formula


def test_cells_are_all_settings_once_and_a_shard_computes_its_own() -> None:
    settings = CONFIG.settings()
    assert len(settings) == CONFIG.num_cells() == len(set(settings)) == 16
    rows = CONFIG.compute("m", [0, 15], nothing).tables["axis_alignments"]
    assert [(row.noise, row.num_rows, row.seed) for row in rows[::4]] == [(0.1, 20, 0), (2.0, 60, 3)]  # type: ignore[attr-defined]
    assert [row.estimator for row in rows[:4]] == list(ESTIMATORS)  # type: ignore[attr-defined]


def test_what_is_merged_is_over_seeds_and_shown() -> None:
    made = CONFIG.compute("m", range(CONFIG.num_cells()), nothing)
    alignments = pd.DataFrame([vars(row) for row in made.tables["axis_alignments"]])
    merged = CONFIG.merge("merged", [Part({"axis_alignments": alignments}, {})], {}).tables
    summary, tests = (pd.DataFrame([vars(row) for row in merged[name]]) for name in CONFIG.merged_tables)
    assert len(summary) == 4 * 4
    assert len(tests) == 4 * 6
    one = summary[(summary["noise"] == 2.0) & (summary["num_rows"] == 60) & (summary["estimator"] == "contrastive")]
    of_it = alignments.merge(one[["noise", "num_rows", "estimator"]])["alignment"]
    assert float(one["alignment"].iloc[0]) == pytest.approx(of_it.mean())
    assert float(one["alignment_low"].iloc[0]) < of_it.mean() < float(one["alignment_high"].iloc[0])
    entry = MeasureEntry(
        name="study",
        kind="axis_synthetic",
        run="synthetic",
        run_id="0" * 12,
        shard_ids=(),
        tables=CONFIG.tables,
        config=CONFIG.model_dump(mode="json"),
    )
    blocks = list(axis_blocks(summary, tests, entry))
    assert [bool(block.drawn) for block in blocks] == [True, True, False, False]
    assert [row[0] for row in blocks[2].rows] == ["0.1", "2"]
    assert len(blocks[3].rows) == 12


def test_effect_size_and_sign_flip_test() -> None:
    a, b = np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0, 5.0])
    assert cohens_d(a, b) == pytest.approx(0.0)
    assert cohens_d(a, a - 2) == pytest.approx(2.0)  # standard deviations 1 and 1
    assert cohens_d(np.ones(3), np.zeros(3)) is None
    # all three differences point one way: of 8 sign patterns two are as extreme
    assert sign_flip_p(np.array([1.0, 2.0, 3.0])) == pytest.approx(2 / 8)
    assert sign_flip_p(np.array([1.0, -1.0])) == pytest.approx(1.0)
    many = np.concatenate([np.full(10, 1.0), np.full(10, -1.0)])
    assert sign_flip_p(many) == pytest.approx(1.0)
    assert sign_flip_p(np.ones(20)) < 1e-3


def test_it_is_known_as_a_kind_that_reads_no_model() -> None:
    assert frozenset({"axis_synthetic"}) == STUDIES
