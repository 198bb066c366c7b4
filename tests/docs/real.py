"""``shiftgrad`` with real trainings as short as those of ``--smoke``, in the store that the page names.

python -m tests.docs.real NAME ARGUMENTS...
"""

from __future__ import annotations

import functools
import sys

import engine.cli
import engine.prepare
import engine.run


def _same_store(results: str) -> str:
    return results


if __name__ == "__main__":
    vars(engine.prepare)["smoke_results"] = _same_store
    vars(engine.run)["run_sweep"] = functools.partial(engine.run.run_sweep, smoke=True)
    sys.argv = sys.argv[1:]
    engine.cli.main()
