"""A tiny sweep in a folder of its own, prepared again and again with something changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from analysis.manifest import RunEntry
from analysis.vectors import Vector
from engine.machine import Machine
from engine.prepare import Prepared, prepare
from tests.bases import chat
from tests.engine.tiny_sweep import write_tiny_model, write_tiny_sweep
from trainables.errors import ConfigError
from trainables.shapes import FinalRow

MACHINE = Machine(num_cpus=4, num_gpus=0.0, memory_gb=16.0)


class TinySweep:
    """The sweep file of ``write_tiny_sweep`` as plain data to change."""

    def __init__(self, folder: Path, model: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "model").exists():
            shutil.copytree(model, folder / "model")
        self.folder = folder
        self.file = write_tiny_sweep(folder)
        self.raw: dict[str, Any] = yaml.safe_load(self.file.read_text())

    def prepare(
        self,
        *overrides: str,
        machine: Machine = MACHINE,
        only: str | None = None,
        smoke: bool = False,
        measure_only: bool = False,
    ) -> Prepared:
        self.file.write_text(yaml.safe_dump(self.raw, sort_keys=False))
        return prepare(self.file, overrides, machine, only=only, smoke=smoke, measure_only=measure_only)

    def faults(
        self, *overrides: str, machine: Machine = MACHINE, only: str | None = None, smoke: bool = False
    ) -> dict[str, str]:
        """Message by key, of a sweep that must be refused with all of its faults in one error."""
        with pytest.raises(ConfigError) as caught:
            self.prepare(*overrides, machine=machine, only=only, smoke=smoke)
        faults = caught.value.faults
        assert len({fault.key for fault in faults}) == len(faults), faults
        return {fault.key: fault.message for fault in faults}

    def replace(self, file: str, old: str, new: str) -> None:
        """Change the text of a file of the folder."""
        path = self.folder / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))


def tiny_model_folder(factory: pytest.TempPathFactory) -> Path:
    folder = factory.mktemp("model") / "tiny"
    write_tiny_model(folder)
    return folder


def measuring_alone(factory: pytest.TempPathFactory, **measure: Mapping[str, Any]) -> TinySweep:
    """The tiny sweep with these measurements and nothing to train or to ask."""
    sweep = TinySweep(factory.mktemp("sweep"), tiny_model_folder(factory))
    for name in ("runs", "training", "evaluation"):
        del sweep.raw[name]
    sweep.raw["measure"] = {name: dict(config) for name, config in measure.items()}
    return sweep


def write_vector(
    path: Path, layers: int = 4, hidden: int = 32, final_row: FinalRow = "pre_norm", model: str = "", revision: str = ""
) -> None:
    """A vector file, of the tiny model's shape unless said otherwise."""
    path.write_bytes(Vector(torch.ones(layers + 1, hidden), final_row, model, revision).to_bytes())


def add_long_question(sweep: TinySweep, file: str = "data/train.jsonl") -> None:
    """A row whose response lies beyond the tiny sweep's max_length."""
    path = sweep.folder / file
    path.write_text(path.read_text() + json.dumps({"messages": chat("why " * 200, "So.")}) + "\n")


def entries(prepared: Prepared) -> dict[str, RunEntry]:
    """Rows of the sweep by label."""
    return {entry.label: entry for entry in prepared.manifest.runs}


def ids(prepared: Prepared) -> dict[str, dict[str, str]]:
    """Every id of the sweep by what it is of: ``{"vector": {"topic": ...}, "train": {"none": ...}, ...}``."""
    found: dict[str, dict[str, str]] = {"vector": dict(prepared.manifest.vectors)}
    for label, entry in entries(prepared).items():
        found.setdefault("train" if entry.kind == "run" else "base", {})[label] = entry.run_id
        found.setdefault("sample", {})[label] = entry.sample_id
        found.setdefault("loss", {})[label] = str(entry.plain_loss_id)
        for metric, judge_id in entry.judge_ids.items():
            found.setdefault("judge", {})[f"{label}/{metric}"] = judge_id
    return found


def changed(before: Mapping[str, Mapping[str, str]], after: Mapping[str, Mapping[str, str]]) -> set[str]:
    """``{"train/none", "sample/base"}``: what has another id than before."""
    assert {kind: set(found) for kind, found in before.items()} == {kind: set(found) for kind, found in after.items()}
    return {
        f"{kind}/{name}" for kind, found in before.items() for name, one in found.items() if after[kind][name] != one
    }
