"""Sweeps in which runs start from runs: what a model was trained on before against what it is trained on now.

Figure 2 of arXiv 2604.16423 as a matrix per defense: rows are what a training starts from, columns its data. The first
column, nothing, is what each start shows before it is trained on; it is the same in every matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

import pandas as pd

from analysis.figure_style import Drawn, Width
from analysis.figures import Panel
from analysis.manifest import DEGENERATION, RunEntry
from analysis.panels import matrix
from analysis.report_blocks import WIDTHS, Block

NOTHING = "nothing"
BASE = "the base"


def before_after_blocks(entries: Sequence[RunEntry], summary: pd.DataFrame, panels: Sequence[Panel]) -> list[Block]:
    """A block per panel but degeneration; none where no run starts from another, or where there are several bases.

    ``summary``: as ``Results.summary`` gives it.
    """
    bases = [entry for entry in entries if entry.kind == "base"]
    if len(bases) != 1 or not any(entry.parent for entry in entries):
        return []
    blocks = []
    for panel in panels:
        if panel.name == DEGENERATION:
            continue
        cells = before_after(entries, dict(zip(summary["run"], summary[panel.name], strict=True)))
        drawn = {width: figure for width in WIDTHS if (figure := _matrix(cells, panel, width)) is not None}
        text = (
            f"Mean {panel.title} by what the model was trained on before (rows) and now (columns); "
            "a matrix per defense of the training now. The first column is the model before it."
        )
        if drawn:
            blocks.append(Block(f"before_after_{panel.name}", f"Before and after: {panel.title}", text, drawn))
    return blocks


def before_after(entries: Sequence[RunEntry], values: dict[str, float]) -> pd.DataFrame:
    """Columns panel (defense), row (start), column (data), value, in the order of the sweep; ``values`` by label.

    Runs that agree in these three, such as seeds, are rows of their own: a matrix takes their mean.
    """
    runs = [entry for entry in entries if entry.kind == "run"]
    defenses = list(dict.fromkeys(str(entry.config["defense"]) for entry in runs))
    starts = {entry.run_id: _start(entry, runs) for entry in runs}
    rows = []
    begun = [(BASE, entry) for entry in entries if entry.kind == "base"]
    begun += [(starts[child.run_id], before) for child in runs if (before := _before(child, runs)) is not None]
    for start, label in dict.fromkeys((start, entry.label) for start, entry in begun):
        rows += [(defense, start, NOTHING, values[label]) for defense in defenses]
    named = [str(entry.config.get("data.train", entry.label)) for entry in runs]
    are_told_apart = len({PurePath(name).stem for name in named}) == len(set(named))
    for entry, name in zip(runs, named, strict=True):
        data = PurePath(name).stem if are_told_apart else name
        rows.append((str(entry.config["defense"]), starts[entry.run_id], data, values[entry.label]))
    frame = pd.DataFrame(rows, columns=["panel", "row", "column", "value"])
    frame["row"] = pd.Categorical(frame["row"], list(dict.fromkeys([BASE, *starts.values()])))
    return frame.sort_values("row", kind="stable").astype({"row": "str"}).reset_index(drop=True)


def _before(child: RunEntry, runs: Sequence[RunEntry]) -> RunEntry | None:
    """The run that it starts from, evaluated as it is where the sweep evaluates that run in several ways."""
    parents = [run for run in runs if run.run_id == child.parent]

    def evaluation(entry: RunEntry) -> dict[str, object]:
        return {name: value for name, value in entry.config.items() if name.startswith("evaluation.")}

    alike = [run for run in parents if evaluation(run) == evaluation(child)]
    return next(iter(alike or parents), None)


def _start(entry: RunEntry, runs: Sequence[RunEntry]) -> str:
    """What a run starts from; how, where the sweep has both ways."""
    if entry.parent is None:
        return BASE
    ways = {run.config.get("start_from.adapter") for run in runs if run.parent is not None}
    name = str(entry.config["start_from.run"])
    return name if len(ways) == 1 else f"{name}, {entry.config['start_from.adapter']}"


def _matrix(cells: pd.DataFrame, panel: Panel, width: Width) -> Drawn | None:
    """All matrices with one scale: a rate from 0 to 1, anything else over its range in the sweep."""
    lowest, highest = float(cells["value"].min()), float(cells["value"].max())
    scale = (0.0, 1.0) if panel.is_rate else (lowest, highest) if lowest < highest else None
    scales = dict.fromkeys(cells["panel"], scale) if scale is not None else None
    return matrix(cells, row_label="trained before", column_label="trained on now", width=width, scales=scales)
