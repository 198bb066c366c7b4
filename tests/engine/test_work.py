"""What a trial leaves in the store, without Ray."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import engine.disk
import trainables.train
from analysis.manifest import run_key
from analysis.results import Results, load
from engine.prepare import Prepared
from engine.run import write_sweep
from engine.store import Store
from tests.engine.tiny_prepare import TinySweep, tiny_model_folder
from tests.engine.tiny_work import work_in, work_on
from trainables.checkpoint import NO_CHECKPOINTS, CheckpointSettings
from trainables.errors import StoreError, TrainingError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    sweep = TinySweep(tmp_path_factory.mktemp("sweep"), tiny_model_folder(tmp_path_factory))
    sweep.raw["runs"] = [{"defense": "none"}]
    return sweep.prepare("training.max_steps=4", "evaluation.samples=1", "evaluation.max_new_tokens=2")


def run_id(prepared: Prepared) -> str:
    (found,) = (entry.run_id for entry in prepared.manifest.runs if entry.kind == "run")
    return found


def do(
    prepared: Prepared,
    folder: Path,
    checkpoints: CheckpointSettings = NO_CHECKPOINTS,
    report: Callable[..., None] = lambda **_: None,
) -> Store:
    """Train the run, in a store at ``folder``."""
    work = work_in(prepared, folder, checkpoints=checkpoints)
    work.run(run_id(prepared), report)
    return work.store


def results(folder: Path) -> Results:
    return load(folder / "sweeps" / "tiny")


@pytest.fixture(scope="module")
def undisturbed(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    folder = tmp_path_factory.mktemp("undisturbed") / "store"
    do(prepared, folder)
    return without_times(results(folder).training())


def without_times(training: pd.DataFrame) -> pd.DataFrame:
    return training.drop(columns="seconds")


def fail_at(step: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer step of this number raises, until the patch is undone."""
    original = trainables.train._checked_norm

    def failing(run: Any, *rest: Any) -> float:
        if run.step + 1 == step:
            raise error
        return original(run, *rest)

    monkeypatch.setattr(trainables.train, "_checked_norm", failing)


@pytest.mark.parametrize(
    ("error", "every_steps"),
    [(TrainingError("the gradient norm is nan"), None), (MemoryError(), 1)],
    ids=["diverged", "out of memory, with a checkpoint"],
)
def test_a_failed_training_keeps_its_steps_and_leaves_no_trace_when_it_is_completed(
    prepared: Prepared,
    undisturbed: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    every_steps: int | None,
) -> None:
    folder, checkpoints = tmp_path / "failed", CheckpointSettings(every_steps=every_steps)
    with monkeypatch.context() as patch:
        fail_at(3, error, patch)
        with pytest.raises(type(error)):
            do(prepared, folder, checkpoints)
    kept = results(folder)
    pd.testing.assert_frame_equal(without_times(kept.training()), undisturbed[:2])
    assert not (folder / run_key(run_id(prepared))).exists()
    assert kept.runs().set_index("run").loc["none", "status"] == "missing", "not done: it is tried again"
    store = do(prepared, folder, checkpoints)
    resumed = "resumed after step 2" in store.read(f"runs/{run_id(prepared)}/log.txt").decode()
    assert resumed is (every_steps is not None)
    pd.testing.assert_frame_equal(without_times(results(folder).training()), undisturbed)


def test_an_attempt_that_fails_sooner_replaces_the_steps_of_the_one_before(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (4, 2):
        with monkeypatch.context() as patch:
            fail_at(step, TrainingError("no luck"), patch)
            with pytest.raises(TrainingError):
                do(prepared, tmp_path / "failed")
        assert results(tmp_path / "failed").training()["step"].tolist() == list(range(1, step))


def test_steps_that_cannot_be_kept_do_not_hide_why_the_training_failed(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise StoreError("the disk is full")

    fail_at(3, TrainingError("the loss is nan"), monkeypatch)
    monkeypatch.setattr(Store, "publish_table", refuse)
    with pytest.raises(TrainingError, match="the loss is nan") as caught:
        do(prepared, tmp_path / "failed")
    assert caught.value.__notes__ == ["its steps could not be kept: the disk is full"]


def test_a_run_that_another_sweep_is_doing_is_waited_for_and_not_done_again(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both begin it at the same time; the other one is this thread, the one that waits does everything else alone."""
    monkeypatch.setattr(engine.disk, "CLAIM_RETRY_S", 0.01)
    done_by_the_other, folder = tmp_path / "other", tmp_path / "shared"
    do(prepared, done_by_the_other)
    waits = threading.Event()

    def noting(**figures: Any) -> None:
        if str(figures.get("phase", "")).startswith("waits"):
            waits.set()

    waiting = threading.Thread(target=do, args=(prepared, folder), kwargs={"report": noting})
    with Store.open(folder, create=True).claimed(run_id(prepared), lambda: None):
        waiting.start()
        assert waits.wait(60)
        for name in ("runs", "tables"):
            shutil.copytree(done_by_the_other / name, folder / name)
    waiting.join(60)
    log = Path("runs", run_id(prepared), "log.txt")
    assert (folder / log).read_text() == (done_by_the_other / log).read_text(), "nothing was done twice"


def test_a_damaged_input_is_said_to_be_damaged(prepared: Prepared, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "damaged", create=True)
    write_sweep(prepared, store)
    for name in store.names("inputs"):
        (store.root / "inputs" / name).write_bytes(b"garbage")
    work = work_on(prepared, store)
    with pytest.raises(StoreError, match=r"inputs/[0-9a-f]{64}: damaged, .* run the sweep again"):
        work.run(run_id(prepared), lambda **_: None)
