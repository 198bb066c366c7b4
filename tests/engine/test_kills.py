"""Kills at exact instants: the next invocation completes the sweep and the results are those of an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import psutil
import pytest
from typer.testing import CliRunner

from analysis.results import Results, load
from engine.cli import app
from engine.lease import Holder, current_holder
from engine.store import Store
from engine.watchdog import marked
from tests.engine.tiny_sweep import write_tiny_sweep
from trainables.failpoints import ENVIRONMENT_VARIABLE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PROJECT = Path(__file__).resolve().parents[2]
RUNS = "  - defense: {kind: pps, vector: topic, layer: 2, coefficient: 1.5}\n"
EXECUTION = "execution: {trials: 1, max_retries: 0}"
TIMINGS = ["seconds", "seconds_training", "started_utc", "finished_utc"]

# in the order in which a sweep comes to them, so that every invocation gets further than the one before
IN_THE_DRIVER = ["before_publish:sweeps", "after_publish:sweeps"]
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
FAMILY = """\
  - {label: pre, defense: none}
  - {label: child, defense: none, seed: 1, start_from: {run: pre, adapter: merge}}
"""
IN_A_FAMILY = [  # failpoint, and which of the two it is reached by
    ("after_publish:run", "pre"),
    ("after_publish:losses", "pre"),
    ("after_step:1", "child"),
    ("before_publish:run", "child"),
]
IN_A_JUDGE = ["before_publish:scores", "after_publish:scores"]
IN_A_TRAINING = [  # with a checkpoint every 2 steps: failpoint, after which step it went on, steps that it did
    ("before_publish:checkpoint", None, [1, 2]),
    ("after_publish:checkpoint", None, [1, 2]),
    ("before_publish:checkpoint", 2, [3, 4]),
    ("during_publish:checkpoint", 2, [3, 4]),  # the old one steps aside, and is what the next one goes on from
    ("after_step:5", 2, [3, 4, 5]),
]
SIX_STEPS = "training.max_steps=6"
NO_END = "training.max_steps=1000000"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    write_tiny_sweep(folder, runs=RUNS, extra=EXECUTION)
    return folder


def arguments(folder: Path, store: str | Path, overrides: Sequence[str]) -> list[str]:
    return ["run", str(folder / "sweep.yaml"), f"results={store}", *overrides]


def start(
    folder: Path, store: str | Path, fail_at: str | None = None, overrides: Sequence[str] = ()
) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != ENVIRONMENT_VARIABLE}
    if fail_at is not None:
        environment[ENVIRONMENT_VARIABLE] = fail_at
    return subprocess.Popen(
        [sys.executable, "-m", "engine.cli", *arguments(folder, store, overrides)],
        cwd=PROJECT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def run_to_end(
    folder: Path, store: str | Path, fail_at: str | None = None, overrides: Sequence[str] = ()
) -> tuple[int, str]:
    process = start(folder, store, fail_at, overrides)
    printed, _ = process.communicate(timeout=300)
    return process.returncode, printed


def run_here(folder: Path, store: str | Path, fail_at: str, overrides: Sequence[str] = ()) -> tuple[int, str]:
    """With this process as the driver, which saves its start; what is killed is a process of Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT_VARIABLE, fail_at)
        done = CliRunner().invoke(app, arguments(folder, store, overrides))
    return done.exit_code, f"{done.output}{done.exception!r}"


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


def test_kills_at_every_failpoint_one_after_another_lose_nothing_but_time(folder: Path, undisturbed: Results) -> None:
    """Each invocation must get past the point at which the one before was killed, or it would not reach its own."""
    store = folder / "every failpoint"
    for failpoint in IN_THE_DRIVER:
        code, printed = run_to_end(folder, store, failpoint)
        assert code == -signal.SIGKILL, f"{failpoint}: {printed}"
    for failpoint in IN_A_TRIAL:
        code, printed = run_here(folder, store, failpoint)
        assert code == 3, f"{failpoint}: {printed}"
        assert "process died" in printed, failpoint
    code, printed = run_to_end(folder, store)
    assert code == 0, printed
    assert_same_results(results_of(store), undisturbed)


def test_kills_of_a_run_and_of_one_that_starts_from_it_lose_nothing_but_time(tmp_path: Path) -> None:
    write_tiny_sweep(tmp_path, runs=FAMILY, extra=EXECUTION)
    store = tmp_path / "killed"
    for failpoint, reached in IN_A_FAMILY:
        code, printed = run_here(tmp_path, store, failpoint)
        assert code == 3, f"{failpoint}: {printed}"
        assert "process died" in printed, failpoint
        runs = results_of(store).runs().set_index("run")
        if reached == "pre":
            assert (runs["status"]["child"], runs["reason"]["child"]) == ("skipped", "needs pre, which failed")
    code, printed = run_to_end(tmp_path, store)
    assert code == 0, printed
    code, printed = run_to_end(tmp_path, tmp_path / "undisturbed")
    assert code == 0, printed
    assert_same_results(results_of(store), results_of(tmp_path / "undisturbed"))


def test_kills_of_the_judge_lose_nothing_but_time(folder: Path, undisturbed: Results) -> None:
    store = folder / "judge"
    for failpoint in IN_A_JUDGE:
        code, printed = run_here(folder, store, failpoint)
        assert code == 3, f"{failpoint}: {printed}"
    code, printed = run_to_end(folder, store)
    assert code == 0, printed
    assert_same_results(results_of(store), undisturbed)


def log_of_the_run(results: Results) -> list[str]:
    (run,) = [entry.run_id for entry in results.manifest.runs if entry.kind == "run"]
    lines = (results.root / "runs" / run / "log.txt").read_text().splitlines()
    return [line.split(" ", 1)[1] for line in lines]  # without the time


def steps_done(log: Sequence[str]) -> list[int]:
    return [int(line.split()[1].split("/")[0]) for line in log if line.startswith("step ")]


def resumed_after(log: Sequence[str]) -> int | None:
    resumed = [int(line.removeprefix("resumed after step ")) for line in log if line.startswith("resumed")]
    assert len(resumed) <= 1, log
    return resumed[0] if resumed else None


def test_a_training_that_is_killed_goes_on_from_its_last_checkpoint(folder: Path) -> None:
    """The last invocation's trial is killed too, and retried: its second process begins after step 5, so that the
    failpoint is not reached again."""
    code, printed = run_to_end(folder, folder / "six steps", overrides=[SIX_STEPS])
    assert code == 0, printed
    store = folder / "resumed"
    seen = 0
    for failpoint, after, steps in IN_A_TRAINING:
        code, printed = run_here(folder, store, failpoint, [SIX_STEPS, "execution.checkpoint_every_steps=2"])
        assert code == 3, f"{failpoint}: {printed}"
        log = log_of_the_run(results_of(store))[seen:]
        seen += len(log)
        assert (resumed_after(log), steps_done(log)) == (after, steps), failpoint
    overrides = [SIX_STEPS, "execution.checkpoint_every_steps=1", "execution.max_retries=1"]
    code, printed = run_to_end(folder, store, "after_step:5", overrides)
    assert code == 0, printed
    log = log_of_the_run(results_of(store))[seen:]
    again = log.index("resumed after step 5")
    assert (resumed_after(log[:again]), steps_done(log)) == (4, [5, 6])
    assert_same_results(results_of(store), results_of(folder / "six steps"))
    assert not list((store / "runs").glob("*/checkpoint*")), "removed when the run is done"


class Driver:
    """An invocation that trains without an end, seen at work: its lease and all processes below it."""

    def __init__(self, folder: Path, store: Path) -> None:
        self.process = start(folder, store, overrides=[NO_END, "execution.checkpoint_every_steps=1"])

        def lease() -> Holder | None:
            holder = current_holder(Store(store), "tiny")
            return holder if holder is not None and holder.pid == self.process.pid else None

        self._wait_until(lambda: lease() is not None, "no lease was taken")
        before = self.num_steps(store)  # what an earlier driver left does no more of them
        # a step is logged just before its checkpoint: after two of them there is one
        self._wait_until(lambda: self.num_steps(store) >= before + 2, "no training began")
        holder = lease()
        assert holder is not None
        self.mark = holder.mark
        self.below = psutil.Process(self.process.pid).children(recursive=True)
        assert len(marked(self.mark)) > 5, "Ray's own processes, and those that train and judge"

    def _wait_until(self, holds: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + 300
        while not holds():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, otherwise
            time.sleep(0.05)

    @staticmethod
    def num_steps(store: Path) -> int:
        logs = (log.read_text() for log in (store / "runs").glob("*/log.txt"))
        return sum("gradient norm" in line for log in logs for line in log.splitlines())

    def kill(self, *, watchdog_too: bool = False) -> None:
        if watchdog_too:
            self.process.send_signal(signal.SIGSTOP)  # it would start another one
            (watchdog,) = (child for child in self.below if "watchdog.py" in " ".join(child.cmdline()))
            watchdog.kill()
        self.process.kill()
        self.process.communicate()

    def stop(self, signum: int) -> tuple[int, str]:
        self.process.send_signal(signum)
        printed, _ = self.process.communicate(timeout=120)
        return self.process.returncode, printed

    def assert_gone(self, within_s: float) -> None:
        _, alive = psutil.wait_procs(self.below, timeout=within_s)
        assert not alive, "no process outlives its driver"
        assert marked(self.mark) == []


def test_a_driver_that_is_killed_or_stopped_leaves_no_process_and_the_next_goes_on(
    folder: Path, undisturbed: Results
) -> None:
    store = folder / "stops"
    driver = Driver(folder, store)
    driver.kill()
    driver.assert_gone(within_s=20)  # 0.3 s on an idle machine; Ray left to itself takes 60

    driver = Driver(folder, store)
    driver.kill(watchdog_too=True)
    successor = Driver(folder, store)
    driver.assert_gone(within_s=0)  # the next driver has ended them before it took the lease

    assert successor.stop(signal.SIGTERM)[0] == 143
    successor.assert_gone(within_s=0)

    driver = Driver(folder, store)
    code, printed = driver.stop(signal.SIGINT)
    assert code == 130
    assert "run the same command again" in printed
    driver.assert_gone(within_s=0)
    log = "".join(path.read_text() for path in (store / "runs").glob("*/log.txt"))
    assert log.count("resumed after step") == 3

    code, printed = run_to_end(folder, store)
    assert code == 0, printed
    assert_same_results(results_of(store), undisturbed)
