"""Kills at exact instants: the next invocation completes the sweep and the results are those of an undisturbed one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil
import pytest

from analysis.results import Results, load
from tests.engine.tiny_sweep import write_tiny_sweep
from trainables.failpoints import ENVIRONMENT_VARIABLE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PROJECT = Path(__file__).resolve().parents[2]
RUNS = "  - defense: {kind: pps, vector: topic, layer: 2, coefficient: 1.5}\n"
EXECUTION = "execution: {trials: 1, max_retries: 0}"
TIMINGS = ["seconds", "seconds_training", "started_utc", "finished_utc"]

IN_A_TRIAL = [
    "before_publish:vectors",
    "after_publish:vectors",
    "after_step:1",
    "before_publish:adapter",
    "after_publish:adapter",
    "after_publish:training",
    "before_publish:run",
    "after_publish:run",
    "before_publish:generations",
    "after_publish:generations",
    "after_publish:losses",
]
RESUMED = {  # failpoint -> after which step the next invocation goes on, with a checkpoint every 1 or 2 steps
    ("after_step:3", 1): 3,
    ("after_step:3", 2): 2,
    ("before_publish:checkpoint", 2): None,
    ("during_publish:checkpoint", 2): None,
    ("after_publish:checkpoint", 2): 2,
}
FIVE_STEPS = "training.max_steps=5"
IN_A_JUDGE = ["before_publish:scores", "after_publish:scores"]
IN_THE_DRIVER = ["before_publish:sweeps", "after_publish:sweeps"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    write_tiny_sweep(folder, runs=RUNS, extra=EXECUTION)
    return folder


def start(
    folder: Path, store: Path, fail_at: str | None = None, overrides: Sequence[str] = ()
) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != ENVIRONMENT_VARIABLE}
    if fail_at is not None:
        environment[ENVIRONMENT_VARIABLE] = fail_at
    return subprocess.Popen(
        [sys.executable, "-m", "engine.cli", "run", str(folder / "sweep.yaml"), f"results={store}", *overrides],
        cwd=PROJECT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def trials_of(driver: int) -> list[psutil.Process]:
    """Processes of Ray below ``driver`` that are doing a trial right now."""
    trials = []
    for child in psutil.Process(driver).children(recursive=True):
        with suppress(psutil.Error):  # processes come and go while they are looked at
            if "ImplicitFunc.train" in " ".join(child.cmdline()):
                trials.append(child)
    return trials


def children_at_work(process: subprocess.Popen[str], store: Path) -> list[psutil.Process]:
    """All processes below the driver, once the first run has begun."""
    deadline = time.monotonic() + 200
    while not any((store / "runs").glob("*/log.txt")):
        assert process.poll() is None, "the sweep ended before a run began"
        assert time.monotonic() < deadline, "no run began"
        time.sleep(0.05)
    return psutil.Process(process.pid).children(recursive=True)


def run_to_end(folder: Path, store: Path, fail_at: str | None = None, overrides: Sequence[str] = ()) -> tuple[int, str]:
    process = start(folder, store, fail_at, overrides)
    printed, _ = process.communicate(timeout=300)
    return process.returncode, printed


def results_of(store: Path) -> Results:
    return load(store / "sweeps" / "tiny")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Results:
    code, printed = run_to_end(folder, folder / "undisturbed")
    assert code == 0, printed
    return results_of(folder / "undisturbed")


def adapter_bytes(results: Results) -> list[bytes]:
    runs = [entry.run_id for entry in results.manifest.runs if entry.kind == "run"]
    return [(results.root / "runs" / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in runs]


def assert_same_results(found: Results, wanted: Results) -> None:
    assert adapter_bytes(found) == adapter_bytes(wanted)
    for name in ("training", "generations", "scores", "losses", "summary"):
        one, other = (results.table(name).drop(columns=TIMINGS, errors="ignore") for results in (found, wanted))
        pd.testing.assert_frame_equal(one, other)


@pytest.mark.parametrize("failpoint", IN_A_TRIAL + IN_A_JUDGE + IN_THE_DRIVER)
def test_a_kill_at_a_failpoint_loses_nothing_but_time(folder: Path, undisturbed: Results, failpoint: str) -> None:
    store = folder / failpoint.replace(":", "-")
    code, printed = run_to_end(folder, store, failpoint)
    # partial success where a worker died, SIGKILL where the driver did; never a success that is none
    assert code == (-signal.SIGKILL if failpoint in IN_THE_DRIVER else 3), printed
    code, printed = run_to_end(folder, store)
    assert code == 0, printed
    assert_same_results(results_of(store), undisturbed)
    shutil.rmtree(store)


@pytest.fixture(scope="module")
def undisturbed_five_steps(folder: Path) -> Results:
    code, printed = run_to_end(folder, folder / "five steps", overrides=[FIVE_STEPS])
    assert code == 0, printed
    return results_of(folder / "five steps")


def log_of_the_run(results: Results) -> list[str]:
    (run,) = [entry.run_id for entry in results.manifest.runs if entry.kind == "run"]
    assert not (results.root / "runs" / run / "checkpoint").exists(), "removed when the run is done"
    lines = (results.root / "runs" / run / "log.txt").read_text().splitlines()
    return [line.split(" ", 1)[1] for line in lines]  # without the time


def steps_done(log: Sequence[str]) -> list[int]:
    return [int(line.split()[1].split("/")[0]) for line in log if line.startswith("step ")]


@pytest.mark.parametrize(("failpoint", "every"), RESUMED)
def test_a_training_that_is_killed_goes_on_from_its_checkpoint(
    folder: Path, undisturbed_five_steps: Results, failpoint: str, every: int
) -> None:
    overrides = [FIVE_STEPS, f"execution.checkpoint_every_steps={every}"]
    store = folder / f"resumed {failpoint.replace(':', '-')} {every}"
    code, printed = run_to_end(folder, store, failpoint, overrides)
    assert code == 3, printed
    code, printed = run_to_end(folder, store, overrides=overrides)
    assert code == 0, printed
    log = log_of_the_run(results_of(store))
    before = 3 if failpoint == "after_step:3" else every
    after = RESUMED[failpoint, every]
    assert [line for line in log if line.startswith("resumed")] == (
        [] if after is None else [f"resumed after step {after}"]
    )
    assert steps_done(log) == [*range(1, before + 1), *range((after or 0) + 1, 6)]
    assert_same_results(results_of(store), undisturbed_five_steps)
    shutil.rmtree(store)


def test_a_retried_trial_goes_on_from_its_checkpoint(folder: Path, undisturbed_five_steps: Results) -> None:
    """Its new process begins after step 3, so the same failpoint is not reached again."""
    overrides = [FIVE_STEPS, "execution.checkpoint_every_steps=1", "execution.max_retries=1"]
    code, printed = run_to_end(folder, folder / "retried", "after_step:3", overrides)
    assert code == 0, printed
    log = log_of_the_run(results_of(folder / "retried"))
    assert "resumed after step 3" in log
    assert steps_done(log) == [1, 2, 3, 4, 5]
    assert_same_results(results_of(folder / "retried"), undisturbed_five_steps)


def test_a_trial_that_is_killed_is_reported_and_done_by_the_next_invocation(folder: Path, undisturbed: Results) -> None:
    store = folder / "one kill"
    process = start(folder, store)
    killed = False
    deadline = time.monotonic() + 200
    while process.poll() is None and not killed and time.monotonic() < deadline:
        for child in trials_of(process.pid) if (store / "runs").exists() else []:
            child.kill()
            killed = True
        time.sleep(0.05)
    printed, _ = process.communicate(timeout=300)
    assert killed
    assert process.returncode == 3, "max_retries is 0: the job that ran is reported as failed"
    assert "process died" in printed
    code, printed = run_to_end(folder, store)
    assert code == 0, printed
    assert_same_results(results_of(store), undisturbed)


def test_sigkill_of_the_driver_leaves_no_process_and_loses_nothing(folder: Path, undisturbed: Results) -> None:
    store = folder / "driver kill"
    process = start(folder, store)
    children = children_at_work(process, store)
    process.kill()
    process.communicate(timeout=60)
    # Ray's trials end within seconds; its agents first wait a minute for the lost head to answer
    _, alive = psutil.wait_procs(children, timeout=180)
    assert not alive, "no process outlives its driver"
    code, printed = run_to_end(folder, store)
    assert code == 0, printed
    assert_same_results(results_of(store), undisturbed)


def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(folder: Path, undisturbed: Results) -> None:
    store = folder / "ctrl c"
    process = start(folder, store)
    children = children_at_work(process, store)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    assert "run the same command again" in printed
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    code, printed = run_to_end(folder, store)
    assert code == 0, printed
    assert_same_results(results_of(store), undisturbed)
