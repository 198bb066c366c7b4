"""Drivers of sweeps as processes of their own, and whether two sweeps have the same tables."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
TIMES = ("seconds", "seconds_training", "started_utc", "finished_utc")


def start(file: Path, store: Path, *overrides: str) -> subprocess.Popen[str]:
    """`shiftgrad run` of a sweep file in a session of its own; its output is a pipe."""
    command = [sys.executable, "-m", "engine.cli", "run", str(file), f"results={store}", *overrides]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def is_same(name: str, found: pd.DataFrame, wanted: pd.DataFrame, apart: Sequence[str] = TIMES) -> bool:
    """Whether two tables agree in all columns but those of ``apart``; where they do not, says so."""
    one, other = (frame.drop(columns=[*apart], errors="ignore") for frame in (found, wanted))
    try:
        pd.testing.assert_frame_equal(one, other)
    except AssertionError as error:
        print(f"differs: {name}: {str(error).splitlines()[0]}", flush=True)
        return False
    return True
