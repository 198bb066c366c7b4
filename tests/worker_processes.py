"""Two processes that train together as Ray Train's workers do: with a gloo process group, made before the training."""

from __future__ import annotations

import datetime
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from tests.bases import tiny_base
from tests.sinks import MemorySink
from trainables.rows import SignalRow
from trainables.train import RunSpec, train_pack

SIZE = 2


@dataclass(frozen=True)
class Found:
    """What a training has given its sink."""

    losses: list[float]
    norms: list[float]
    signals: list[SignalRow]
    files: Mapping[str, bytes]
    checkpoints: list[dict[str, bytes]]

    @staticmethod
    def of(sink: MemorySink) -> Found:
        losses, norms = [row.loss for row in sink.rows], [row.gradient_norm for row in sink.rows]
        return Found(losses, norms, sink.signals, sink.files, sink.checkpoints)


@dataclass(frozen=True)
class Case:
    spec: RunSpec
    how: Mapping[str, Any]  # of train_pack
    resume_from: Path | None = None
    dtype: torch.dtype = torch.float32


def _train(case: Case) -> Found:
    sink = MemorySink()
    sink.resume_from = case.resume_from
    train_pack(tiny_base(dtype=case.dtype), [case.spec], {case.spec.train_id: sink}, **case.how)
    return Found.of(sink)


def _worker(rank: int, rendezvous: str, cases: Mapping[str, Case], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    timeout = datetime.timedelta(seconds=120)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=SIZE, timeout=timeout
    )
    for name, case in cases.items():
        (folder / f"{name}.{rank}").write_bytes(pickle.dumps(_train(case)))
    torch.distributed.destroy_process_group()


def by_workers(cases: Mapping[str, Case], folder: Path) -> dict[str, list[Found]]:
    """Train every case by two workers; what each of them found, by case. Raises what a worker raises."""
    spawn(_worker, (str(folder / "rendezvous"), cases, folder), SIZE)
    return {name: [pickle.loads((folder / f"{name}.{rank}").read_bytes()) for rank in range(SIZE)] for name in cases}


def alone(case: Case) -> Found:
    """The same by one worker, in this process."""
    return _train(case)
