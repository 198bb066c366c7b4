"""Measuring by Ray, end to end, and killed at exact instants: the next invocation ends with the same tables."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from analysis.results import Results, load
from analysis.tables import table_key
from engine.cli import app
from tests.engine.tiny_sweep import write_tiny_sweep
from trainables.failpoints import ENVIRONMENT_VARIABLE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PROJECT = Path(__file__).resolve().parents[2]
PPS = "{kind: pps, vector: topic, layer: 2, coefficient: 1.5}"
MEASURE = f"""\
execution: {{trials: 1, max_retries: 0}}
measure:
  directions: {{kind: components, vectors: [topic], layers: [2], rows_per_shard: 4, conditions: [{PPS}]}}
  foreseen: {{kind: prediction, trait: topic, layers: [2, 4], own_answer_tokens: 3, candidates: [{PPS}]}}
"""
ON_RUNS = "  after: {kind: gradients, on: both, vectors: [topic, random], layers: [2], rows_per_shard: 3, samples: 5}\n"
TABLES = ("components", "component_scores", "gradients", "losses", "projections", "predictions")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sweep files over the same data and model: one measures the base alone, the other runs too."""
    folder = tmp_path_factory.mktemp("measuring")
    runs = f"  - defense: none\n  - defense: {PPS}\n"
    write_tiny_sweep(folder, runs=runs, extra=MEASURE + ON_RUNS).rename(folder / "with runs.yaml")
    write_tiny_sweep(folder, runs=runs, extra=MEASURE)
    return folder


def here(command: str, file: Path, store: Path, fail_at: str = "") -> tuple[int, str]:
    """With this process as the driver, which saves its start; what is killed is a process of Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT_VARIABLE, fail_at)
        done = CliRunner().invoke(app, [command, str(file), f"results={store}"])
    return done.exit_code, f"{done.output}{done.exception!r}"


def results_of(store: Path) -> Results:
    return load(store / "sweeps" / "tiny")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Results:
    code, printed = here("run", folder / "with runs.yaml", folder / "undisturbed")
    assert code == 0, printed
    return results_of(folder / "undisturbed")


def test_a_sweep_with_measurements_by_ray(undisturbed: Results) -> None:
    done = undisturbed.measurements()
    assert set(done["status"]) == {"done"}
    assert done.groupby("measurement")["run"].apply(list).to_dict() == {
        "directions": ["base"],
        "foreseen": ["base"],
        "after": ["base", "none", "pps topic L2 x1.5"],
    }
    after = undisturbed.gradients().query("measurement == 'after'")
    assert len(after) == 3 * 5 * 2, "models x rows x vectors"
    means = after[after["vector"] == "topic"].groupby("run")["cosine"].mean()
    assert means.nunique() == 3, "each model is read with its own adapter"
    assert len(undisturbed.table("predictions")) == 2
    page = (undisturbed.root / "sweeps" / "tiny" / "report" / "index.html").read_text()
    for title in ("Inside the model", "What the directions are, layer 2", "Foreseen before training, along topic"):
        assert title in page


def test_kills_of_driver_and_trials_while_measuring_lose_nothing_but_time(folder: Path, undisturbed: Results) -> None:
    store, file = folder / "killed", folder / "sweep.yaml"
    killed = subprocess.run(
        [sys.executable, "-m", "engine.cli", "measure", str(file), f"results={store}"],
        cwd=PROJECT,
        env={**os.environ, ENVIRONMENT_VARIABLE: "after_job:measure"},
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, f"the driver itself: {killed.stdout}{killed.stderr}"
    done = results_of(store).measurements().set_index("measurement")["shards_done"].to_dict()
    assert done == {"directions": 1, "foreseen": 0}, "it died between two shards"
    directions, _ = results_of(store).manifest.measurements
    first = store / "measurements" / f"{directions.shard_ids[0]}.safetensors"
    before = first.stat().st_mtime_ns

    for command, failpoint, is_there, is_not in (
        ("predict", "after_publish:gradients", "gradients", "losses"),  # between two tables of a shard
        ("predict", "before_publish:predictions", "losses", "predictions"),  # in the merge step
        ("measure", "after_publish:components", "components", "component_scores"),  # between two tables of one
    ):
        code, printed = here(command, file, store, failpoint)
        assert code == 3, f"{failpoint}: {printed}"
        assert "process died" in printed, failpoint
        assert any((store / table_key(is_there, "x")).parent.glob("*.parquet")), failpoint
        assert not any((store / table_key(is_not, "x")).parent.glob("*.parquet")), failpoint

    code, printed = here("measure", file, store)
    assert code == 0, printed
    assert first.stat().st_mtime_ns == before, "what was done before the first kill has not been done again"
    found = results_of(store)
    for table in TABLES:
        wanted = undisturbed.measured(table).query("measurement != 'after'").reset_index(drop=True)
        assert len(wanted) > 0
        pd.testing.assert_frame_equal(found.measured(table), wanted)
