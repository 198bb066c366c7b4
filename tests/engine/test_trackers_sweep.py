"""A whole sweep with every tracker, killed and gone on with: the trackers have what the tables have, once."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from analysis.results import Results, load
from tests.engine.tiny_sweep import write_tiny_sweep
from tests.engine.tracked import FIGURES, event_curve, event_reader, mlflow_curve, mlflow_runs
from tests.engine.wandb_files import offline_runs
from trainables.failpoints import ENVIRONMENT_VARIABLE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PROJECT = Path(__file__).resolve().parents[2]
KEY = "0123456789abcdef" * 2 + "01234567"
RUNS = """\
  - defense: none
  - label: diverging
    defense: none
    training: {learning_rate: 1.0e+30, max_gradient_norm: null}
"""
EXTRA = """\
execution: {trials: 1, max_retries: 0, checkpoint_every_steps: 1}
trackers:
  wandb: {mode: offline}
  mlflow: {}
"""
RUN = """\
import sys
from engine.run import run_sweep
outcome = run_sweep(sys.argv[1], ["training.max_steps=5"])
brought = [name for name in ("wandb", "mlflow", "tensorboardX", "tensorboard") if name in sys.modules]
print("failed:", len(outcome.failures), "brought:", *brought)
"""


@dataclass
class Workplace:
    """A sweep, and every place that a process of it may write to."""

    folder: Path
    everywhere: tuple[Path, ...]
    environment: dict[str, str]

    def run(self, fail_at: str | None = None) -> str:
        """One invocation; returns what it printed last."""
        environment = self.environment | ({ENVIRONMENT_VARIABLE: fail_at} if fail_at else {})
        command = [sys.executable, "-c", RUN, str(self.folder / "sweep.yaml")]
        done = subprocess.run(command, cwd=PROJECT, env=environment, text=True, capture_output=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip().splitlines()[-1]

    @property
    def results(self) -> Results:
        return load(self.folder / "results" / "sweeps" / "tiny")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    folder = tmp_path_factory.mktemp("tracked")
    write_tiny_sweep(folder, runs=RUNS, extra=EXTRA)
    ray = Path(tempfile.mkdtemp(prefix="sg-", dir="/tmp"))  # Ray's sockets need a short path
    home = folder / "home"
    places = dict.fromkeys(("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "XDG_CACHE_HOME"), str(home))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "MLFLOW_"))}
    environment |= places | {"RAY_TMPDIR": str(ray), "WANDB_API_KEY": KEY, "MLFLOW_TRACKING_TOKEN": KEY}
    yield Workplace(folder, (folder, ray), environment | {"WANDB_ERROR_REPORTING": "false"})
    shutil.rmtree(ray)


@pytest.fixture(scope="module")
def first(workplace: Workplace) -> str:
    """Every training dies after its third step."""
    return workplace.run(fail_at="after_step:3")


@pytest.fixture(scope="module")
def second(workplace: Workplace, first: str) -> str:
    del first
    return workplace.run()


def curves(workplace: Workplace, label: str, figure: str) -> dict[str, dict[int, float]]:
    """Value by step, by tracker."""
    folder, database = workplace.results.root / "sweeps" / "tiny", workplace.results.root / "mlflow.db"
    run_id = {entry.label: entry.run_id for entry in workplace.results.manifest.runs}[label]
    reader = event_reader(folder)[label]
    return {
        "tensorboard": event_curve(reader, f"train/{figure}"),
        "wandb": offline_runs(folder)[f"tiny-{run_id}"].curve(f"train/{figure}"),
        "mlflow": mlflow_curve(database, mlflow_runs(database, "tiny")[label], f"train/{figure}"),
    }


def test_a_run_that_died_is_marked_and_has_steps_without_a_gap(workplace: Workplace, first: str) -> None:
    assert first.startswith("failed: 2 ")
    for curve in curves(workplace, "none", "loss").values():
        assert sorted(curve) in ([], [1], [1, 2], [1, 2, 3])  # those that it had told of when it died
    run = mlflow_runs(workplace.results.root / "mlflow.db", "tiny")["none"]
    assert run.info.status == "FAILED"
    assert "process died" in run.data.tags["failure"]


def test_trackers_have_what_the_tables_have(workplace: Workplace, second: str) -> None:
    assert second.startswith("failed: 1 ")
    table = workplace.results.training().set_index(["run", "step"])
    assert set(table.loc["none"].index) == {1, 2, 3, 4, 5}
    for figure in FIGURES:
        wanted = table.loc["none"][figure].to_dict()
        found = curves(workplace, "none", figure)
        assert found["wandb"] == wanted
        assert found["mlflow"] == wanted
        assert found["tensorboard"] == {step: float(np.float32(value)) for step, value in wanted.items()}


def test_final_metrics_are_those_of_the_summary(workplace: Workplace, second: str) -> None:
    del second
    summary = workplace.results.summary().set_index("run")
    folder = workplace.results.root / "sweeps" / "tiny"
    files = {run.name: run for run in offline_runs(folder).values()}
    events, runs = event_reader(folder), mlflow_runs(workplace.results.root / "mlflow.db", "tiny")
    for label in ("base", "none"):
        for metric in ("trait", "degeneration", "plain_loss", "train_loss"):
            wanted = float(summary[metric].astype("float64")[label])
            if math.isnan(wanted):
                assert (label, metric) == ("base", "train_loss")
                assert f"final/{metric}" not in runs[label].data.metrics
                continue
            assert runs[label].data.metrics[f"final/{metric}"] == wanted
            assert files[label].summary[f"final/{metric}"] == wanted
            (event,) = event_curve(events[label], f"final/{metric}").values()
            assert event == np.float32(wanted)


def test_a_run_that_diverged_says_so(workplace: Workplace, second: str) -> None:
    del second
    run = mlflow_runs(workplace.results.root / "mlflow.db", "tiny")["diverging"]
    assert run.info.status == "FAILED"
    assert "TrainingError" in run.data.tags["failure"]
    table = workplace.results.training()
    steps = set(table.loc[table["run"] == "diverging", "step"])
    assert steps
    for curve in curves(workplace, "diverging", "loss").values():
        assert set(curve) == steps


def test_a_sweep_with_nothing_to_do_brings_no_tracker(workplace: Workplace, second: str) -> None:
    del second
    write_tiny_sweep(workplace.folder, runs="  - defense: none\n", extra=EXTRA)
    assert workplace.run() == "failed: 0 brought:"  # but TensorBoard stops showing the run that was dropped
    assert set(event_reader(workplace.results.root / "sweeps" / "tiny")) == {"base", "none"}
    before = {path: path.stat().st_mtime_ns for path in (workplace.folder / "results").rglob("*") if path.is_file()}
    assert workplace.run() == "failed: 0 brought:"
    changed = [path for path, time in before.items() if path.exists() and path.stat().st_mtime_ns != time]
    assert not [path for path in changed if {"tensorboard", "wandb"} & set(path.parts) or "mlflow" in path.name]


def test_no_key_is_in_any_file(workplace: Workplace, second: str) -> None:
    del second
    for place in workplace.everywhere:
        files = [path for path in place.rglob("*") if path.is_file()]
        assert len(files) > 20
        assert not [path for path in files if KEY.encode() in path.read_bytes()]
