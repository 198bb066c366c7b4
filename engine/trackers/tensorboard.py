"""TensorBoard: one folder of event files per run, named as the run is, in ``<store>/sweeps/<name>/tensorboard``."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.trackers.base import Place, Step, TrackedRun, Tracker, TrackerConfig, package_faults

FOLDER = "tensorboard"
EVENT_FILES = "events.out.tfevents.*"


class TensorboardConfig(TrackerConfig):
    """Event files in the sweep's folder of the store. There is nothing to set: ``{}``."""

    def faults(self, environment: Mapping[str, str]) -> Iterable[tuple[str, str]]:
        del environment
        return package_faults(["tensorboardX"], "tensorboardX")

    def destination(self, place: Place) -> str:
        del place
        return FOLDER

    def still_has(self, place: Place, run: TrackedRun) -> bool:
        files = (place.folder / FOLDER / place.folder_names[run.id]).glob(EVENT_FILES)
        return any(file.stat().st_size for file in files)

    def is_tidy(self, place: Place) -> bool:
        return not list(folders_of_others(place))

    def make(self, place: Place) -> Tracker:
        return TensorboardTracker(place)


class TensorboardTracker:
    """Writes event files. A run that begins again gets a new file with all of its steps; its old ones are emptied.

    They are emptied and not removed, and the new name sorts after theirs: TensorBoard's own reader stays for good at
    the file it was reading when that is gone, and goes on from it to the next name when it ends.

    tensorboardX's ``SummaryWriter`` is not used: it writes in a thread of its own whose errors (a full disk) nobody
    hears of.
    """

    def __init__(self, place: Place) -> None:
        self.folder = place.folder / FOLDER
        self.names = place.folder_names
        self.writers: dict[str, Any] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        for folder in folders_of_others(place):
            shutil.rmtree(folder)

    def begin(self, run: TrackedRun) -> int:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder = self.folder / self.names[run.id]
        folder.mkdir(exist_ok=True)
        olds = sorted(folder.glob(EVENT_FILES))
        for old in olds:
            os.truncate(old, 0)
        writer = EventsWriter(str(folder / "events"), filename_suffix=f".{len(olds):06d}")
        # A TensorBoard that has read the old file is open: this makes it forget what it read.
        writer.write_event(Event(wall_time=time.time(), step=0, session_log=SessionLog(status=SessionLog.START)))
        writer.flush()
        self.writers[run.id] = writer
        return 0

    def log(self, run: TrackedRun, steps: Sequence[Step]) -> None:
        for step in steps:
            self._scalars(run, step.figures, step.number, step.time_s)
        self.writers[run.id].flush()

    def finish(self, run: TrackedRun, metrics: Mapping[str, float], last_step: int) -> None:
        from tensorboardX.summary import hparams

        self._scalars(run, metrics, last_step, time.time())
        settings = {name: value for name, value in run.config.items() if value is not None}
        # The first of the three would declare the columns of the whole sweep, which differ from run to run; TensorBoard
        # makes them itself from the others.
        _, start, end = hparams(settings, dict(metrics))
        for summary in (start, end):
            self._write(run, summary, 0, time.time())
        self.writers.pop(run.id).close()

    def fail(self, run: TrackedRun, reason: str) -> None:
        from tensorboardX.summary import text

        self._write(run, text("failure", reason), 0, time.time())
        self.writers.pop(run.id).close()

    def close(self) -> None:
        while self.writers:
            self.writers.popitem()[1].close()

    def _scalars(self, run: TrackedRun, figures: Mapping[str, float], step: int, time_s: float) -> None:
        from tensorboardX.summary import scalar

        for name, value in figures.items():
            self._write(run, scalar(name, value), step, time_s)

    def _write(self, run: TrackedRun, summary: Any, step: int, time_s: float) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self.writers[run.id].write_event(Event(wall_time=time_s, step=step, summary=summary))


def folders_of_others(place: Place) -> Iterator[Path]:
    """Folders with nothing but event files of runs that the sweep no longer has, or has under another name."""
    root = place.folder / FOLDER
    known = set(place.folder_names.values())
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if folder.name not in known and folder.is_dir():
            ours = list(folder.glob(EVENT_FILES))
            if ours and len(ours) == len(list(folder.iterdir())):
                yield folder
