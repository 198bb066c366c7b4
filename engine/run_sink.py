"""Where a trial's training puts what it makes: the store, and reports to the driver."""

from __future__ import annotations

import datetime
import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from analysis.manifest import adapter_key, log_key
from engine.store import Store
from trainables.rows import SignalRow, TrainingRow
from trainables.tune_trainable import Report


def utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def says_it_waits(report: Report) -> Callable[[], None]:
    """What a trial that waits for another sweep's claim calls meanwhile."""
    return functools.partial(report, phase="waits for another sweep that does this", units_done=0, units_total=1)


def checkpoint_key(train_id: str) -> str:
    """Where a training that is not done keeps its last checkpoint."""
    return f"runs/{train_id}/checkpoint"


@dataclass
class StoreSink:
    """The RunSink of a trial: log lines at once, rows together when a phase is done."""

    store: Store
    run_id: str
    report: Report
    training_rows: list[TrainingRow] = field(default_factory=list)
    unreported_rows: list[TrainingRow] = field(default_factory=list)
    signal_rows: list[SignalRow] = field(default_factory=list)

    def log(self, message: str) -> None:
        self.store.append_line(log_key(self.run_id), f"{utc_now()} {message}")

    def progress(self, *, phase: str, done: int, total: int, **figures: float) -> None:
        rows, self.unreported_rows = self.unreported_rows, []
        self.report(last=done == total, rows=rows, phase=phase, units_done=done, units_total=total, **figures)

    def training(self, row: TrainingRow) -> None:
        self.training_rows.append(row)
        self.unreported_rows.append(row)

    def signal(self, row: SignalRow) -> None:
        self.signal_rows.append(row)

    def adapter(self, train_id: str, folder: Path) -> None:
        self.store.publish(adapter_key(train_id), folder)
        shutil.rmtree(folder)

    def checkpoint(self, train_id: str, folder: Path) -> None:
        self.store.publish(checkpoint_key(train_id), folder)
        shutil.rmtree(folder)

    def load_checkpoint(self, train_id: str) -> Path | None:
        key = checkpoint_key(train_id)
        return self.store.path(key) if self.store.is_complete(key) else None
