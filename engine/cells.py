"""From the sections, blocks and axes of a sweep file to its cells, with every fault under the user's own key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from engine.config_faults import Path, nearest, show, validate
from engine.grid import expand, grid_faults, is_grid
from engine.merging import Merged, has
from engine.sweep_models import Cell, OneDefense
from trainables.config import NamesVector, referenced
from trainables.defenses import DefenseConfig
from trainables.errors import Fault

SECTIONS = ("base", "data", "training", "evaluation")
UNLABELLED = "?"  # no block can say this: the label that stands for "none was given"


class FaultsByBlock:
    """Faults of many cells, each once, with the blocks that have it."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._blocks: dict[Fault, dict[int, None]] = {}

    def add(self, faults: Iterable[Fault], block: int) -> None:
        self._seen.add(block)
        for fault in faults:
            self._blocks.setdefault(fault, {})[block] = None

    def all(self) -> list[Fault]:
        """Every fault; one of a shared section that only some blocks have says which."""
        faults = []
        for fault, blocks in self._blocks.items():
            where = ""
            if len(blocks) < len(self._seen) and not fault.key.startswith("runs["):
                where = f" (in {', '.join(f'runs[{block}]' for block in blocks)})"
            faults.append(Fault(fault.key, fault.message + where))
        return faults


def cell_key(merged: Merged, path: Path) -> str:
    """``path`` of a Cell in the user's file, where a single item of a defense stands without a list."""
    if path[:1] == ("defense",) and len(path) > 1 and not isinstance(merged.data.get("defense"), list):
        path = ("defense", *path[2:])
    return merged.key(path)


def build_cells(file: Mapping[str, Any]) -> tuple[list[Cell], list[Merged], list[Fault]]:
    """The sound cells of ``file`` (block by block, axes varying fastest), where their parts stand, and all faults.

    ``file`` is the plain data of the whole file; a section of another type than a mapping counts as absent, its
    fault is found elsewhere.
    """
    sections = {name: file[name] for name in SECTIONS if isinstance(file.get(name), dict)}
    broken = {name for name in SECTIONS if name in file and name not in sections}
    blocks = file.get("runs")
    vectors = file.get("vectors")
    # Without usable blocks the sections are still checked, as the undefended run would use them.
    listed = enumerate(blocks) if isinstance(blocks, list) else ()
    usable = [(number, block) for number, block in listed if isinstance(block, dict)]
    usable = usable or [(0, {"defense": "none"})]
    axes, faults = _axes(file.get("axes"))
    found = FaultsByBlock()
    cells: list[Cell] = []
    origins: list[Merged] = []
    for number, block in usable:
        here = f"runs[{number}]"
        wrong = grid_faults(block, here)
        if wrong:
            faults += wrong
            continue
        faults += [
            Fault(f"{here}.{axis}", f"is also an axis; say it in one place, here or in axes.{axis}")
            for axis in axes
            if any(has(cell, axis) for cell in expand(block))
        ]
        for values in expand(block):
            values = {name: value for name, value in values.items() if not (name in SECTIONS and value is None)}
            for choice in expand(axes):
                merged = Merged(here)
                merged.add({name: {} for name in SECTIONS}, "")
                merged.add(sections, "")
                merged.add(values, here)
                for axis, value in choice.items():
                    refusal = merged.put(axis, value, "axes")
                    if refusal is not None:
                        faults.append(Fault(f"axes.{axis}", f"cannot be set in {here}: {refusal}"))
                cell, cell_faults = _cell(merged, vectors if isinstance(vectors, dict) else {})
                found.add((fault for fault in cell_faults if fault.key.partition(".")[0] not in broken), number)
                if cell is not None:
                    cells.append(cell)
                    origins.append(merged)
    return cells, origins, faults + found.all()


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def _axes(axes: object) -> tuple[dict[str, Any], list[Fault]]:
    """The sound axes, and what is wrong with the others."""
    sound: dict[str, Any] = {}
    faults: list[Fault] = []
    for axis, value in (axes if isinstance(axes, dict) else {}).items():
        key = f"axes.{axis}"
        inside = next((other for other in sound if axis.startswith(f"{other}.") or other.startswith(f"{axis}.")), None)
        if "" in axis.split("."):
            faults.append(Fault(key, "an axis is a dotted path of a cell, such as seed or training.learning_rate"))
        elif not is_grid(value):
            faults.append(Fault(key, f"an axis is written {{grid: [...]}}; got {show(value)}"))
        elif wrong := grid_faults(value, key):
            faults += wrong
        elif inside is not None:
            faults.append(Fault(key, f"overlaps axes.{inside}; an axis cannot hold another"))
        else:
            sound[axis] = value
    return sound, faults


def _cell(merged: Merged, vectors: Mapping[str, Any]) -> tuple[Cell | None, list[Fault]]:
    raw = {"label": UNLABELLED, **merged.data}
    faults: list[Fault] = []
    label = merged.data.get("label")
    if label == UNLABELLED:
        faults.append(Fault(cell_key(merged, ("label",)), f"a label says something; got {show(label)}"))
    items = raw.get("defense")
    if "defense" not in raw:
        faults.append(Fault(cell_key(merged, ("defense",)), "missing; write defense: none for the undefended run"))
        raw["defense"] = []
    elif items == "none":
        raw["defense"] = []
    elif isinstance(items, dict):
        raw["defense"] = [items]
    elif not _is_list(items):
        message = f"must be none, one item such as {{kind: ...}}, or a list of items; got {show(items)}"
        faults.append(Fault(cell_key(merged, ("defense",)), message))
        raw["defense"] = []
    cell, cell_faults = validate(Cell, raw, lambda path: cell_key(merged, path))
    faults += cell_faults
    for index, item in enumerate(raw["defense"]):
        sound = cell.defense[index] if cell is not None else _item(item)
        if sound is not None:
            faults += [
                Fault(cell_key(merged, ("defense", index, name)), f"no vector {show(used)}; {nearest(used, vectors)}")
                for name, value in referenced(sound, NamesVector).items()
                for used in _names(value)
                if used not in vectors
            ]
    return (None if faults else cell), faults


def _item(item: object) -> DefenseConfig | None:
    """One item of a defense in a cell that has faults: they are reported already, its own names not yet."""
    one, _ = validate(OneDefense, {"item": item})
    return one.item if one is not None else None


def _names(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [name for name in value if isinstance(name, str)] if isinstance(value, list | tuple) else []
