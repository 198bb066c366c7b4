"""Figures of a sweep's outcomes and trainings, in the style of ``analysis.figure_style``."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.figure_style import COLORS, INK, LINES, MARKERS, SOFT, Drawn, Width, drawn, new_figure, style

BASE_KIND = "base"
EDITED_KIND = "edited"
UNDEFENDED_KIND = "none"

_PANELS_PER_ROW: dict[Width, int] = {"page": 3, "column": 1}
_LABEL_CHARACTERS: dict[Width, int] = {"page": 30, "column": 20}
_CURVES_PER_ROW: dict[Width, int] = {"page": 4, "column": 2}
_MAX_OVERLAID = 6  # more curves in one panel cannot be told apart without colour
_MAX_KINDS_IN_LEGEND = 10  # every run is named at its line anyway
_MAX_POINTS = 300  # per curve; longer trainings are shown as means over equal stretches of steps


@dataclass(frozen=True)
class Panel:
    """A quantity to show per run: its columns ``name``, ``name_low``, ``name_high`` of the summary, and its heading."""

    name: str
    title: str
    is_rate: bool  # a share of answers: the axis runs from 0 to 1


def outcomes(summary: pd.DataFrame, panels: Sequence[Panel], kinds: Mapping[str, str], width: Width) -> Drawn | None:
    """Every quantity of every run with its 95 % interval, in the order of ``summary``; None if there is no value yet.

    ``kinds`` gives the kind of defense by run (``base`` for a base), which chooses marker and colour. A dashed line
    marks the value of the base where there is one base. A run without a value keeps its line and says so.
    """
    if not any(summary[panel.name].notna().any() for panel in panels):
        return None
    with style(width):
        per_row = min(_PANELS_PER_ROW[width], len(panels))
        num_rows = math.ceil(len(panels) / per_row)
        labels = [wrapped(run, _LABEL_CHARACTERS[width], 3 if width == "page" else 4) for run in summary["run"]]
        height = num_rows * (sum(0.14 + 0.13 * (label.count("\n") + 1) for label in labels) + 0.55) + 0.35
        figure = new_figure(width, height)
        grid = figure.subplots(num_rows, per_row, squeeze=False, sharey=True)
        looks = _looks(kinds[run] for run in summary["run"])
        for index, axes in enumerate(grid.flat):
            if index < len(panels):
                _draw_outcomes(axes, summary, panels[index], kinds, looks)
                axes.set_yticks(range(len(labels)), labels)
                axes.set_ylim(len(labels) - 0.4, -0.6)
            else:
                axes.set_axis_off()
        if len(looks) <= _MAX_KINDS_IN_LEGEND:
            handles = [
                axes.plot([], [], linestyle="none", label=textwrap.shorten(kind, 40, placeholder="…"), **look)[0]
                for kind, look in looks.items()
            ]
            figure.legend(handles=handles, loc="outside lower center", ncols=4 if width == "page" else 2)
        return drawn(figure)


def training_curves(training: pd.DataFrame, kinds: Mapping[str, str], width: Width) -> Drawn | None:
    """Training loss per optimizer step, one curve per run (column ``run``); None if no step is recorded.

    Up to six runs share one panel. More get a panel each, with the first undefended run of ``kinds`` in grey behind.
    """
    curves = {str(run): thinned(rows) for run, rows in training.groupby("run", sort=False)}
    if not curves:
        return None
    with style(width):
        figure = _overlaid(curves, width) if len(curves) <= _MAX_OVERLAID else _side_by_side(curves, kinds, width)
        limit = loss_limit(training)
        if limit is not None:
            lowest = float(training["loss"].min())
            for axes in figure.axes:
                axes.set_ylim(lowest - 0.05 * (limit - lowest), limit)
        return drawn(figure)


def loss_limit(training: pd.DataFrame) -> float | None:
    """Where the axis of training losses ends if one diverged, so that the others can be read; None: nothing is cut.

    That is twice the highest loss of any first step, in nats/token: what rises above it has left what it began with.
    """
    if training.empty:
        return None
    limit = 2 * float(training.loc[training["step"] == training["step"].min(), "loss"].max())
    return limit if float(training["loss"].max()) > limit else None


def steps_per_point(training: pd.DataFrame) -> int:
    """How many steps the longest curve's points stand for; 1: every step is drawn."""
    return math.ceil(int(training.groupby("run").size().max()) / _MAX_POINTS) if len(training) else 1


def wrapped(label: str, characters: int, max_lines: int = 3) -> str:
    """A label as at most ``max_lines`` lines of at most so many characters.

    What does not fit is left out after the first line: labels tell runs apart at their end.
    """
    lines = textwrap.wrap(label, characters)
    if len(lines) > max_lines:
        rest = " ".join(lines[1:])
        while len(ending := textwrap.wrap(f"… {rest}", characters)) > max_lines - 1:
            rest = rest.partition(" ")[2] if " " in rest else rest[1:]
        lines = [lines[0], *ending]
    return "\n".join(lines)


def _draw_outcomes(
    axes: Axes, summary: pd.DataFrame, panel: Panel, kinds: Mapping[str, str], looks: Mapping[str, dict[str, Any]]
) -> None:
    axes.set_title(panel.title)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    bases = [row for row in summary.to_dict("records") if kinds[row["run"]] == BASE_KIND]
    if len(bases) == 1 and not math.isnan(bases[0][panel.name]):
        axes.axvline(bases[0][panel.name], color=SOFT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    for position, row in enumerate(summary.to_dict("records")):
        mean, low, high = row[panel.name], row[f"{panel.name}_low"], row[f"{panel.name}_high"]
        if math.isnan(mean):
            text = "no value" if row["status"] == "done" else f"no value ({row['status']})"
            axes.annotate(
                text,
                (0.03, position),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=7,
                color=SOFT,
                backgroundcolor="white",
            )
            continue
        look = looks[kinds[row["run"]]]
        if not math.isnan(low):
            axes.errorbar(
                mean, position, xerr=[[mean - low], [high - mean]], color=INK, linewidth=1.0, capsize=2.5, zorder=2
            )
        axes.plot(mean, position, linestyle="none", zorder=3, clip_on=False, **look)
    if panel.is_rate:
        axes.set_xlim(-0.04, 1.04)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    else:
        axes.margins(x=0.12)
        axes.xaxis.set_major_locator(MaxNLocator(4))


def _overlaid(curves: Mapping[str, pd.DataFrame], width: Width) -> Figure:
    labels = [wrapped(run, 48, max_lines=2) for run in curves]
    per_row = 2 if width == "page" else 1
    lines = sum(label.count("\n") + 1 for label in labels) / per_row
    figure = new_figure(width, 2.6 + 0.16 * math.ceil(lines))
    axes = figure.subplots()
    for index, (curve, label) in enumerate(zip(curves.values(), labels, strict=True)):
        every = max(1, len(curve) // 8)
        axes.plot(
            curve["step"],
            curve["loss"],
            label=label,
            color=COLORS[index],
            linestyle=LINES[index],
            marker=("o", *MARKERS)[index],
            markevery=(index % every, every),  # staggered, so that curves that agree do not hide each other's markers
            markeredgecolor="white",
            markeredgewidth=0.4,
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss (nats/token)")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    figure.legend(loc="outside lower center", ncols=per_row, handlelength=4)
    return figure


def _side_by_side(curves: Mapping[str, pd.DataFrame], kinds: Mapping[str, str], width: Width) -> Figure:
    per_row = _CURVES_PER_ROW[width]
    num_rows = math.ceil(len(curves) / per_row)
    titles = [wrapped(run, 24, max_lines=3) for run in curves]
    figure = new_figure(width, num_rows * (1.15 + 0.11 * max(title.count("\n") for title in titles)) + 0.4)
    grid = figure.subplots(num_rows, per_row, squeeze=False, sharex=True, sharey=True)
    reference = next((run for run in curves if kinds.get(run) == UNDEFENDED_KIND), None)
    for axes, (run, curve), title in zip(grid.flat, curves.items(), titles, strict=False):
        if reference is not None and run != reference:
            axes.plot(curves[reference]["step"], curves[reference]["loss"], color="#a8a8a8", linestyle="--")
        axes.plot(curve["step"], curve["loss"], color=INK)
        axes.set_title(title, fontsize=6.5, fontweight="normal")
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    for axes in grid.flat[len(curves) :]:
        axes.set_axis_off()
    for axes in grid.flat[max(0, len(curves) - per_row) : len(curves)]:
        axes.tick_params(labelbottom=True)  # the panel below may be left out
    figure.supxlabel("optimizer step", fontsize=8)
    figure.supylabel("training loss (nats/token)", fontsize=8)
    return figure


def thinned(rows: pd.DataFrame, value: str = "loss") -> pd.DataFrame:
    """At most ``_MAX_POINTS`` points of a curve, columns step and ``value``, each the mean over as many consecutive
    steps."""
    ordered = rows.sort_values("step", kind="stable")
    per_point = math.ceil(len(ordered) / _MAX_POINTS)
    return ordered.groupby(np.arange(len(ordered)) // per_point)[["step", value]].mean()


def _looks(kinds: Iterator[str]) -> dict[str, dict[str, Any]]:
    """Marker and colour by kind of defense: base and undefended are the same in every figure, others in order."""
    looks: dict[str, dict[str, Any]] = {}
    fixed = {
        BASE_KIND: {"marker": "D", "color": "white", "markeredgecolor": INK, "markersize": 4.5},
        UNDEFENDED_KIND: {"marker": "o", "color": INK, "markeredgecolor": INK, "markersize": 5},
    }
    for kind in dict.fromkeys(kinds):
        number = len([known for known in looks if known not in fixed])
        look = {"marker": MARKERS[number % len(MARKERS)], "color": COLORS[number % len(COLORS)]}
        looks[kind] = fixed.get(kind, look | {"markeredgecolor": INK, "markeredgewidth": 0.5, "markersize": 5.5})
    return looks
