"""Checkpoints inside a training: all that ONE run needs to go on, in this or another pack, at any ZeRO stage.

A checkpoint is a folder with ``state.safetensors`` (what ``DeepSpeedDriver.export_run`` gives: adapter parameters and
AdamW state as full tensors) and ``checkpoint.json`` (format, run, and the rows of the ``training`` table so far, from
which step, losses and counts follow; those of ``signals``, if any). Nothing else is
needed: all randomness is counter-based.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from trainables.errors import ShiftgradError
from trainables.rows import RunSink, SignalRow, TrainingRow

FORMAT = 1
_STATE, _METADATA = "state.safetensors", "checkpoint.json"
_ROW_TYPES = get_type_hints(TrainingRow)
_SIGNAL_TYPES = get_type_hints(SignalRow)


class CheckpointError(ShiftgradError, ValueError):
    """A checkpoint cannot be used: torn, of another format, or of another run."""


class _Driver(Protocol):
    """What saving and resuming need of the optimizer driver."""

    def export_run(self, run: str) -> dict[str, torch.Tensor]: ...

    def import_run(self, run: str, state: Mapping[str, torch.Tensor]) -> None: ...


@dataclass(frozen=True)
class CheckpointSettings:
    """When a run is checkpointed: after every so many of its steps, and when so many minutes have passed.

    With both None no checkpoint is written. One that is there is resumed from in any case.
    """

    every_steps: int | None = None
    every_minutes: float | None = None

    def due(self, steps_done: int, seconds_since_last: float) -> bool:
        """Whether a run that has just done its step number ``steps_done`` is checkpointed now."""
        by_steps = self.every_steps is not None and steps_done % self.every_steps == 0
        return by_steps or (self.every_minutes is not None and seconds_since_last >= 60 * self.every_minutes)

    @property
    def enabled(self) -> bool:
        return self.every_steps is not None or self.every_minutes is not None


NO_CHECKPOINTS = CheckpointSettings()


def save_checkpoint(
    train_id: str,
    rows: Sequence[TrainingRow],
    driver: _Driver,
    sink: RunSink,
    signals: Sequence[SignalRow] = (),
) -> None:
    """Give the sink a checkpoint of the run as it is after its step ``len(rows)``; between steps only."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoint"
        write_checkpoint(folder, train_id, rows, driver.export_run(train_id), signals)
        sink.checkpoint(train_id, folder)


def resume(train_id: str, num_steps: int, driver: _Driver, sink: RunSink) -> tuple[list[TrainingRow], list[SignalRow]]:
    """Put the run where its sink's checkpoint left it; return the rows of its steps so far, which the sink gets again.

    Without a checkpoint, or with one that cannot be used (the log says why), nothing is touched and there are no rows.
    """
    folder = sink.load_checkpoint(train_id)
    if folder is None:
        return [], []
    try:
        rows, state = read_checkpoint(folder, train_id)
        signals = read_signals(folder)
        if len(rows) > num_steps:
            raise CheckpointError(f"it is {len(rows)} steps on, and the run has {num_steps}")
        driver.import_run(train_id, state)
    except ValueError as error:  # CheckpointError, or a state that does not fit this run's adapter
        sink.log(f"checkpoint ignored, the training starts over: {error}")
        return [], []
    for row in rows:
        sink.training(row)
    for signal in signals:
        sink.signal(signal)
    sink.log(f"resumed after step {len(rows)}")
    return rows, signals


def write_checkpoint(
    folder: Path,
    train_id: str,
    rows: Sequence[TrainingRow],
    state: Mapping[str, torch.Tensor],
    signals: Sequence[SignalRow] = (),
) -> None:
    """Write a checkpoint into the new folder ``folder``."""
    folder.mkdir()
    tensors = save(dict(state))
    (folder / _STATE).write_bytes(tensors)
    metadata: dict[str, Any] = {
        "format": FORMAT,
        "train_id": train_id,
        "state_sha256": hashlib.sha256(tensors).hexdigest(),
        "rows": [asdict(row) for row in rows],
    }
    if signals:
        metadata["signals"] = [asdict(signal) for signal in signals]
    (folder / _METADATA).write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")


def read_checkpoint(folder: Path, train_id: str) -> tuple[list[TrainingRow], dict[str, torch.Tensor]]:
    """Rows so far and the state of the run ``train_id``, to the bit as written, on the CPU.

    Raises CheckpointError if anything is missing or damaged, or if this is a checkpoint of another format or run.
    """
    try:
        metadata = json.loads((folder / _METADATA).read_bytes())
        content = (folder / _STATE).read_bytes()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"it cannot be read: {error}") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise CheckpointError(f"{_METADATA} is not of format {FORMAT}")
    if metadata.get("train_id") != train_id:
        raise CheckpointError(f"it is of run {metadata.get('train_id')}, not of run {train_id}")
    if hashlib.sha256(content).hexdigest() != metadata.get("state_sha256"):
        raise CheckpointError(f"{_STATE} is not the one that {_METADATA} was written with")
    rows = metadata.get("rows")
    if not isinstance(rows, list):
        raise CheckpointError(f"{_METADATA} has no rows")
    try:
        state: dict[str, torch.Tensor] = load(content)
    except SafetensorError as error:
        raise CheckpointError(f"{_STATE} cannot be read: {error}") from error
    return [_row(values, train_id, step) for step, values in enumerate(rows, start=1)], state


def read_signals(folder: Path) -> list[SignalRow]:
    """The rows of table ``signals`` of a checkpoint that ``read_checkpoint`` has taken. Raises CheckpointError."""
    listed = json.loads((folder / _METADATA).read_bytes()).get("signals", [])
    if not isinstance(listed, list) or any(
        not isinstance(one, dict) or one.keys() != _SIGNAL_TYPES.keys() for one in listed
    ):
        raise CheckpointError(f"the signals of {_METADATA} are none")
    return [SignalRow(**one) for one in listed]


def _row(values: Any, train_id: str, step: int) -> TrainingRow:
    """The row of step ``step``; JSON keeps a Python float to the bit."""
    sound = isinstance(values, dict) and {name: type(value) for name, value in values.items()} == _ROW_TYPES
    if not sound or (values["train_id"], values["step"]) != (train_id, step):
        raise CheckpointError(f"row {step} of {_METADATA} is not step {step} of run {train_id}")
    return TrainingRow(**values)
