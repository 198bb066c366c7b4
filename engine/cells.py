"""From the sections, blocks and axes of a sweep file to its cells, with every fault under the user's own key."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.config_faults import Path, nearest, show, validate
from engine.grid import expand, grid_faults, grid_paths, is_grid
from engine.merging import Merged, at, has
from engine.named import Named, salvaged, vector_names
from engine.sweep_models import Cell
from trainables.errors import Fault
from trainables.interventions import NONE

SECTIONS = ("base", "data", "training", "evaluation")
_NO_AXES = ("label", "start_from")  # a grid in them says what is meant, not what a run is
INTERVENTIONS = ("evaluation", "interventions")
UNLABELLED = "?"  # no block can say this: the label that stands for "none was given"


@dataclass(frozen=True)
class FaultyCell:
    """A cell that cannot be meant, kept for what it names: other faults are found in that at the same time.

    ``block`` is where it stands. ``content`` is the cell as JSON without its label: two that have it are one and the
    same.
    """

    named: Named
    merged: Merged
    block: str
    content: str

    def key(self, *path: str | int) -> str:
        """Where ``path`` of the cell stands in the file."""
        return cell_key(self.merged, path)


@dataclass
class Cells:
    """The cells of a file: the sound ones with where their parts stand, the faulty ones, and all faults.

    ``varied``: what grids and axes say about each sound cell, by dotted name.
    """

    sound: list[Cell] = field(default_factory=list)
    merged: list[Merged] = field(default_factory=list)
    varied: list[dict[str, Any]] = field(default_factory=list)
    faulty: list[FaultyCell] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


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
    if path[:2] == INTERVENTIONS and len(path) > 2:
        given = merged.data["evaluation"]["interventions"]
        if isinstance(given, list):
            places = [place for place, item in enumerate(given) if item != NONE]
            path = (*INTERVENTIONS, places[int(path[2])], *path[3:])
        else:
            path = (*INTERVENTIONS, *path[3:])
    return merged.key(path)


def build_cells(file: Mapping[str, Any]) -> Cells:
    """The cells of ``file``, block by block, axes varying fastest.

    ``file`` is the plain data of the whole file; a section of another type than a mapping counts as absent, its
    fault is found elsewhere.
    """
    sections = {name: file[name] for name in SECTIONS if isinstance(file.get(name), dict)}
    broken = {name for name in SECTIONS if name in file and name not in sections}
    blocks = file.get("runs")
    vectors = file.get("vectors")
    known_vectors = vectors if isinstance(vectors, dict) else {}
    # Without usable blocks the sections are still checked, as the undefended run would use them.
    listed = enumerate(blocks) if isinstance(blocks, list) else ()
    usable = [(number, block) for number, block in listed if isinstance(block, dict)]
    usable = usable or [(0, {"defense": "none"})]
    axes, axes_faults = _axes(file.get("axes"))
    cells = Cells(faults=axes_faults)
    lost_axes = {fault.key.removeprefix("axes.") for fault in axes_faults}
    found = FaultsByBlock()
    for number, block in usable:
        here = f"runs[{number}]"
        cells.faults += grid_faults(block, here)
        lost: list[str] = []
        block = _without_faulty_grids(block, here, lost)
        gaps = [*lost, *lost_axes, *(f"{here}.{axis}" for axis in lost_axes)]
        cells.faults += [
            Fault(f"{here}.{axis}", f"is also an axis; say it in one place, here or in axes.{axis}")
            for axis in axes
            if any(has(cell, axis) for cell in expand(block))
        ]
        own_axes = [path for path in grid_paths(block) if path.partition(".")[0] not in _NO_AXES]
        for values in expand(block):
            varied = {path: at(values, path) for path in own_axes}
            values = {name: value for name, value in values.items() if not (name in SECTIONS and value is None)}
            for choice in expand(axes):
                merged = Merged(here)
                merged.add({name: {} for name in SECTIONS}, "")
                merged.add(sections, "")
                merged.add(values, here)
                for axis, value in choice.items():
                    refusal = merged.put(axis, value, "axes")
                    if refusal is not None:
                        cells.faults.append(Fault(f"axes.{axis}", f"cannot be set in {here}: {refusal}"))
                raw, faults = _normal(merged)
                cell, cell_faults = _cell(raw, merged, known_vectors)
                faults += cell_faults
                # What is missing where a faulty grid or section was left out follows from that.
                news = [fault for fault in faults if not _is_below(fault.key, [*gaps, *broken])]
                found.add(news, number)
                if cell is not None and not faults and not lost:
                    cells.sound.append(cell)
                    cells.merged.append(merged)
                    cells.varied.append(varied | choice)
                else:
                    content = {name: value for name, value in raw.items() if name != "label"} | {"lost": lost}
                    text = json.dumps(content, sort_keys=True)
                    cells.faulty.append(FaultyCell(salvaged(raw), merged, here, text))
    cells.faults += found.all()
    return cells


def _without_faulty_grids(value: Any, key: str, lost: list[str]) -> Any:
    """``value`` less its faulty grids, whose places are added to ``lost``; ``key`` names it, as in ``grid_faults``."""
    if is_grid(value) and grid_faults(value):  # a whole block
        lost.append(key)
        return {}
    if isinstance(value, dict):
        prefix = f"{key}." if key else ""
        items = [(name, item, f"{prefix}{name}") for name, item in value.items()]
    elif isinstance(value, list):
        items = [(index, item, f"{key}[{index}]") for index, item in enumerate(value)]
    else:
        return value
    kept = {}
    for name, item, place in items:
        if is_grid(item) and grid_faults(item):
            lost.append(place)
        else:
            kept[name] = _without_faulty_grids(item, place, lost)
    return kept if isinstance(value, dict) else list(kept.values())


def _is_below(key: str, places: Iterable[str]) -> bool:
    return any(key == place or key.startswith((f"{place}.", f"{place}[")) for place in places)


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


def _normal(merged: Merged) -> tuple[dict[str, Any], list[Fault]]:
    """A cell's plain data with a label and with ``defense`` as a list, and what is wrong with these two as a whole."""
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
    evaluation = raw.get("evaluation")
    if isinstance(evaluation, dict) and evaluation.get("interventions") is not None:
        raw["evaluation"] = {**evaluation, "interventions": _interventions(evaluation["interventions"])}
    return raw, faults


def _interventions(given: Any) -> Any:
    """The items of a list, ``none`` being no item; what is no list and no item stays, for its fault."""
    if given == NONE:
        return []
    if isinstance(given, dict):
        return [given]
    return [item for item in given if item != NONE] if isinstance(given, list) else given


def _cell(raw: Mapping[str, Any], merged: Merged, vectors: Mapping[str, Any]) -> tuple[Cell | None, list[Fault]]:
    cell, faults = validate(Cell, raw, lambda path: cell_key(merged, path))
    faults += [
        Fault(cell_key(merged, ("defense", index, *path)), f"no vector {show(used)}; {nearest(used, vectors)}")
        for index, item in enumerate(raw["defense"])
        for path, used in vector_names(item).items()
        if used and used not in vectors
    ]
    return cell, faults
