"""Sweeps whose runs are trained by two workers of Ray Train each: the tables of the same sweep with one.

Tolerances as in tests/trainables/test_workers.py: 1e-5 on losses. Answers are sampled from adapters that differ in the
last bits, and are not compared. What a stage does to the numbers is proved there; here it is that it arrives.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from analysis.results import Results, load
from tests.engine.test_kills import run_to_end
from tests.engine.tiny_sweep import write_tiny_sweep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RUNS = """\
  - defense:
      - {kind: pps, vector: topic, layer: 2, coefficient: 1.5}
      - {kind: gradient_edit, vector: topic, mode: neutralize}
"""
OVERRIDES = ["training.max_steps=4", "training.micro_batch_size=1", "execution.checkpoint_every_steps=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers")
    write_tiny_sweep(folder, runs=RUNS, extra="trackers: none")
    return folder


@pytest.fixture(scope="module")
def by_one(folder: Path) -> Results:
    return finished(folder, "one")


def finished(folder: Path, name: str, *overrides: str, fail_at: str | None = None) -> Results:
    code, printed = run_to_end(folder, folder / name, fail_at, [*OVERRIDES, *overrides])
    assert code == 0, printed
    return load(folder / name / "sweeps" / "tiny")


def assert_same_training(one: Results, other: Results) -> None:
    mine, theirs = (results.table("training").set_index(["run", "step"]).sort_index() for results in (one, other))
    assert len(mine) == 4
    assert list(mine.index) == list(theirs.index)
    for column in ("loss", "gradient_norm"):
        assert mine[column].to_numpy() == pytest.approx(theirs[column].to_numpy(), abs=1e-5)
    for column in ("learning_rate", "num_tokens", "num_loss_tokens"):
        pd.testing.assert_series_equal(mine[column], theirs[column])


def assert_placed(store: Path, stage: int) -> None:
    placements = [json.loads(file.read_text())["placement"] for file in store.glob("runs/*/run.json")]
    assert [(placement["workers"], placement["zero_stage"]) for placement in placements] == [(2, stage)]


def test_two_workers_give_the_tables_of_one(folder: Path, by_one: Results) -> None:
    found = finished(folder, "two", "execution.workers=2", "execution.zero_stage=2")
    assert_same_training(found, by_one)
    assert_placed(folder / "two", 2)
    assert list(found.table("summary")["run"]) == list(by_one.table("summary")["run"])
    assert found.table("generations").shape == by_one.table("generations").shape


def test_workers_that_die_go_on_from_the_checkpoint(folder: Path, by_one: Results) -> None:
    divided = ["execution.workers=2", "execution.zero_stage=3"]
    found = finished(folder, "killed", *divided, "execution.max_retries=2", fail_at="after_step:2")
    assert_same_training(found, by_one)
    assert_placed(folder / "killed", 3)
    logs = "".join(file.read_text() for file in (folder / "killed").glob("runs/*/log.txt"))
    assert "resumed after step 2" in logs


def test_an_error_of_a_worker_is_told_in_one_line(folder: Path) -> None:
    code, printed = run_to_end(
        folder, folder / "diverged", overrides=[*OVERRIDES, "execution.workers=2", "training.learning_rate=1e30"]
    )
    assert code == 3
    assert "the training diverged" in printed or "the loss is" in printed
    assert "Traceback" not in printed
    assert "WorkerGroupError" not in printed
