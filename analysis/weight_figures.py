"""Figures of steering in weight space, each a pure function of tables. None where there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.figure_style import Drawn, Width
from analysis.figures import Panel
from analysis.panels import curves
from analysis.weight_rows import DELTA


def rates_by_alpha(rows: pd.DataFrame, panels: Sequence[Panel], *, width: Width) -> Drawn | None:
    """Every quantity over alpha, a panel each and a curve per direction. Columns series, alpha, and per panel its name
    with ``_se``, ``_low``, ``_high``; the model before the edit is the row at alpha 0 of every series."""
    parts = [
        rows.assign(
            panel=panel.title,
            x=rows["alpha"],
            y=rows[panel.name],
            error=rows[f"{panel.name}_se"],
            low=rows[f"{panel.name}_low"],
            high=rows[f"{panel.name}_high"],
        )
        for panel in panels
    ]
    points = pd.concat(parts)[["panel", "series", "x", "y", "error", "low", "high"]]
    return curves(points, x_label="alpha", y_label="", width=width, shared_y=False, num_ticks=4)


def sizes_by_layer(profile: pd.DataFrame, *, width: Width) -> Drawn | None:
    """L2 norm at every layer of what the finetuning changed (a panel) and of every direction (another)."""
    sums = profile.groupby(["what", "layer"], sort=False)["sum_of_squares"].sum().reset_index()
    points = pd.DataFrame(
        {
            "panel": np.where(sums["what"] == DELTA, "what the finetuning changed: |Delta|", "directions: |V|"),
            "series": sums["what"],
            "x": sums["layer"],
            "y": np.sqrt(sums["sum_of_squares"]),
            "error": np.nan,
        }
    )
    return curves(points, x_label="layer", y_label="L2 norm", width=width, shared_y=False)


def distribution_of_sizes(sizes: pd.DataFrame, *, width: Width) -> Drawn | None:
    """Share of the entries of what the finetuning changed by their size, on a logarithmic scale. Sizes below the first
    bound, zero among them, have no place on it; the panel's title says how many they are."""
    total = int(sizes["num_entries"].sum())
    inside = sizes[(sizes["low"] > 0) & (sizes["high"] < math.inf)]
    if not total or inside.empty:
        return None
    left = 1 - float(inside["num_entries"].sum()) / total
    points = pd.DataFrame(
        {
            "panel": f"{total:,} entries" + (f", {left:.1%} of them smaller than shown" if left > 5e-4 else ""),
            "series": "",
            "x": (np.log10(inside["low"]) + np.log10(inside["high"])) / 2,
            "y": inside["num_entries"] / total,
            "error": np.nan,
        }
    )
    return curves(points, x_label="log10 |Delta|", y_label="share of entries", width=width)
