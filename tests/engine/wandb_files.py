"""Reading what W&B writes in its offline mode.

A ``.wandb`` file is a log in LevelDB's format (blocks of 32 KiB; a record is cut where a block ends) behind a header of
7 bytes; its records are protocol buffers that the ``wandb`` package defines. The package itself reads it in Go only.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK = 32768
_HEADER = 7  # of the file: ":W&B", a magic number, a version; and of a part: checksum, length, kind
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    """What W&B would send of a run."""

    run_id: str = ""
    name: str = ""
    group: str = ""
    project: str = ""
    exit_code: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)  # a row per logged step, with ``_step``

    def curve(self, figure: str) -> dict[int, float]:
        """Value by step; a step that is there twice is an error."""
        rows = [row for row in self.history if figure in row]
        curve = {row["_step"]: row[figure] for row in rows}
        assert len(curve) == len(rows), "a step was logged twice"
        return curve


def offline_runs(folder: Path) -> dict[str, OfflineRun]:
    """Every run in the folder that ``WANDB_DIR`` would name, by its id; one that is there twice is an error.

    All have ended: W&B closes a run's file in a process of its own, an instant after ``finish`` has returned.
    """
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    deadline = time.monotonic() + 60
    runs = [read_run(file) for file in files]
    while any(run.exit_code is None for run in runs):
        assert time.monotonic() < deadline, "a run did not end"
        time.sleep(0.05)
        runs = [read_run(file) for file in files]
    found = {run.run_id: run for run in runs}
    assert len(found) == len(runs), "a run is there twice"
    return found


def read_run(file: Path) -> OfflineRun:
    """What one file says."""
    run = OfflineRun()
    for data in _records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        match record.WhichOneof("record_type"):
            case "run":
                run.run_id, run.name = record.run.run_id, record.run.display_name
                run.group, run.project = record.run.run_group, record.run.project
                run.config |= _values(record.run.config.update)
            case "config":
                run.config |= _values(record.config.update)
            case "history":
                run.history.append(_values(record.history.item))
            case "summary":
                run.summary |= _values(record.summary.update)
            case "exit":
                run.exit_code = record.exit.exit_code
    return run


def _values(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def _records(data: bytes) -> Iterator[bytes]:
    assert data[:4] in (b":W&B", b"")
    at, whole = _HEADER, b""
    while at < len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:
            at += left
            continue
        if at + _HEADER > len(data):
            return  # it is being written
        length, kind = struct.unpack("<HB", data[at + 4 : at + _HEADER])
        assert kind in (_FULL, _FIRST, _MIDDLE, _LAST)
        if at + _HEADER + length > len(data):
            return
        whole += data[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind in (_FULL, _LAST):
            yield whole
            whole = b""
