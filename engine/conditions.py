"""Grids in the conditions of a measurement: each stands for several conditions in the list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.config_faults import Path
from engine.grid import expand, grid_faults
from trainables.errors import Fault


@dataclass
class Conditions:
    """The ``measure`` section without grids, and where in the file the conditions of the lists stand."""

    measure: Any
    faults: list[Fault] = field(default_factory=list)
    origins: dict[str, list[int]] = field(
        default_factory=dict
    )  # measurement -> number in the file, by number in the list

    def written(self, path: Path) -> Path:
        """``path`` of the sweep as the file has it."""
        match path:
            case ("measure", str() as name, "conditions", int() as index, *rest) if name in self.origins:
                return ("measure", name, "conditions", self.origins[name][index], *rest)
        return path


def expand_conditions(measure: Any) -> Conditions:
    """Expand the grids of all conditions of the plain data of a ``measure`` section; faulty ones are left out."""
    if not isinstance(measure, Mapping):
        return Conditions(measure)
    found = Conditions({})
    for name, config in measure.items():
        listed = config.get("conditions") if isinstance(config, Mapping) else None
        if not isinstance(listed, list):
            found.measure[name] = config
            continue
        expanded: list[Any] = []
        origins = found.origins[str(name)] = []
        for index, condition in enumerate(listed):
            faults = grid_faults(condition, f"measure.{name}.conditions[{index}]")
            found.faults += faults
            cells = [] if faults else expand(condition)
            expanded += cells
            origins += [index] * len(cells)
        found.measure[name] = {**config, "conditions": expanded}
    return found
