"""Sweeps end to end through Ray on a tiny random model: tables, failures beside successes, resuming."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

import engine.run
from analysis.results import load
from analysis.vectors import Vector
from engine.ask import Steer, ask
from engine.look import find_run, status_view
from engine.machine import Machine
from engine.prepare import prepare
from engine.progress import LineProgress
from engine.run import Outcome, run_sweep
from engine.store import Store
from engine.watching import SweepWatcher
from tests.engine.tiny_sweep import RUNS, write_tiny_sweep
from trainables.errors import ConfigError
from trainables.sample import SamplingConfig

DIVERGING = """\
  - label: diverging
    defense: none
    training: {learning_rate: 1.0e+30, max_gradient_norm: null, max_steps: 4}
"""
CHILDREN = """\
  - {label: child, defense: none, start_from: {run: none, adapter: merge}}
  - {label: unborn, defense: none, start_from: {run: diverging, adapter: continue}}
"""


@pytest.fixture(scope="module")
def sweep_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a tiny sweep")
    return write_tiny_sweep(folder, runs=RUNS + DIVERGING + CHILDREN, extra="execution: {trials: 2}")


@pytest.fixture(scope="module")
def printed() -> io.StringIO:
    return io.StringIO()


@pytest.fixture(scope="module")
def outcome(sweep_file: Path, printed: io.StringIO) -> Outcome:
    return run_sweep(sweep_file, console=Console(file=printed, width=120))


@pytest.fixture(scope="module")
def summary(outcome: Outcome) -> pd.DataFrame:
    return outcome.results.summary().set_index("run")


def test_every_sound_run_is_done_and_scored(summary: pd.DataFrame) -> None:
    sound = summary.drop(index=["diverging", "unborn"])
    assert summary.index[0] == "base"
    assert len(sound) == 6
    assert set(sound["status"]) == {"done"}
    assert (sound["trait_num_scored"] == 8).all()
    assert (sound["degeneration_num_scored"] == 8).all()
    assert sound["plain_loss"].notna().all()


def test_a_diverging_run_fails_alone_and_says_why(outcome: Outcome, summary: pd.DataFrame) -> None:
    assert summary.loc["diverging", "status"] == "failed"
    run_id, _ = outcome.failures
    failure = outcome.failures[run_id]
    assert failure.kind == "failed"
    assert f"run {run_id}, step" in failure.reason
    assert "TrainingError" in failure.log_tail[-1]
    failures = outcome.results.failures()
    assert list(failures["run"]) == ["diverging", "unborn"]


def test_a_run_that_starts_from_it_is_skipped_and_says_why(outcome: Outcome, summary: pd.DataFrame) -> None:
    assert summary.loc["unborn", "status"] == "skipped"
    runs = outcome.results.runs().set_index("run")
    assert runs.loc["unborn", "reason"] == "needs diverging, which failed"
    console = Console(file=io.StringIO(), width=120)
    console.print(status_view(outcome.results))
    assert "needs diverging, which failed" in console.file.getvalue()  # type: ignore[attr-defined]


def test_progress_says_what_happens(outcome: Outcome, printed: io.StringIO) -> None:
    del outcome
    text = printed.getvalue()
    assert "vector topic: done" in text
    assert "diverging: FAILED: " in text


def test_the_store_explains_the_sweep(outcome: Outcome, sweep_file: Path) -> None:
    folder = outcome.results.root / "sweeps" / "tiny"
    assert {path.name for path in folder.iterdir()} >= {"sweep.yaml", "manifest.json", "provenance.json"}
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["versions"]["ray"]
    assert provenance["trials_side_by_side"] == 2
    manifest = outcome.results.manifest
    vector = Vector.read(outcome.results.root / "vectors" / f"{manifest.vectors['topic']}.safetensors")
    assert vector.values.shape == (5, 32)
    assert vector.final_row == "pre_norm"
    assert str(sweep_file.parent) not in (folder / "provenance.json").read_text()


def test_the_training_table_has_every_step(outcome: Outcome) -> None:
    training = outcome.results.training()
    steps = training.groupby("run")["step"].apply(list)
    assert steps.drop("diverging", errors="ignore").map(lambda done: done == [1, 2]).all()


def test_a_run_can_be_asked_with_and_without_steering(outcome: Outcome) -> None:
    results = outcome.results
    sampling = SamplingConfig(samples=3, max_new_tokens=5)

    def answers(run: str, seed: int = 0, steer: Steer | None = None) -> list[str]:
        return list(ask(results, find_run(results, run), "How are you?", sampling, seed=seed, steer=steer))

    first = answers("none")
    assert len(first) == 3
    assert answers("none") == first
    assert answers("none", seed=1) != first
    assert answers("base") != first
    assert answers("none", steer=Steer("topic", 2, 1000.0)) != first
    with pytest.raises(ConfigError, match="no vector 'topi'; vectors: random, topic"):
        answers("none", steer=Steer("topi", 2, 1.0))
    with pytest.raises(ConfigError, match="layer 9 does not exist"):
        answers("none", steer=Steer("topic", 9, 1.0))
    with pytest.raises(ConfigError, match="'diverging' is not done"):
        answers("diverging")


def test_a_second_run_does_only_what_is_missing(
    outcome: Outcome, sweep_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del outcome
    asked: list[list[str]] = []

    def note(prepared: Any, store: Any, jobs: dict[str, Any], *rest: Any) -> None:
        del prepared, store, rest
        asked.append([job.label for job in jobs.values()])

    monkeypatch.setattr(engine.run, "_work", note)
    run_sweep(sweep_file, console=Console(file=io.StringIO()))
    assert asked == [["diverging", "unborn"]]
    assert load(sweep_file.parent / "results" / "sweeps" / "tiny").summary()["status"].tolist().count("done") == 6


def test_a_sweep_with_everything_done_starts_no_ray(
    outcome: Outcome, sweep_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del outcome
    monkeypatch.setattr(engine.run, "_work", lambda *_: pytest.fail("Ray was started"))
    again = write_tiny_sweep(sweep_file.parent, runs=RUNS, extra="execution: {trials: 1}")
    finished = run_sweep(again, console=Console(file=io.StringIO()))
    assert finished.num_done_before == finished.num_jobs == 7
    assert not finished.failures
    assert "diverging" not in set(finished.results.summary()["run"]), "a dropped run is hidden"


def test_judges_that_failed_are_told_at_the_next_report_of_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at the end: by then the money for the other runs is spent."""
    prepared = prepare(write_tiny_sweep(tmp_path), [], Machine(2, 0.0, 16.0))
    store = Store.open(prepared.sweep.results, create=True)
    said = io.StringIO()
    watcher = SweepWatcher(prepared, store, LineProgress(Console(file=said, width=200)))
    judge_id = next(iter(prepared.judge_tasks))
    label = next(entry.label for entry in prepared.manifest.runs if judge_id in entry.judge_ids.values())

    class Pool:
        def poll(self) -> None:
            watcher.judging_failed(judge_id, "HTTP 401: wrong key")

    monkeypatch.setattr(watcher, "pool", Pool())
    watcher.figures(next(iter(prepared.jobs)), {"phase": "train", "units_done": 1, "units_total": 2})
    assert f"{label}, judge of trait: FAILED: HTTP 401: wrong key" in said.getvalue()
    assert judge_id in store.read_json("sweeps/tiny/failures.json")
