"""What is said of several workers when one goes wrong, and what the others leave alone. Without processes of Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from engine.store import Store
from engine.train_workers import WorkersDiedError, _cause, _Follower
from tests.engine.tracked import training_rows
from trainables.errors import TrainingError

LOST_PEER = RuntimeError("Connection closed by peer")


def failed(*errors: Exception) -> Exception:
    return _cause(WorkerGroupError("all of it", dict(enumerate(errors))))


def test_an_error_of_ours_comes_before_those_of_workers_that_lost_the_one_that_raised_it() -> None:
    ours = TrainingError("run x, step 3: the loss is nan")
    assert failed(LOST_PEER, ours, torch.OutOfMemoryError("CUDA out of memory")) is ours
    memory = torch.OutOfMemoryError("CUDA out of memory")
    assert failed(LOST_PEER, memory) is memory, "for which the scheduler says what to change"


def test_anything_else_is_worth_another_attempt_and_names_the_workers() -> None:
    error = failed(LOST_PEER, ValueError("two\nlines"))
    assert isinstance(error, WorkersDiedError)
    assert str(error) == "worker 0: RuntimeError: Connection closed by peer, worker 1: ValueError: two lines"
    of_ray = _cause(ControllerError(RuntimeError("no resources")))
    assert isinstance(of_ray, WorkersDiedError)
    assert "no resources" in str(of_ray)


def test_followers_write_nothing(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store"), create=True)
    before = sorted(tmp_path.rglob("*"))
    folder = tmp_path / "adapter"
    sink = _Follower(store, "0" * 12, lambda **_: pytest.fail("it reports"))
    sink.log("a line")
    sink.progress(phase="train", done=1, total=1)
    sink.training(training_rows("0" * 12, 1)[0])
    sink.adapter("0" * 12, folder)
    sink.checkpoint("0" * 12, folder)
    assert sorted(tmp_path.rglob("*")) == before
    assert sink.training_rows == []
    assert sink.load_checkpoint("0" * 12) is None
