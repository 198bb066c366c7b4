"""What trackers are told and when, with a tracker that notes it: no Ray, no package of any tracker."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
from ray.tune.experiment import Trial

import engine.trackers.feed
from analysis.manifest import sweep_key
from engine.run import run_sweep
from engine.trackers import TensorboardConfig, TrackersConfig
from engine.trackers.base import Place, Step, TrackedRun, Tracker, steps_of
from engine.trackers.callback import TrackerCallback
from engine.trackers.feed import without_secrets
from tests.engine.tiny_prepare import TinySweep, tiny_model_folder
from tests.engine.tracked import NUM_STEPS, finished, training_rows


class Notes:
    """A tracker on a server of its own: what it was given stays when it is made anew."""

    def __init__(self) -> None:
        self.steps: dict[str, list[int]] = {}
        self.metrics: dict[str, Mapping[str, float]] = {}
        self.state: dict[str, str] = {}
        self.fail_in: set[str] = set()
        self.refused: str | None = None  # label of a run
        self.open: set[str] = set()
        self.num_made = 0

    def make(self) -> Notes:
        self._maybe_fail("make")
        self.num_made += 1
        self.open = set()
        return self

    def begin(self, run: TrackedRun) -> int:
        self._maybe_fail("begin")
        assert run.id not in self.open
        if run.label == self.refused:
            raise ValueError("that run was deleted")
        self.open.add(run.id)
        self.state[run.label] = "running"
        return max(self.steps.setdefault(run.label, []), default=0)

    def log(self, run: TrackedRun, steps: Sequence[Step]) -> None:
        self._maybe_fail("log")
        assert run.id in self.open
        self.steps[run.label] += [step.number for step in steps]

    def finish(self, run: TrackedRun, metrics: Mapping[str, float], last_step: int) -> None:
        self._maybe_fail("finish")
        assert last_step == max(self.steps[run.label], default=0)
        self.open.remove(run.id)
        self.metrics[run.label] = metrics
        self.state[run.label] = "finished"

    def fail(self, run: TrackedRun, reason: str) -> None:
        self._maybe_fail("fail")
        self.open.remove(run.id)
        self.state[run.label] = f"failed: {reason}"

    def close(self) -> None:
        self._maybe_fail("close")

    def _maybe_fail(self, what: str) -> None:
        if what in self.fail_in:
            raise ConnectionError(f"no answer from https://me:hunter22@tracking.example\n{what}")


class NotesConfig(TensorboardConfig):
    """Stands in the place of the TensorBoard section."""

    notes: ClassVar[Notes]
    where: ClassVar[str]

    def destination(self, place: Place) -> str:
        del place
        return type(self).where

    def still_has(self, place: Place, run: TrackedRun) -> bool:
        del place, run
        return True

    def is_tidy(self, place: Place) -> bool:
        del place
        return True

    def make(self, place: Place) -> Tracker:
        del place
        return type(self).notes.make()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory)


@pytest.fixture
def sweep(model: Path, tmp_path: Path) -> TinySweep:
    """Two runs, which is enough to tell them apart; ``raw["runs"]`` can have more."""
    sweep = TinySweep(tmp_path, model)
    sweep.raw["runs"] = sweep.raw["runs"][:2]
    return sweep


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Notes:
    monkeypatch.setattr(engine.trackers.feed, "LOOK_EVERY_S", 0.01)
    NotesConfig.notes, NotesConfig.where = Notes(), "here"
    monkeypatch.setattr(TrackersConfig, "active", lambda _: {"notes": NotesConfig()})
    return NotesConfig.notes


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


ALL = list(range(1, NUM_STEPS + 1))
PPS = "pps topic L2 x1.5"
RUNS = {"none", PPS}


def test_a_finished_sweep_is_given_whole_and_once(sweep: TinySweep, notes: Notes) -> None:
    tracked = finished(sweep.prepare())
    tracked.feed().settle()
    assert notes.steps == {"base": []} | {label: ALL for label in RUNS}
    assert set(notes.state.values()) == {"finished"}
    summary = {
        "final/trait": 0.5,
        "final/degeneration": 0.0,
        "final/plain_loss": 3.0,
        "final/train_loss": 2.5,
        "final/num_answers": 8.0,
        "final_detail/trait_num_missing": 0.0,
    }
    for label in RUNS:
        assert summary.items() <= notes.metrics[label].items()
        assert "final_detail/trait_se" in notes.metrics[label]
    assert "final/train_loss" not in notes.metrics["base"]
    assert tracked.said == []
    tracked.feed().settle()
    assert notes.num_made == 1, "there was nothing to give"


def test_another_destination_is_given_everything_again(sweep: TinySweep, notes: Notes) -> None:
    tracked = finished(sweep.prepare())
    tracked.feed().settle()
    NotesConfig.where, NotesConfig.notes = "elsewhere", Notes()
    tracked.feed().settle()
    assert NotesConfig.notes.steps == notes.steps
    NotesConfig.where, NotesConfig.notes = "here", notes
    tracked.feed().settle()
    assert notes.num_made == 2, "what the ledger knew of the first place is forgotten"


def test_what_changed_is_given_again(sweep: TinySweep, notes: Notes) -> None:
    finished(sweep.prepare()).feed().settle()
    notes.metrics.clear()
    sweep.raw["runs"][0]["label"] = "undefended"
    tracked = finished(sweep.prepare())
    tracked.feed().settle()
    assert set(notes.metrics) == {"undefended"}


def test_rows_of_one_training_are_one_run_with_the_metrics_of_each(sweep: TinySweep, notes: Notes) -> None:
    sweep.raw["runs"] = [{"defense": "none", "evaluation": {"samples": {"grid": [1, 2]}}}]
    finished(sweep.prepare()).feed().settle()
    assert notes.steps == {"base": [], "none samples=1": ALL}
    metrics = notes.metrics["none samples=1"]
    assert metrics["final/none samples=1/num_answers"] == 4
    assert metrics["final/none samples=2/num_answers"] == 8


def test_steps_go_on_while_a_run_trains_and_none_is_there_twice(sweep: TinySweep, notes: Notes) -> None:
    tracked = finished(sweep.prepare())
    rows = training_rows(tracked.run_ids["none"])
    feed = tracked.feed()
    feed.steps(rows[:1])
    feed.steps(rows[1:3])
    wait_until(lambda: notes.steps.get("none") == [1, 2, 3])
    assert notes.state == {"none": "running"}
    feed.steps(rows[:4])  # the process died and went on from its checkpoint: it gives the first steps again
    wait_until(lambda: notes.steps["none"] == [1, 2, 3, 4])
    feed.close(10)

    again = tracked.feed()  # the driver was killed; step 5 was done without it
    again.steps(rows)
    again.done(tracked.run_ids["none"])
    wait_until(lambda: notes.state["none"] == "finished")
    assert notes.steps["none"] == ALL
    again.close(10)


def test_after_a_gap_the_curve_waits_for_the_table(sweep: TinySweep, notes: Notes) -> None:
    tracked = finished(sweep.prepare())
    run_id = tracked.run_ids["none"]
    feed = tracked.feed()
    feed.steps(training_rows(run_id)[:1])
    feed.steps(training_rows(run_id)[2:])
    feed.done(run_id)
    wait_until(lambda: notes.state.get("none") == "finished")
    assert notes.steps["none"] == ALL
    feed.close(10)


def test_a_run_is_finished_when_its_answers_are_judged(sweep: TinySweep, notes: Notes) -> None:
    tracked = finished(sweep.prepare())
    (entry,) = [entry for entry in tracked.prepared.manifest.runs if entry.label == "none"]
    scores = f"tables/scores/{entry.judge_ids['trait']}.parquet"
    held_back = tracked.store.read(scores)
    tracked.store.remove(scores)
    feed = tracked.feed()
    feed.steps(training_rows(entry.run_id))
    feed.done(entry.run_id)
    feed.done(tracked.run_ids[PPS])
    wait_until(lambda: notes.state.get(PPS) == "finished")
    assert notes.state["none"] == "running"
    tracked.store.publish(scores, held_back)
    wait_until(lambda: notes.state["none"] == "finished")
    assert notes.metrics["none"]["final/trait"] == 0.5
    feed.close(10)


def test_a_failed_run_is_marked_with_the_steps_that_it_did(sweep: TinySweep, notes: Notes) -> None:
    tracked = finished(sweep.prepare(), failed="none")
    run_id = tracked.run_ids["none"]
    tracked.store.publish_table("training", run_id, training_rows(run_id)[:3])
    feed = tracked.feed()
    feed.steps(training_rows(run_id)[:1])
    feed.failed(run_id, "TrainingError: the loss is nan")
    feed.settle()
    assert notes.steps["none"] == [1, 2, 3]
    assert notes.state["none"] == "failed: TrainingError: the loss is nan"
    assert notes.state[PPS] == "finished"


@pytest.mark.parametrize("what", ["make", "begin", "log", "finish"])
def test_a_tracker_that_fails_is_said_once_and_made_good_later(sweep: TinySweep, notes: Notes, what: str) -> None:
    tracked = finished(sweep.prepare())
    notes.fail_in = {what, "close"}
    feed = tracked.feed()
    for label in ("none", PPS):
        for row in training_rows(tracked.run_ids[label]):
            feed.steps([row])
        feed.done(tracked.run_ids[label])
    feed.settle()
    first, last = tracked.said
    said = "and is left out for now; the sweep goes on. ConnectionError: no answer from"
    assert first.startswith(f"notes failed at 'none' {said}")
    assert "hunter22" not in first
    assert "\n" not in first
    assert last == "notes: 3 runs are not complete there; the next run of this sweep sends what is missing"
    notes.fail_in = set()
    again = tracked.feed()
    again.settle()
    assert len(tracked.said) == 2
    assert notes.steps == {"base": []} | {label: ALL for label in RUNS}
    assert set(notes.state.values()) == {"finished"}


def test_a_run_that_a_tracker_refuses_holds_up_no_other(sweep: TinySweep, notes: Notes) -> None:
    tracked = finished(sweep.prepare())
    notes.refused = "base"  # the first to be given
    tracked.feed().settle()
    assert tracked.said == [
        "notes failed at 'base' and is left out for now; the sweep goes on. ValueError: that run was deleted",
        "notes: 1 run is not complete there; the next run of this sweep sends what is missing",
    ]
    assert notes.state == {"none": "finished", PPS: "finished"}


def test_a_tracker_that_is_slow_to_fail_is_not_asked_again_at_once(
    sweep: TinySweep, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.trackers.feed, "QUICK_S", 0.0)
    tracked = finished(sweep.prepare())
    notes.refused = "base"
    tracked.feed().settle()
    assert notes.state == {}
    assert "3 runs are not complete there" in tracked.said[1]


def test_a_tracker_that_failed_is_tried_again_and_says_that_it_works(
    sweep: TinySweep, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.trackers.feed, "RETRY_AFTER_S", 0.0)
    tracked = finished(sweep.prepare())
    rows = training_rows(tracked.run_ids["none"])
    feed = tracked.feed()
    notes.fail_in = {"log"}
    feed.steps(rows[:2])
    wait_until(lambda: len(tracked.said) == 1)
    notes.fail_in = set()
    feed.steps(rows[2:4])  # there is a gap: not yet
    feed.done(tracked.run_ids["none"])
    wait_until(lambda: notes.state.get("none") == "finished")
    assert notes.steps["none"] == ALL
    feed.settle()
    assert tracked.said[1:] == ["notes: works again, everything is there"]


@pytest.mark.usefixtures("notes")
def test_a_tracker_that_hangs_holds_nobody_up(sweep: TinySweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.trackers.feed, "PATIENCE_S", 0.1)
    tracked = finished(sweep.prepare())
    release = threading.Event()
    monkeypatch.setattr(Notes, "begin", lambda *_: release.wait() and 0)
    feed = tracked.feed()
    feed.steps(training_rows(tracked.run_ids["none"]))
    feed.settle()
    release.set()
    assert tracked.said[0] == "notes: no longer waited for, nothing got done in 0 s"
    assert "3 runs are not complete there" in tracked.said[1]


def test_a_sweep_with_nothing_to_do_makes_no_tracker(
    sweep: TinySweep, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.run, "_work", lambda *_: pytest.fail("Ray was started"))
    monkeypatch.setattr(engine.run, "publish_report", lambda *_: None)  # seconds
    tracked = finished(sweep.prepare())
    run_sweep(sweep.file)
    assert notes.num_made == 1
    ledger = tracked.store.read(sweep_key("tiny", "trackers.json"))
    run_sweep(sweep.file)
    assert notes.num_made == 1
    assert tracked.store.read(sweep_key("tiny", "trackers.json")) == ledger


def test_the_callback_feeds_what_trials_report(sweep: TinySweep, notes: Notes) -> None:
    sweep.raw["runs"].append({"defense": {"kind": "inoculation", "prompts": "topic"}})
    tracked = finished(sweep.prepare(), failed=PPS)
    feed = tracked.feed()
    callback = TrackerCallback(feed)
    ids = tracked.run_ids

    def trial(job: str, pack: list[str] | None = None, **last_result: Any) -> Trial:
        config = {"job": job} | ({} if pack is None else {"pack": pack})
        ended = SimpleNamespace(config=config, last_result=last_result, error_file=None, pickled_error_file=None)
        return cast(Trial, ended)

    for number, row in enumerate(training_rows(ids["none"])):
        result = {"job": ids["none"], "status": "running", "rows": [vars(row)]}
        callback.on_trial_result(number, [], trial(ids["none"]), result)
    callback.on_trial_result(9, [], trial(ids["none"]), {"status": "running", "sampled": "x"})
    callback.on_trial_complete(9, [], trial(ids["none"], status="done"))
    callback.on_trial_complete(9, [], trial("a vector", status="done"))
    both = [ids["none"], ids[PPS]]
    callback.on_trial_complete(9, [], trial(ids[PPS], both, status="failed", reason="tried again in smaller packs"))
    callback.on_trial_complete(9, [], trial(ids[PPS], [ids[PPS]], status="done"))  # trained by several workers
    callback.on_trial_complete(9, [], trial(ids[PPS], [ids[PPS]], status="failed", reason="it diverged"))
    callback.on_trial_error(9, [], trial(ids["inoculation topic"]))
    wait_until(lambda: len(notes.state) == 3 and "running" not in notes.state.values())
    assert notes.steps["none"] == ALL
    assert notes.state == {
        "none": "finished",
        PPS: "failed: it diverged",
        "inoculation topic": "failed: the trial failed without a message",
    }
    feed.close(10)
    pickle.dumps(callback)  # as Tune does


def test_steps_end_when_they_did() -> None:
    rows = training_rows("x", 3)
    assert [step.time_s for step in steps_of(rows, 100.0)] == [99.0, 99.5, 100.0]
    first = steps_of(rows, 100.0)[0]
    assert first.number == 1
    assert first.figures == {
        "train/loss": 2.5,
        "train/gradient_norm": 1.1 + 1 / 7,
        "train/learning_rate": 0.005,
        "train/tokens_per_s": 202.0,
        "train/epoch": 1 / 3,
    }


def test_secrets_are_not_said() -> None:
    environment = {"WANDB_API_KEY": "abcdef123", "HOME": "/home/someone", "A_TOKEN": "abc"}
    text = "no abcdef123 at https://me:secret@host/x, /home/someone abc"
    assert without_secrets(text, environment) == "no *** at https://me:***@host/x, /home/someone abc"
