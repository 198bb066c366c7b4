"""A RunSink for tests that keeps everything in memory."""

from __future__ import annotations

from pathlib import Path

from trainables.rows import SignalRow, TrainingRow


class MemorySink:
    """Keeps what it is given; a folder (the adapter's, each checkpoint's) as its files' bytes by name.

    ``resume_from``: the folder that a training finds as its checkpoint.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.phases: list[tuple[str, int, int]] = []
        self.rows: list[TrainingRow] = []
        self.signals: list[SignalRow] = []
        self.files: dict[str, bytes] = {}
        self.checkpoints: list[dict[str, bytes]] = []
        self.resume_from: Path | None = None

    def log(self, message: str) -> None:
        self.lines.append(message)

    def progress(self, *, phase: str, done: int, total: int, **figures: float) -> None:
        del figures
        self.phases.append((phase, done, total))

    def training(self, row: TrainingRow) -> None:
        self.rows.append(row)

    def signal(self, row: SignalRow) -> None:
        self.signals.append(row)

    def adapter(self, train_id: str, folder: Path) -> None:
        del train_id
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}

    def checkpoint(self, train_id: str, folder: Path) -> None:
        del train_id
        self.checkpoints.append({path.name: path.read_bytes() for path in folder.iterdir()})

    def load_checkpoint(self, train_id: str) -> Path | None:
        del train_id
        return self.resume_from
