"""Grids in the conditions of a measurement: each stands for several conditions in the list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.config_faults import Path
from engine.grid import expand, grid_faults
from trainables.errors import Fault

LISTS = ("conditions", "candidates", "interventions")
"""Fields of measurements that list what is present while a model is read, in which grids are allowed."""


@dataclass
class Conditions:
    """The ``measure`` section without grids, and where in the file the conditions of the lists stand."""

    measure: Any
    faults: list[Fault] = field(default_factory=list)
    origins: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    """Measurement and field -> for every item of the list its number in the file."""

    def written(self, path: Path) -> Path:
        """``path`` of the sweep as the file has it."""
        match path:
            case ("measure", str() as name, str() as part, int() as index, *rest) if (name, part) in self.origins:
                return ("measure", name, part, self.origins[name, part][index], *rest)
        return path


def expand_conditions(measure: Any) -> Conditions:
    """Expand the grids of all conditions of the plain data of a ``measure`` section; faulty ones are left out."""
    if not isinstance(measure, Mapping):
        return Conditions(measure)
    found = Conditions({})
    for name, config in measure.items():
        found.measure[name] = dict(config) if isinstance(config, Mapping) else config
        for part in LISTS if isinstance(config, Mapping) else ():
            if isinstance(config.get(part), list):
                found.measure[name][part] = _expanded(found, str(name), part, config[part])
    return found


def _expanded(found: Conditions, name: str, part: str, listed: list[Any]) -> list[Any]:
    expanded: list[Any] = []
    origins = found.origins[name, part] = []
    for index, condition in enumerate(listed):
        faults = grid_faults(condition, f"measure.{name}.{part}[{index}]")
        found.faults += faults
        cells = [] if faults else expand(condition)
        expanded += cells
        origins += [index] * len(cells)
    return expanded
