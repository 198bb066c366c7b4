"""From the sweep to its trackers: live while runs train, and whole from the store's tables when they are done.

Every tracker has a thread of its own, so a server that is slow or gone holds nobody up. What a tracker could not be
given, because it failed, was switched on later, or the driver was killed, it is given by the next invocation.
"""

from __future__ import annotations

import datetime
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeAlias

from analysis.manifest import Manifest, read_run_record, run_key
from analysis.remote import Remote
from analysis.results import load
from engine.store import Store
from engine.trackers import TrackersConfig
from engine.trackers.base import Place, TrackedRun, Tracker, TrackerConfig, steps_of, tracked_runs
from engine.trackers.exports import Ledger, final_metrics, is_complete, is_evaluated, training_rows
from trainables.embedded import cache_folder
from trainables.rows import TrainingRow

RETRY_AFTER_S = 60.0  # a tracker that failed is left alone for so long
QUICK_S = 5.0  # a refusal within so long is about one run; a tracker that is slow to fail would hold up all others
LOOK_EVERY_S = 2.0  # whether the answers of a run that is done have been judged
PATIENCE_S = 90.0  # a tracker that gets nothing done for so long is not waited for at the end

Action: TypeAlias = Callable[[Tracker], None]


class Feed:
    """All trackers of a sweep, in its driver. Nothing is started or imported until there is something to give.

    ``name`` is what the sweep is called in trackers; ``say`` prints one line.
    """

    def __init__(
        self, config: TrackersConfig, manifest: Manifest, store: Store, name: str, say: Callable[[str], None]
    ) -> None:
        self.runs = tracked_runs(manifest)
        self.store = store
        self.failed_runs: set[str] = set()
        folder = tracker_folder(store, manifest.name)
        ledger = Ledger(store, manifest.name)
        place = Place(folder, name, tuple(self.runs.values()))
        self.threads = [TrackerThread(kind, one, place, store, ledger, say) for kind, one in config.active().items()]

    def steps(self, rows: Sequence[TrainingRow]) -> None:
        """Optimizer steps, of any runs, in order."""
        for thread in self.threads:
            thread.log(rows)

    def done(self, job_id: str) -> None:
        """A job is done: its run is finished in the trackers when its answers have been judged."""
        if job_id in self.runs:
            for thread in self.threads:
                thread.finish_when_judged(self.runs[job_id])

    def failed(self, job_id: str, reason: str) -> None:
        """A job failed for good."""
        if job_id in self.runs:
            self.failed_runs.add(job_id)
            for thread in self.threads:
                thread.fail(self.runs[job_id], reason)

    def settle(self) -> None:
        """Give every tracker what it lacks of the runs that are done, whoever did them and when, and wait for it."""
        done = [run for run in self.runs.values() if run.id not in self.failed_runs and is_evaluated(self.store, run)]
        for thread in self.threads:
            thread.settle(done)
        self.close(PATIENCE_S)
        for thread in self.threads:
            thread.say_what_is_missing(done)

    def close(self, patience_s: float) -> None:
        """Stop. What is still to be given is given unless a tracker gets nothing done for ``patience_s``."""
        for thread in self.threads:
            thread.stop()
        for thread in self.threads:
            thread.wait(patience_s)


class TrackerThread:
    """One tracker and the thread that it works in. Whatever it raises is said once and ends nothing."""

    def __init__(
        self,
        name: str,
        config: TrackerConfig,
        place: Place,
        store: Store,
        ledger: Ledger,
        say: Callable[[str], None],
    ) -> None:
        self.name = name
        self.config = config
        self.place = place
        self.store = store
        self.ledger = ledger
        self.say = say
        self.destination = config.destination(place)
        self.runs: Mapping[str, TrackedRun] = {run.id: run for run in place.runs}
        self.tracker: Tracker | None = None
        self.last_step: dict[str, int] = {}  # of every run that has begun and not ended
        self.waiting: dict[str, TrackedRun] = {}
        self.closed_until = 0.0
        self.has_failed = False
        self.last_active = time.monotonic()
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._has_given_up = False
        self._thread: threading.Thread | None = None
        self._stopped = False

    def log(self, rows: Sequence[TrainingRow]) -> None:
        """Steps that were just done, or that a resumed training gives again: those the tracker has are left out."""
        now = time.time()
        for run_id in dict.fromkeys(row.train_id for row in rows):
            of_run = [row for row in rows if row.train_id == run_id]
            self._put(partial(self._try, run_id, partial(self._log, self.runs[run_id], of_run, now)))

    def finish_when_judged(self, run: TrackedRun) -> None:
        """The run's job is done."""
        self._put(partial(self.waiting.update, {run.id: run}))

    def fail(self, run: TrackedRun, reason: str) -> None:
        """The run's job failed."""
        self._put(partial(self._try, run.id, partial(self._fail, run, reason)))

    def settle(self, done: Sequence[TrackedRun]) -> None:
        """Give the tracker those of the runs that it does not have as they are now."""
        if self._thread is not None or not self.config.is_tidy(self.place) or self._missing(done):
            self._put(partial(self._settle, done))

    def stop(self) -> None:
        """Nothing more will be put."""
        if self._thread is not None and not self._stopped:
            self._stopped = True
            self._queue.put(None)

    def wait(self, patience_s: float) -> None:
        """Wait until everything is given, unless nothing gets done for ``patience_s``."""
        began = time.monotonic()
        while self._thread is not None and self._thread.is_alive() and not self._has_given_up:
            if time.monotonic() - max(self.last_active, began) > patience_s:
                self._has_given_up = True
                self.say(f"{self.name}: no longer waited for, nothing got done in {patience_s:.0f} s")
            self._thread.join(0.2)

    def say_what_is_missing(self, done: Sequence[TrackedRun]) -> None:
        """Say if the tracker, which failed before, was not given everything in the end."""
        missing = self._missing(done)
        if missing:
            count = f"{len(missing)} run{'s are' if len(missing) != 1 else ' is'}"
            self.say(f"{self.name}: {count} not complete there; the next run of this sweep sends what is missing")
        elif self.has_failed and done:
            self.say(f"{self.name}: works again, everything is there")

    def _missing(self, done: Sequence[TrackedRun]) -> list[TrackedRun]:
        """Those of the runs that the tracker does not have as they are now."""
        return [
            run
            for run in done
            if not self.ledger.has(self.name, self.destination, run) or not self.config.still_has(self.place, run)
        ]

    def _put(self, item: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"tracker {self.name}", daemon=True)
            self._thread.start()
        self._queue.put(item)

    def _work(self) -> None:
        while True:
            try:
                item = self._queue.get(timeout=LOOK_EVERY_S if self.waiting else None)
            except queue.Empty:
                item = _nothing
            if item is None:
                break
            item()
            for run in [run for run in self.waiting.values() if is_complete(self.store, run)]:
                self._try(run.id, partial(self._finish, run))
        if self.tracker is not None:
            self._try(None, lambda tracker: tracker.close())

    def _try(self, run_id: str | None, action: Action) -> None:
        """Do something for a run (None: for no run in particular), unless the tracker is left alone just now."""
        if time.monotonic() < self.closed_until:
            return
        try:
            if self.tracker is None:
                self.tracker = self.config.make(self.place)
            action(self.tracker)
        except Exception as error:  # noqa: BLE001  whatever a tracker raises must not reach the sweep; it is said
            self._leave_alone(error, run_id)
        self.last_active = time.monotonic()

    def _leave_alone(self, error: Exception, run_id: str | None) -> None:
        if self.tracker is not None:
            with suppress(Exception):  # what is wrong with it is said below
                self.tracker.close()
        self.tracker = None
        self.last_step.clear()
        self.closed_until = time.monotonic() + RETRY_AFTER_S
        if not self.has_failed:
            self.has_failed = True
            lines = without_secrets(f"{type(error).__name__}: {error}", os.environ).strip().splitlines()
            where = f" at {self.runs[run_id].label!r}" if run_id is not None else ""
            self.say(f"{self.name} failed{where} and is left out for now; the sweep goes on. {lines[0][:300]}")

    def _settle(self, done: Sequence[TrackedRun]) -> None:
        self._try(None, _open)  # which puts in order what else it shows
        for run in self._missing(done):
            began, before = time.monotonic(), self.closed_until
            self._try(run.id, partial(self._finish, run))
            if self.closed_until != before and time.monotonic() - began < QUICK_S:
                self.closed_until = 0.0

    def _fail(self, run: TrackedRun, reason: str, tracker: Tracker) -> None:
        self._log(run, training_rows(self.store, run.id), time.time(), tracker)
        tracker.fail(run, reason)
        del self.last_step[run.id]

    def _finish(self, run: TrackedRun, tracker: Tracker) -> None:
        """Give the tracker the whole run as the store has it: what it has of it already is left out."""
        digest = self.ledger.digest(run)
        rows = training_rows(self.store, run.id)
        record = read_run_record(self.store.location / run_key(run.id)) if run.kind == "run" else None
        self._log(run, rows, utc_seconds(record.finished_utc) if record else time.time(), tracker)
        results = load(self.store.sweep(self.place.folder.name))
        tracker.finish(run, final_metrics(results, run), rows[-1].step if rows else 0)
        del self.last_step[run.id]
        self.waiting.pop(run.id, None)
        self.ledger.note(self.name, self.destination, run, digest)

    def _log(self, run: TrackedRun, rows: Sequence[TrainingRow], end_s: float, tracker: Tracker) -> None:
        if run.id not in self.last_step:
            self.last_step[run.id] = tracker.begin(run)
        new = [step for step in steps_of(rows, end_s) if step.number > self.last_step[run.id]]
        # After a gap nothing is logged: W&B takes no earlier step afterwards, and the table will have all of them.
        if new and new[0].number == self.last_step[run.id] + 1:
            tracker.log(run, new)
            self.last_step[run.id] = new[-1].number


def tracker_folder(store: Store, sweep: str) -> Path:
    """Where trackers that write files write them: the sweep's folder in the store, or if that is in an object store,
    one of this user's on this machine with the same layout."""
    if not isinstance(store.location, Remote):
        return store.root / "sweeps" / sweep
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", store.location.url)
    folder = cache_folder() / "trackers" / name / "sweeps" / sweep
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _nothing() -> None:
    """Only time has passed."""


def _open(tracker: Tracker) -> None:
    """Nothing but what making the tracker does."""


def utc_seconds(text: str) -> float:
    """Seconds since 1970 of a time as run.json has it."""
    return datetime.datetime.fromisoformat(text).timestamp()


def without_secrets(text: str, environment: Mapping[str, str]) -> str:
    """``text`` without what stands in variables that hold keys, and without passwords in URLs."""
    for name, value in environment.items():
        if re.search(r"KEY|TOKEN|PASSWORD|SECRET", name) and len(value) >= 6:
            text = text.replace(value, "***")
    return re.sub(r"(://[^/@\s:]*):[^/@\s]*@", r"\1:***@", text)
