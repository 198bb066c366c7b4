"""The summary for a terminal, readable at 80 columns: runs, groups of runs, and differences to undefended runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from analysis.manifest import metrics_of
from analysis.quantities import PLAIN_LOSS
from analysis.results import Results
from analysis.undefended import ITSELF
from engine.show import number_column, plain_table

_Row = Mapping[str, Any]

ONE_SEED = "one seed: how seeds differ is unknown, and in no error"
_QUANTITIES_PER_TABLE = 3
_QUANTITIES_BESIDE_LOSSES = 2  # with plain loss, training loss, answers and status in the same line
NO_SPREAD = 1e-9  # a standard error below this is 0 but for rounding


def summary_view(results: Results, by: Sequence[str] | None = None) -> RenderableType:
    """The summary by run, then over seeds where runs differ in their seed alone, then the differences to undefended
    runs; with ``by`` the groups in place of runs and seeds."""
    if by is not None:
        frame = results.summary(by)
        return Group(groups_table(results, frame, by), *_differences(results, frame, by))
    runs = results.summary()
    parts: list[RenderableType] = [summary_table(results, runs)]
    if results.has_several_seeds():
        frame = results.over_seeds()
        parts += ["", groups_table(results, frame, ["run"])]
        return Group(*parts, *_differences(results, frame, ["run"]))
    parts += _differences(results, runs, ["run"])
    if any(entry.kind == "run" for entry in results.manifest.runs):
        parts.append(Text(ONE_SEED, style="dim"))
    return Group(*parts)


def summary_table(results: Results, frame: pd.DataFrame) -> RenderableType:
    """One line per base and run: every metric with its standard error and gaps, plain loss, training loss. More metrics
    than fit beside the losses have a table of their own."""
    metrics = metrics_of(results.manifest.runs)
    rows = _rows(frame)
    parts: list[RenderableType] = [Text(f"{results.name}: mean ± standard error clustered by question", style="bold")]
    for names in [metrics[:_QUANTITIES_BESIDE_LOSSES], *_parts(metrics[_QUANTITIES_BESIDE_LOSSES:])]:
        table = plain_table()
        table.add_column("run", overflow="fold")
        for name in names:
            number_column(table, name)
        cells = [[str(row["run"]), *(_estimate(row, name) for name in names)] for row in rows]
        if len(parts) == 1:
            for heading in ("plain\nloss", "train\nloss", "answers"):
                number_column(table, heading)
            number_column(table, "status", "left")
            for line, row in zip(cells, rows, strict=True):
                line += [_number(row[PLAIN_LOSS]), _number(row["train_loss"]), _count(row["num_answers"])]
                line.append(str(row["status"]))
        for line in cells:
            table.add_row(*(Text(text) for text in line))
        parts += [table] if len(parts) == 1 else ["", table]
    return Group(*parts)


def groups_table(results: Results, frame: pd.DataFrame, names: Sequence[str]) -> RenderableType:
    """One line per group with a column for each of ``names``, the fields that make a group; below, what to beware of:
    one seed, settings that a group mixes, runs that are missing. More metrics than fit have a table of their own."""
    rows = _rows(frame)
    notes: dict[str, int] = {}
    marks = ["".join(_superscript(notes.setdefault(note, len(notes) + 1)) for note in _notes(row)) for row in rows]
    what = "over seeds" if list(names) == ["run"] else f"by {', '.join(names)}"
    title = Text(f"{results.name} {what}: mean ± standard error of seeds and questions", style="bold")
    parts: list[RenderableType] = []
    for metrics in _parts(metrics_of(results.manifest.runs)):
        table = plain_table()
        _field_columns(table, names)
        for heading in ("runs", "seeds", *metrics, "plain\nloss"):
            number_column(table, heading)
        for row, mark in zip(rows, marks, strict=True):
            num_runs, num_done = row["num_runs"], row["num_runs"] - row["num_runs_missing"]
            runs = str(num_runs) if num_done == num_runs else f"{num_done} of {num_runs}"
            cells = [*_fields(row, names), runs + mark, _count(row["num_seeds"])]
            cells += [*(_estimate(row, metric) for metric in metrics), _number(row[PLAIN_LOSS])]
            table.add_row(*(Text(text) for text in cells))
        parts += [title, table]  # not as the table's own title, which would be folded to its width
    return Group(*parts, *(Text(f"{_superscript(number)} {note}") for note, number in notes.items()))


def _differences(results: Results, frame: pd.DataFrame, names: Sequence[str]) -> list[RenderableType]:
    """The differences to undefended runs with their intervals, and why runs have none; nothing without a defense."""
    rows = [row for row in _rows(frame) if row["kind"] == "run"]
    paired = [row for row in rows if not pd.isna(row["undefended"])]
    undefended = {str(row["undefended"]) for row in paired}
    what = repr(next(iter(undefended))) if len(undefended) == 1 else "the undefended run"
    parts: list[RenderableType] = []
    for quantities in _parts([*metrics_of(results.manifest.runs), PLAIN_LOSS]) if paired else []:
        table = plain_table()
        _field_columns(table, names)
        for name in quantities:
            number_column(table, "plain loss" if name == PLAIN_LOSS else name)
        if len(undefended) > 1:
            table.add_column("minus", overflow="fold")
        for row in paired:
            cells = [*_fields(row, names), *(_difference(row, name) for name in quantities)]
            cells += [str(row["undefended"])] if len(undefended) > 1 else []
            table.add_row(*(Text(text) for text in cells))
        parts += ["", Text(f"minus {what}, paired by question: mean, 95 % interval", style="bold"), table]
    for row in rows:
        problem = row["undefended_problem"]
        if not pd.isna(problem) and problem != ITSELF:
            parts.append(Text(f"not compared: {', '.join(_fields(row, names))}: {problem}"))
    return parts


def _parts(names: Sequence[str]) -> list[Sequence[str]]:
    """As many as stand beside each other at 80 columns, and the rest."""
    return [names[first : first + _QUANTITIES_PER_TABLE] for first in range(0, len(names), _QUANTITIES_PER_TABLE)]


def _field_columns(table: Table, names: Sequence[str]) -> None:
    """A heading per field: the last part of its dotted name where that says which one is meant."""
    ends = [name.rpartition(".")[2] for name in names]
    for end, name in zip(ends, names, strict=True):
        heading = end if ends.count(end) == 1 else name
        table.add_column(Text(heading.replace("_", " ")), overflow="fold")  # without _ it can be broken


def _fields(row: _Row, names: Sequence[str]) -> list[str]:
    return [_field(row[name]) if row["kind"] == "run" or not pd.isna(row[name]) else "base" for name in names]


def _notes(row: _Row) -> list[str]:
    """What to beware of in a group."""
    missing = row["runs_missing_by_status"]
    notes = [ONE_SEED] if row["kind"] == "run" and row["num_seeds"] == 1 else []
    notes += [", ".join(f"{count} {status}" for status, count in missing.items())] if missing else []
    return [*notes, f"mixes runs that differ in {row['varies']}"] if row["varies"] else notes


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def _estimate(row: _Row, metric: str) -> str:
    """The mean with its standard error; where that is 0, which is no certainty, with its interval below."""
    mean, error, low, high = (row[f"{metric}{end}"] for end in ("", "_se", "_low", "_high"))
    lines = ["-" if pd.isna(mean) else f"{mean:.2f}"]
    if not pd.isna(error):
        if error > NO_SPREAD:
            lines[0] += f" ± {error:.2f}"
        elif not pd.isna(low):
            lines.append(f"{low:.2f} to {high:.2f}")
    missing = row[f"{metric}_num_missing"]
    if not pd.isna(missing) and missing:
        lines.append(f"{missing} missing")
    return "\n".join(lines)


def _difference(row: _Row, name: str) -> str:
    digits = 3 if name == PLAIN_LOSS else 2
    mean, low, high = (row[f"{name}_vs_undefended{end}"] for end in ("", "_low", "_high"))
    if pd.isna(mean):
        return "-"
    return f"{mean:+.{digits}f}" + ("" if pd.isna(low) else f"\n{low:+.{digits}f} to {high:+.{digits}f}")


def _number(value: Any) -> str:
    return "-" if pd.isna(value) or not math.isfinite(value) else f"{value:.3f}"


def _count(value: Any) -> str:
    return "-" if pd.isna(value) else str(int(value))


def _field(value: Any) -> str:
    if pd.isna(value):
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)
