"""``dotted.key=value`` from the command line, written into a sweep file's plain data before anything is checked.

A key that no model knows is written like any other: validation then names it, with the nearest valid one, exactly
as if it stood in the file. Here only what cannot be written at all is a fault.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from engine.config_faults import show
from engine.grid import GRID
from engine.yaml_text import read_yaml
from trainables.errors import Fault


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> list[Fault]:
    """Write ``overrides`` into ``raw``, in order; returns what could not be written.

    ``runs.0.defense.layer=12`` and ``runs[0].defense.layer=12`` count from 0; the value is YAML, so ``null`` and
    ``{grid: [1, 2]}`` mean what they mean in the file. Keys of ``axes`` hold dots themselves:
    ``axes.training.learning_rate.grid=[1e-3, 1e-4]``.
    """
    faults: list[Fault] = []
    written: list[str] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = re.sub(r"\[(\d+)\]", r".\1", key.strip())
        if not equals or not key or "" in key.split("."):
            faults.append(Fault(override, "an override is written key=value, such as training.epochs=1"))
            continue
        value, value_faults = read_yaml(text, "value")
        if value_faults:
            faults += [Fault(key, f"the value {text!r}: {fault.message}") for fault in value_faults]
            continue
        fault = _write(raw, _split(raw, key), value, key)
        if fault is None:
            written.append(key)
        else:
            faults.append(fault)
    return faults + _shadowed(raw, written)


def _split(raw: dict[str, Any], key: str) -> list[str]:
    """The keys to walk through. Below ``axes`` a cell path is one key, known or ending before ``grid``."""
    parts = key.split(".")
    if parts[0] != "axes" or len(parts) == 1:
        return parts
    known = raw.get("axes")
    rest = parts[1:]
    for length in range(len(rest), 0, -1):
        if isinstance(known, dict) and ".".join(rest[:length]) in known:
            return ["axes", ".".join(rest[:length]), *rest[length:]]
    length = rest.index(GRID) if GRID in rest[1:] else len(rest)
    return ["axes", ".".join(rest[:length]), *rest[length:]]


def _write(raw: dict[str, Any], parts: Sequence[str], value: Any, key: str) -> Fault | None:
    here: Any = raw
    for depth, part in enumerate(parts):
        is_last = depth == len(parts) - 1
        place = ".".join(parts[:depth])
        if isinstance(here, list):
            if not part.isdecimal() or int(part) >= len(here):
                count = f"0 to {len(here) - 1}" if here else "none, it is empty"
                return Fault(key, f"{place} is a list; {part!r} is none of its places ({count})")
            index: Any = int(part)
        elif isinstance(here, dict):
            index = part
        else:
            return Fault(key, f"{place} is {show(here)}, which has no {part!r}; set {place} as a whole")
        if is_last:
            here[index] = value
        elif isinstance(here, dict) and here.get(index) is None:
            here[index] = {}
            here = here[index]
        else:
            here = here[index]
    return None


def _shadowed(raw: dict[str, Any], written: Sequence[str]) -> list[Fault]:
    """Overrides of a section that an axis sets for every run anyway: they would silently change nothing."""
    axes = raw.get("axes")
    return [
        Fault(key, f"axes.{axis} sets this for every run; override axes.{axis} instead")
        for key in written
        for axis in (axes if isinstance(axes, dict) else ())
        if "." in key and (key == axis or key.startswith(f"{axis}."))
    ]
