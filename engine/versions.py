"""Versions of what numbers depend on, for the record of a run and of an invocation."""

from __future__ import annotations

import importlib.metadata
import platform

_NAMES = ("shiftgrad", "torch", "transformers", "peft", "deepspeed", "ray", "numpy", "pyarrow", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of what numbers depend on, by package; nothing is imported for it."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _NAMES}
