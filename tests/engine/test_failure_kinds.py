"""One sweep in which runs fail in every way that we know of: each says why, the others go on, the next call mends."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import engine.run
from analysis.results import Results, load
from analysis.vectors import FileVector, Vector
from engine.cli import app
from engine.prepare import Prepared
from engine.store import Store
from engine.tasks import VectorJob
from tests.engine.tiny_sweep import HIDDEN, NUM_LAYERS, write_tiny_sweep
from trainables.failpoints import ENVIRONMENT_VARIABLE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RUNS = """\
  - {label: sound, defense: none}
  - label: diverging
    defense: none
    training: {learning_rate: 1.0e+30, max_gradient_norm: null}
  - {label: huge, defense: none, training: {lora: {rank: 100000000000}}}
  - {label: killed, defense: none, training: {max_steps: 3}}
  - label: steered
    defense: {kind: pps, vector: own, layer: 2, coefficient: 1.0}
"""
VECTORS = """
  own: {file: own.safetensors}
training:"""
GARBAGE = b"not what it was"


@dataclass(frozen=True)
class Call:
    """One invocation of the command: its exit status, what it printed, the results after it, which jobs it began."""

    status: int
    printed: str
    results: Results
    begun: list[str]


@pytest.fixture(scope="module")
def sweep_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failures")
    file = write_tiny_sweep(folder, runs=RUNS, extra="execution: {trials: 2, max_retries: 1}")
    file.write_text(file.read_text().replace("\ntraining:", VECTORS, 1))
    values = torch.randn(NUM_LAYERS + 1, HIDDEN, generator=torch.Generator().manual_seed(0))
    (folder / "own.safetensors").write_bytes(Vector(values, "pre_norm", "", "").to_bytes())
    return file


def call(sweep_file: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Call:
    begun: list[str] = []
    original = engine.run._work

    def noting(prepared: Prepared, store: Store, jobs: dict[str, Any], *rest: Any) -> None:
        begun.extend(job.label for job in jobs.values())
        original(prepared, store, jobs, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(engine.run, "_work", noting)
        done = CliRunner().invoke(app, ["run", str(sweep_file), *overrides])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    results = load(sweep_file.parent / "results" / "sweeps" / "tiny")
    return Call(done.exit_code, done.output, results, begun)


@pytest.fixture(scope="module")
def first(sweep_file: Path) -> Call:
    """The third training step kills its process, and the vector's copy is damaged before anything reads it."""
    original = engine.run.write_sweep

    def damaging(prepared: Prepared, store: Store) -> None:
        original(prepared, store)
        vectors = (job.vector for job in prepared.jobs.values() if isinstance(job, VectorJob))
        (content,) = (vector.file for vector in vectors if isinstance(vector, FileVector))
        (store.root / "inputs" / content).write_bytes(GARBAGE)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.run, "write_sweep", damaging)
        patch.setenv(ENVIRONMENT_VARIABLE, "after_step:3")
        return call(sweep_file, patch)


def test_the_others_go_on_and_the_exit_status_says_that_some_failed(first: Call) -> None:
    runs = first.results.runs().set_index("run")
    assert first.status == 3, first.printed
    assert runs["status"].to_dict() == {
        "base": "done",
        "sound": "done",
        "diverging": "failed",
        "huge": "failed",
        "killed": "failed",
        "steered": "skipped",
    }
    assert "Run the same command again" in first.printed


def reasons(call: Call) -> dict[str, str]:
    failures = call.results.failures()
    named = failures["run"].where(failures["run"].notna(), failures["task"])
    return {str(name): str(reason) for name, reason in zip(named, failures["reason"], strict=True)}


def test_every_failure_says_what_it_was_and_what_to_do(first: Call) -> None:
    found = reasons(first)
    assert "the loss is" in found["diverging"] or "the gradient norm is" in found["diverging"]
    assert "out of memory" in found["huge"]
    assert "lower training.micro_batch_size" in found["huge"]
    assert "died 2 times: killed" in found["killed"]
    assert "execution.trials" in found["killed"]
    assert "damaged" in found["vector own"]
    assert "run the sweep again" in found["vector own"]
    assert found["steered"] == "needs vector own, which failed"
    assert set(found) == {"diverging", "huge", "killed", "steered", "vector own"}


def test_every_failed_run_has_the_last_lines_of_its_log(first: Call) -> None:
    tails = first.results.runs().set_index("run")["log_tail"]
    assert "TrainingError" in tails["diverging"].splitlines()[-1]
    assert "failed: RuntimeError" in tails["huge"].splitlines()[-1]
    assert tails["killed"].splitlines()[-1].split(" ", 1)[1].startswith("step 3/3")
    assert tails[["base", "sound", "steered"]].isna().all()


def steps(results: Results) -> dict[str, list[int]]:
    return {str(run): rows.tolist() for run, rows in results.training().groupby("run")["step"]}


def test_a_diverged_run_shows_its_steps_up_to_its_end(first: Call) -> None:
    found = steps(first.results)
    assert found["sound"] == [1, 2]
    assert found["diverging"] == [1], "the second has no finite loss"
    assert set(found) == {"sound", "diverging"}


def test_the_next_call_does_just_what_is_missing(
    first: Call, sweep_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = first.results.training().query("run == 'sound'")
    second = call(sweep_file, monkeypatch, "execution.max_retries=0")
    assert sorted(second.begun) == ["diverging", "huge", "killed", "steered", "vector own"]
    assert second.status == 3
    status = second.results.runs().set_index("run")["status"]
    assert status[status == "failed"].index.tolist() == ["diverging", "huge"]
    assert set(status.drop(["diverging", "huge"])) == {"done"}
    assert steps(second.results) == {"sound": [1, 2], "diverging": [1], "killed": [1, 2, 3], "steered": [1, 2]}
    pd.testing.assert_frame_equal(second.results.training().query("run == 'sound'"), sound)
    failures = json.loads((second.results.root / "sweeps/tiny/failures.json").read_text())
    assert len(failures) == 2, "those of the call before are history"
