"""Where work runs: sweep files, the task graph, Ray Tune, actor pools, the store, the command line.

From Python: ``from engine import Sweep; Sweep.from_yaml("configs/sweeps/quickstart.yaml").run().summary()``.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.sweep_file import Sweep

__all__ = ["Sweep"]

# In a notebook without ipywidgets Ray complains on import. Our progress does not need them.
logging.getLogger("ray.widgets").setLevel(logging.WARNING)


def __getattr__(name: str) -> object:
    """``Sweep`` on first use: the command line's help need not wait for torch."""
    if name == "Sweep":
        from engine.sweep_file import Sweep

        return Sweep
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
