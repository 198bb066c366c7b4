"""Sweep files for tests: a small sound one to change, and a folder to load it from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.sweep_file import Sweep, load_sweep
from trainables.errors import ConfigError

PPS = {"kind": "pps", "vector": "bridge", "layer": 3, "coefficient": 1.5}


def minimal(**changes: Any) -> dict[str, Any]:
    """A small sweep; a change to None removes the key."""
    sweep: dict[str, Any] = {
        "name": "small",
        "base": {"model": "embedded:smollm2-135m-instruct"},
        "data": {"train": "train.jsonl"},
        "vectors": {
            "bridge": {"difference": {"positive": "a.jsonl", "negative": "b.jsonl"}},
            "random": {"random_like": "bridge"},
        },
        "training": {"learning_rate": 0.001},
        "runs": [{"defense": "none"}, {"defense": PPS}],
        "evaluation": {"questions": "bridge", "metrics": {"trait": {"judge": "rule", "trait": "bridge"}}},
    } | changes
    return {key: value for key, value in sweep.items() if value is not None}


class Files:
    """Sweep files in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "sweep.yaml"

    def load(self, raw: dict[str, Any] | str, *overrides: str) -> Sweep:
        self.path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw, sort_keys=False))
        return load_sweep(self.path, overrides)

    def faults(self, raw: dict[str, Any] | str, *overrides: str) -> dict[str, str]:
        """Message by key, of a sweep that must be refused; no key twice."""
        with pytest.raises(ConfigError) as caught:
            self.load(raw, *overrides)
        faults = caught.value.faults
        assert len({fault.key for fault in faults}) == len(faults), faults
        return {fault.key: fault.message for fault in faults}


def only(faults: dict[str, str], key: str) -> str:
    assert list(faults) == [key], faults
    return faults[key]


def labels(sweep: Sweep) -> list[str]:
    return [cell.label for cell in sweep.cells]
