"""Panels of points, curves and numbers from plain tables: what the figures of measurements are put together from.

Every function takes a table with the columns that it names and gives None where there is nothing to draw. ``panel`` and
``series`` are texts, in the order in which they first appear.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.figure_style import COLORS, INK, LINES, MARKERS, SOFT, Drawn, Width, drawn, new_figure, style
from analysis.figures import wrapped

_PER_ROW: dict[Width, int] = {"page": 3, "column": 1}
_LEGEND_COLUMNS: dict[Width, int] = {"page": 3, "column": 1}
_MAX_MARKERS = 12  # per curve
_ALL_MARKERS = ("o", *MARKERS)


def identity_scatter(points: pd.DataFrame, *, x_label: str, y_label: str, width: Width) -> Drawn | None:
    """Columns panel, series, x, y. One square panel each, x and y on one scale, with the identity line and, where both
    signs are there, the axes."""
    found = points.dropna(subset=["x", "y"])
    if found.empty:
        return None
    with style(width):
        figure, all_axes, panels = _grid(found, width, height=2.35 if width == "page" else 3.1)
        looks = _looks(found)
        for axes, panel in zip(all_axes, panels, strict=True):
            part = found[found["panel"] == panel]
            low, high = _padded(part[["x", "y"]].to_numpy())
            axes.plot([low, high], [low, high], color=SOFT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
            if low < 0 < high:
                axes.axhline(0, color=SOFT, linewidth=0.5, zorder=1)
                axes.axvline(0, color=SOFT, linewidth=0.5, zorder=1)
            for series, of_series in part.groupby("series", sort=False):
                axes.plot(of_series["x"], of_series["y"], linestyle="none", zorder=2, **looks[str(series)][0])
            axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.yaxis.set_major_locator(MaxNLocator(4))
        _labels(figure, x_label, y_label)
        _legend(figure, looks, width, line=False)
        return drawn(figure)


def curves(
    points: pd.DataFrame,
    *,
    x_label: str,
    y_label: str,
    width: Width,
    zero: bool = False,
    shared_y: bool = True,
    shared_x: bool = False,
    num_ticks: int = 6,
) -> Drawn | None:
    """Columns panel, series, x, y, error (standard error; NaN: none), and maybe low, high. Means with a band: the
    interval from low to high where it is known, else 1.96 errors. ``zero`` draws the line at 0. ``shared_y``: all
    panels have one scale; else each panel's title says what its scale is. ``shared_x``: all panels show the same x.
    ``num_ticks``: of x, at most."""
    found = points.dropna(subset=["y"])
    if found.empty:
        return None
    with style(width):
        figure, all_axes, panels = _grid(found, width, height=2.1, shared_y=shared_y)
        looks = _looks(found)
        for axes, panel in zip(all_axes, panels, strict=True):
            if zero:
                axes.axhline(0, color=SOFT, linewidth=0.8, zorder=1)
            part = found[found["panel"] == panel]
            for series, of_series in part.groupby("series", sort=False):
                marker, line = looks[str(series)]
                ordered = of_series.sort_values("x", kind="stable")
                number = list(looks).index(str(series))
                every = max(1, math.ceil(len(ordered) / _MAX_MARKERS))
                half = 1.96 * ordered["error"].fillna(0)
                low, high = ordered["y"] - half, ordered["y"] + half
                if "low" in ordered:
                    low, high = ordered["low"].fillna(low), ordered["high"].fillna(high)
                if (high > low).any():
                    axes.fill_between(ordered["x"], low, high, color=marker["color"], alpha=0.13, linewidth=0)
                axes.plot(
                    ordered["x"],
                    ordered["y"],
                    linestyle=line,
                    markevery=(number % every, every),  # staggered: curves that agree keep their markers apart
                    zorder=2,
                    **marker,
                )
            axes.xaxis.set_major_locator(MaxNLocator(num_ticks))
            if shared_x:
                axes.set_xlim(*_padded(found["x"].to_numpy(dtype=float)))
        _labels(figure, x_label, y_label)
        _legend(figure, looks, width, line=True)
        return drawn(figure)


def named_points(points: pd.DataFrame, *, x_label: str, y_label: str, width: Width) -> Drawn | None:
    """Columns panel, series, x, y, x_error, y_error: a point each with bars of 1.96 errors (NaN: none)."""
    found = points.dropna(subset=["x", "y"])
    if found.empty:
        return None
    with style(width):
        figure, all_axes, panels = _grid(found, width, height=2.6, shared_y=True)
        looks = _looks(found)
        for axes, panel in zip(all_axes, panels, strict=True):
            axes.axvline(0, color=SOFT, linewidth=0.8, zorder=1)
            for point in found[found["panel"] == panel].to_dict("records"):
                x_bar, y_bar = _bar(point["x_error"]), _bar(point["y_error"])
                axes.errorbar(
                    point["x"], point["y"], xerr=x_bar, yerr=y_bar, color=INK, linewidth=0.8, capsize=2, zorder=2
                )
                axes.plot(point["x"], point["y"], linestyle="none", zorder=3, **looks[point["series"]][0])
            axes.margins(0.12)
        _labels(figure, x_label, y_label)
        _legend(figure, looks, width, line=False)
        return drawn(figure)


def matrix(
    cells: pd.DataFrame,
    *,
    row_label: str,
    column_label: str,
    width: Width,
    scales: Mapping[str, tuple[float, float]] | None = None,
) -> Drawn | None:
    """Columns panel, row, column, value (texts, texts, numbers): squares that are darker for more, with their number.

    ``scales``: least and greatest possible value by panel; without one a panel's own range, symmetric about 0 where
    both signs are there.
    """
    found = cells.dropna(subset=["value"])
    if found.empty:
        return None
    rows, columns = list(dict.fromkeys(cells["row"])), list(dict.fromkeys(cells["column"]))
    with style(width):
        height = 0.55 + 0.32 * len(rows) + 0.11 * max(len(wrapped(column, 14).split("\n")) for column in columns)
        per_row = 2 if width == "page" else 1
        figure, all_axes, panels = _grid(found, width, height=height, per_row=per_row)
        for number, (axes, panel) in enumerate(zip(all_axes, panels, strict=True)):
            part = found[found["panel"] == panel]
            table = part.pivot_table(index="row", columns="column", values="value", aggfunc="mean")
            values = table.reindex(index=rows, columns=columns).to_numpy()
            low, high = (scales or {}).get(panel) or _range(values)
            decimals = max(0, 2 - math.floor(math.log10(max(abs(low), abs(high)))))  # three digits of the largest
            axes.imshow(values, cmap="Greys", vmin=low, vmax=high + 0.35 * (high - low), aspect="auto")
            for (row, column), value in np.ndenumerate(values):
                text = "–" if math.isnan(value) else f"{value:.{decimals}f}"
                dark = not math.isnan(value) and (value - low) / (high - low) > 0.75
                axes.text(column, row, text, ha="center", va="center", color="white" if dark else INK, fontsize=7)
            axes.set_xticks(range(len(columns)), [wrapped(column, 14) for column in columns])
            axes.set_yticks(range(len(rows)), ["" if number % per_row else wrapped(row, 24) for row in rows])
            axes.tick_params(length=0)
            axes.grid(False)
        _labels(figure, column_label, row_label)
        return drawn(figure)


def bars(points: pd.DataFrame, *, x_label: str, y_label: str, width: Width, zero: bool = False) -> Drawn | None:
    """Columns panel, series, x (texts), y: bars side by side, told apart by hatching as well as colour."""
    found = points.dropna(subset=["y"])
    if found.empty:
        return None
    hatches = ("", "////", "....", "\\\\\\\\", "xxxx", "----")
    with style(width):
        figure, all_axes, panels = _grid(found, width, height=2.2, shared_y=True)
        series, places = list(dict.fromkeys(found["series"])), list(dict.fromkeys(found["x"]))
        thick = 0.8 / len(series)
        for axes, panel in zip(all_axes, panels, strict=True):
            for number, name in enumerate(series):
                part = found[(found["panel"] == panel) & (found["series"] == name)].set_index("x")["y"]
                at = [place for place in places if place in part.index]
                axes.bar(
                    [places.index(place) + (number - (len(series) - 1) / 2) * thick for place in at],
                    [float(part[place]) for place in at],
                    thick,
                    color=COLORS[number % len(COLORS)] if number else SOFT,
                    edgecolor="white" if hatches[number % len(hatches)] else INK,
                    hatch=hatches[number % len(hatches)],
                    linewidth=0.5,
                    label=wrapped(name, 40) if axes is all_axes[0] else None,
                )
            if zero:
                axes.axhline(0, color=SOFT, linewidth=0.8)
            axes.set_xticks(range(len(places)), places)
            axes.grid(False, axis="x")
        _labels(figure, x_label, y_label)
        figure.legend(loc="outside upper center", ncols=_LEGEND_COLUMNS[width])
        return drawn(figure)


def _grid(
    found: pd.DataFrame, width: Width, *, height: float, shared_y: bool = False, per_row: int | None = None
) -> tuple[Figure, list[Axes], list[str]]:
    """A figure with a titled panel per value of ``panel``; ``height`` inches each."""
    panels = [str(panel) for panel in dict.fromkeys(found["panel"])]
    wanted = per_row or _PER_ROW[width]
    columns = min(wanted, len(panels))
    num_rows = math.ceil(len(panels) / columns)
    names = len(set(found["series"])) if "series" in found else 0
    legend = 0.17 * math.ceil(names / _LEGEND_COLUMNS[width]) + 0.3
    figure = new_figure(width, num_rows * height + legend)
    grid = figure.subplots(num_rows, columns, squeeze=False, sharey=shared_y)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    used = list(grid.flat[: len(panels)])
    for axes, panel in zip(used, panels, strict=True):
        axes.set_title(wrapped(panel, 34 if columns > 1 else 60, 2))
        axes.tick_params(labelleft=True) if not shared_y else None
    return figure, used, panels


def _looks(found: pd.DataFrame) -> dict[str, tuple[dict[str, Any], Any]]:
    """Marker and line by series, in order of appearance; when the markers are used up they come again, hollow."""
    looks: dict[str, tuple[dict[str, Any], Any]] = {}
    for number, series in enumerate(dict.fromkeys(found["series"])):
        color = COLORS[number % len(COLORS)]
        filled = {"markerfacecolor": color, "markeredgecolor": "white", "markeredgewidth": 0.4}
        hollow = {"markerfacecolor": "white", "markeredgecolor": color, "markeredgewidth": 1.0}
        marker = {
            "marker": _ALL_MARKERS[number % len(_ALL_MARKERS)],
            "color": color,
            "markersize": 5,
            **(filled if number < len(_ALL_MARKERS) else hollow),
        }
        looks[str(series)] = (marker, LINES[number % len(LINES)])
    return looks


def _legend(figure: Figure, looks: dict[str, tuple[dict[str, Any], Any]], width: Width, *, line: bool) -> None:
    axes = figure.axes[0]
    handles = [
        axes.plot([], [], linestyle=dashes if line else "none", label=wrapped(series, 40, 2), **marker)[0]
        for series, (marker, dashes) in looks.items()
    ]
    if len(looks) > 1 or next(iter(looks)):
        figure.legend(handles=handles, loc="outside upper center", ncols=_LEGEND_COLUMNS[width], handlelength=3.5)


def _labels(figure: Figure, x_label: str, y_label: str) -> None:
    figure.supxlabel(x_label, fontsize=8)
    figure.supylabel(y_label, fontsize=8)


def _bar(error: float) -> float | None:
    return None if math.isnan(error) else 1.96 * error


def _padded(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return low - room, high + room


def _range(values: np.ndarray) -> tuple[float, float]:
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if low < 0 < high:
        low, high = -max(-low, high), max(-low, high)
    return (low, high) if high > low else (low - 1, high + 1)


def summarised(rows: pd.DataFrame, by: Sequence[str], value: str) -> pd.DataFrame:
    """Mean of ``value`` over the rows of each group as y, with its standard error (NaN for one row) as error."""
    found = rows.dropna(subset=[value]).groupby(list(by), sort=False)[value]
    return pd.DataFrame({"y": found.mean(), "error": found.sem()}).reset_index()
