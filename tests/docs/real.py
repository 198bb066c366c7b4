"""``shiftgrad`` with real trainings as short as those of ``--smoke``, in the store that the page names.

python -m tests.docs.real NAME ARGUMENTS...
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import engine.cli
import engine.prepare
import engine.run


def _in_short(path: Path, *arguments: Any, **options: Any) -> engine.run.Outcome:
    return _run_sweep(path, *arguments, **{**options, "smoke": True})


def _same_store(results: str) -> str:
    return results


_run_sweep = engine.run.run_sweep

if __name__ == "__main__":
    vars(engine.prepare)["smoke_results"] = _same_store
    vars(engine.run)["run_sweep"] = _in_short
    sys.argv = sys.argv[1:]
    engine.cli.main()
