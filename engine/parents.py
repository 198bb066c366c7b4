"""``start_from``: which run of the sweep another one starts from. Pure functions of the sound cells of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.cells import UNLABELLED, cell_key
from engine.config_faults import nearest, show
from engine.merging import Merged
from engine.sweep_models import Cell
from trainables.defenses import defense_label
from trainables.errors import Fault
from trainables.lora import LoraSettings

_ANY_DROPOUT = "dropout"  # the one setting of an adapter that may be another when it is continued


@dataclass(frozen=True)
class Placed:
    """A sound cell with what it is called and what its grids and axes say about it, by dotted name."""

    cell: Cell
    label: str  # unique
    merged: Merged
    varied: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What ``start_from`` calls it, and all runs of its block that do not differ in their defense."""
        return name_of(self.cell)


def name_of(cell: Cell) -> str:
    """The label of the block, or that of the defense and of the run that it starts from."""
    if cell.label != UNLABELLED:
        return cell.label
    start = cell.start_from
    return defense_label(cell.defense) + (f" after {start.run}" if start is not None else "")


def find_parents(
    cells: Sequence[Placed], *, unknown: Sequence[str | None] = ()
) -> tuple[tuple[int | None, ...], list[Fault]]:
    """For every cell the index of the one that it starts from (None: the base, or a fault), and what is wrong. There
    is no circle in what is returned.

    ``unknown``: labels of cells that are not here because they are faulty, None where that is not known. What may be
    one of them is no fault.
    """
    faults: dict[str, Fault] = {}  # the first of every key
    parents: list[int | None] = []
    for child in cells:
        found = _parent(child, cells, unknown)
        if isinstance(found, str):
            fault = Fault(cell_key(child.merged, ("start_from", "run")), found)
            faults.setdefault(fault.key, fault)
        parents.append(found if isinstance(found, int) else None)
    circles = {index: circle for index in range(len(cells)) if (circle := _circle(parents, index)) is not None}
    for index, circle in circles.items():
        key = cell_key(cells[index].merged, ("start_from", "run"))
        faults.setdefault(key, Fault(key, f"goes in a circle: {' -> '.join(cells[one].name for one in circle)}"))
        parents[index] = None
    for child, parent in zip(cells, parents, strict=True):
        for fault in _shape_faults(child, cells[parent]) if parent is not None else ():
            faults.setdefault(fault.key, fault)
    return tuple(parents), list(faults.values())


def depth_of(parents: Sequence[int | None], index: int) -> int:
    """How many trainings come before a cell's own."""
    parent = parents[index]
    return 0 if parent is None else 1 + depth_of(parents, parent)


def _parent(child: Placed, cells: Sequence[Placed], unknown: Sequence[str | None]) -> int | str | None:
    """Index of the cell that ``child`` starts from, None if it is the base or not known, or a text: the fault."""
    start = child.cell.start_from
    if start is None:
        return None
    of_name = [index for index, one in enumerate(cells) if one.name == start.run]
    whole = [index for index, one in enumerate(cells) if one.label == start.run]
    fitting = [index for index in of_name if not _differing(child, cells[index])]
    if len(fitting) == 1:
        return fitting[0]
    if not of_name and whole:
        return whole[0]
    if fitting:
        labels = ", ".join(repr(cells[index].label) for index in fitting)
        return f"{len(fitting)} runs of {start.run!r} fit: {labels}; write the whole label of one"
    if any(label in (None, start.run) for label in unknown):
        return None
    if of_name:
        name = _differing(child, cells[of_name[0]])[0]
        value = show(child.varied[name])
        return f"no run of {start.run!r} has {name}: {value}, as {child.label!r} has"
    names = dict.fromkeys(one.name for one in cells if one.name != child.name)
    return f"no run {show(start.run)}; {nearest(start.run, names)}, and start_from: none for the base"


def _differing(child: Placed, parent: Placed) -> list[str]:
    """Axes that both have, with another value each."""
    return [name for name, value in child.varied.items() if name in parent.varied and parent.varied[name] != value]


def _circle(parents: Sequence[int | None], start: int) -> list[int] | None:
    """The way from a cell back to itself, or None."""
    way, here = [start], parents[start]
    while here is not None and here not in way:
        way.append(here)
        here = parents[here]
    return [*way, start] if here == start else None


def _shape_faults(child: Placed, parent: Placed) -> list[Fault]:
    """An adapter that is continued keeps its shape and its scale."""
    start = child.cell.start_from
    if start is None or start.adapter != "continue":
        return []
    own, other = child.cell.training.lora, parent.cell.training.lora
    faults = []
    for name in LoraSettings.model_fields:
        values = [_settled(getattr(one, name)) for one in (own, other)]
        if name != _ANY_DROPOUT and values[0] != values[1]:
            message = f"{show(values[0])}, but the adapter of {parent.label!r} that is continued has {show(values[1])}"
            faults.append(Fault(cell_key(child.merged, ("training", "lora", name)), message))
    return faults


def _settled(value: object) -> object:
    return sorted(set(value)) if isinstance(value, tuple) else value
