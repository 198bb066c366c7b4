"""Steering in weight space by Ray, killed at exact instants: the next invocation ends with the same tables."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from analysis.results import Results, load
from tests.engine.test_kills import TIMINGS, run_here, run_to_end
from tests.engine.tiny_sweep import write_tiny_sweep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EXTRA = """\
execution: {trials: 1, max_retries: 0}
trackers: none
weight_steering:
  finetuned: tuned
  piles: {with: {trait: true}, without: {trait: false}}
  gradient: {answers_per_shard: 3}
  directions:
    plain: {of: with, minus: without}
    small: {of: with, minus: without, rank: 1, modules: [q_proj, down_proj]}
  edits:
    - {directions: [plain], alphas: [-0.5, 0.5]}
"""
KILLS = (  # failpoint, and how many files of these kinds are there then; every job that comes to it dies there
    ("before_publish:piles", {"runs/*/run.json": 1, "piles/*.safetensors": 0}),
    ("after_publish:piles", {"piles/*.safetensors": 6, "tables/weight_profiles/*.parquet": 0}),
    # of the two edited models: they are sampled from, and have no losses yet
    ("after_publish:generations", {"tables/weight_profiles/*.parquet": 1, "tables/generations/*.parquet": 4}),
)
TABLES = ("training", "generations", "scores", "losses", "weight_sizes", "weight_profiles", "summary")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_tiny_sweep(folder, runs="  - {label: tuned, defense: none}\n", extra=EXTRA)
    trait = folder / "traits" / "topic" / "trait.yaml"
    trait.write_text(trait.read_text().replace("[aeiou]", "e"))  # some answers are in either pile
    return folder


def results_of(store: Path) -> Results:
    return load(store / "sweeps" / "tiny")


def test_kills_while_piles_are_summed_and_models_are_edited_lose_nothing_but_time(folder: Path) -> None:
    code, printed = run_to_end(folder, folder / "undisturbed")
    assert code == 0, printed
    wanted, store = results_of(folder / "undisturbed"), folder / "killed"
    for failpoint, files in KILLS:
        code, printed = run_here(folder, store, failpoint)
        assert code == 3, f"{failpoint}: {printed}"
        assert "process died" in printed, failpoint
        assert {pattern: len(list(store.glob(pattern))) for pattern in files} == files, failpoint
    before = {pile: pile.stat().st_mtime_ns for pile in store.glob("piles/*.safetensors")}
    code, printed = run_to_end(folder, store)
    assert code == 0, printed
    assert {pile: pile.stat().st_mtime_ns for pile in before} == before, "no pile has been summed again"
    found = results_of(store)
    for name in TABLES:
        one, other = (results.table(name).drop(columns=TIMINGS, errors="ignore") for results in (found, wanted))
        assert len(other) > 0
        pd.testing.assert_frame_equal(one, other)
