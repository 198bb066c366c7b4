"""What a trial tells Tune: figures now and then, every optimizer step exactly once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import pytest

import trainables.tune_trainable
from engine.run_sink import StoreSink
from engine.store import Store
from tests.engine.tracked import training_rows
from trainables.errors import TrainingError
from trainables.tune_trainable import Report, tune_trainable

ROWS = training_rows("run")


@dataclass(frozen=True)
class Work:
    """A training with nothing to it."""

    sink: Callable[[Report], StoreSink]
    ends_with: Exception | None = None
    threads: int = 1

    def train_pack(self, job_ids: Sequence[str], note: str, report: Report) -> Mapping[str, float | str | int]:
        """Two runs at work side by side, of which one cannot go on."""
        assert note == "smaller"
        for step in (1, 2):
            for job_id in job_ids:
                report(job=job_id, phase="train", units_done=step, units_total=2)
        report(last=True, job=job_ids[1], pack_failed="TrainingError: it diverged")
        return {"pack_fits": 3}

    def run(self, job_id: str, report: Report, note: str = "") -> None:
        assert (job_id, note) == ("run", "")
        sink = self.sink(report)
        for row in ROWS[:2]:  # a resumed training gives these again
            sink.training(row)
        for row in ROWS[2:]:
            sink.training(row)
            sink.progress(phase="train", done=row.step, total=99, loss=row.loss)
        if self.ends_with is not None:
            raise self.ends_with


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(trainables.tune_trainable, "tune", SimpleNamespace(report=sent.append))
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    return sent


@pytest.mark.parametrize("interval_s", [0.0, 1000.0])
@pytest.mark.parametrize("error", [None, TrainingError("it diverged")])
def test_every_step_is_told_once_and_in_order(
    sent: list[dict[str, Any]],
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    interval_s: float,
    error: Exception | None,
) -> None:
    monkeypatch.setattr(trainables.tune_trainable, "REPORT_INTERVAL_S", interval_s)
    store = Store.open(tmp_path, create=True)
    tune_trainable({"job": "run"}, Work(lambda report: StoreSink(store, "run", report), error))
    assert [row for message in sent for row in message["rows"]] == [asdict(row) for row in ROWS]
    assert [message["status"] for message in sent[:-1]] == ["running"] * (len(sent) - 1)
    assert sent[-1]["status"] == ("done" if error is None else "failed")
    if interval_s == 0:
        assert [len(message["rows"]) for message in sent] == [3, 1, 1, 0]
        assert sent[0]["loss"] == ROWS[2].loss


def test_the_runs_of_a_pack_report_side_by_side(sent: list[dict[str, Any]]) -> None:
    tune_trainable({"job": "a", "pack": ["a", "b"], "note": "smaller"}, Work(sink=lambda _: pytest.fail("no run")))
    told = [(one["job"], one["status"], one.get("units_done")) for one in sent]
    assert told == [("a", "running", 1), ("b", "running", 1), ("b", "running", None), ("a", "done", None)]
    assert sent[2]["pack_failed"] == "TrainingError: it diverged"
    assert sent[3]["pack_fits"] == 3
