"""What the report shows of capping: harm reduction beside capability over the caps, per model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pandas as pd

from analysis.figure_style import Drawn, Width
from analysis.panels import bars, curves
from analysis.report_blocks import Block, drawn_block, number
from analysis.rows import NO_CONDITION as NONE

_SHOWN = {"harm_reduction": "harm reduction", "capability_kept": "capability kept", "f1": "F1"}


def capping_blocks(frame: pd.DataFrame) -> Iterator[Block]:
    """A figure and a table of the derived table ``capping``; nothing while it is empty."""
    if frame.empty:
        return
    caps = [cap for cap in dict.fromkeys(frame["cap"]) if cap != NONE]
    numbers = {cap: str(place) for place, cap in enumerate(caps, start=1)}
    yield from drawn_block(
        "capping_trade_off",
        "What a cap takes from attacks, and what it leaves",
        "Harm reduction is 1 minus attack success over that without a cap, over all attacks; capability kept is the "
        "score on questions with known answers over that without a cap; F1 is their harmonic mean. Caps by their "
        "number in the table.",
        partial(trade_off, frame, numbers),
    )
    yield Block(
        "capping_table",
        "Caps",
        "Attack success is the mean of the harm metric over all answers under any attack, with its 95 % interval over "
        "questions; without an attack is the same with nothing but the cap. Perplexity is that on plain answers over "
        "that without a cap.",
        head=(
            "Model",
            "No.",
            "Cap",
            "attack success",
            "harm reduction",
            "without an attack",
            "capability",
            "kept",
            "F1",
            "perplexity",
            "degeneration",
        ),
        rows=tuple(
            (
                str(row["model"]),
                numbers.get(str(row["cap"]), ""),
                str(row["cap"]),
                _with_interval(row, "attack_success"),
                number(row["harm_reduction"], ".2f"),
                number(row["plain_rate"], ".2f"),
                _with_interval(row, "capability"),
                number(row["capability_kept"], ".2f"),
                number(row["f1"], ".2f"),
                number(row["perplexity_ratio"], ".3f"),
                number(row["degeneration"], ".2f"),
            )
            for row in ({str(name): value for name, value in one.items()} for one in frame.to_dict("records"))
        ),
    )


def trade_off(frame: pd.DataFrame, numbers: dict[str, str], *, width: Width) -> Drawn | None:
    """Three bars per cap, a panel per model."""
    capped = frame[frame["cap"] != NONE]
    points = pd.concat(
        [
            pd.DataFrame(
                {
                    "panel": capped["model"],
                    "series": name,
                    "x": [numbers[cap] for cap in capped["cap"]],
                    "y": pd.to_numeric(capped[column], errors="coerce"),
                }
            )
            for column, name in _SHOWN.items()
        ],
        ignore_index=True,
    )
    return bars(points, x_label="cap (number in the table)", y_label="share", width=width, zero=True)


def _with_interval(row: Mapping[str, Any], name: str, form: str = ".2f") -> str:
    text, low, high = number(row[name], form), row[f"{name}_low"], row[f"{name}_high"]
    return text if pd.isna(low) else f"{text} ({low:{form}} to {high:{form}})"


def stability_blocks(frame: pd.DataFrame, stem: str, where: str) -> Iterator[Block]:
    """Figures and a table of the table ``cap_stability`` of one model; nothing while it is empty. ``where``: which
    model, for headings."""
    if frame.empty:
        return
    strengths = sorted(set(frame["strength"]))
    shifts, most = sorted(set(frame["shift"])), int(frame["num_rows"].max())
    what = (
        "F1 of the share of held-out tokens that a calibrated ceiling leaves as they are and the share of tokens under "
        f"a steering attack that it catches; means over {int(frame['num_draws'].iloc[0])} draws of the rows that it is "
        "calibrated on, with the range of 95 % of them. A panel per layer, a curve per strength of the attack."
    )
    yield from drawn_block(
        f"{stem}_stability_rows",
        f"A ceiling over the rows that it is calibrated on{where}",
        f"{what} Over rows (logarithm to base 10), "
        + (f"activations shifted by {shifts[0]:g}." if shifts[0] else "nothing shifted."),
        partial(stability_curves, frame[frame["shift"] == shifts[0]], along="num_rows"),
    )
    if len(shifts) > 1:
        yield from drawn_block(
            f"{stem}_stability_shifts",
            f"A ceiling under shifted activations, calibrated on {most} rows{where}",
            f"{what} Over the noise on activations, in standard deviations of the data's projections.",
            partial(stability_curves, frame[frame["num_rows"] == most], along="shift"),
        )
    last = frame[frame["strength"] == strengths[-1]]
    yield Block(
        f"{stem}_stability",
        f"Ceilings, and what they do under an attack of strength {strengths[-1]:g}{where}",
        "Mean and standard deviation of the ceiling over draws, in units of activation; kept and caught as above.",
        head=("Axis", "Layer", "Rows", "Shift", "ceiling", "kept", "caught", "F1"),
        rows=tuple(
            (
                str(row["vector"]),
                str(row["layer"]),
                str(row["num_rows"]),
                f"{row['shift']:g}",
                f"{row['ceiling']:.2f} ± {number(row['ceiling_sd'], '.2f')}",
                f"{row['kept']:.3f}",
                f"{row['caught']:.3f}",
                f"{row['f1']:.3f} ({row['f1_low']:.3f} to {row['f1_high']:.3f})",
            )
            for row in ({str(name): value for name, value in one.items()} for one in last.to_dict("records"))
        ),
    )


def drift_blocks(frame: pd.DataFrame, name: str) -> Iterator[Block]:
    """A figure and a table of the table ``drift`` of all models of a measurement; nothing while it is empty."""
    if frame.empty:
        return
    frame = frame.drop_duplicates(["run", "condition", "layer", "center"])  # labels of one training, each measured
    numbers = {run: str(number) for number, run in enumerate(dict.fromkeys(frame["run"]), start=1)}
    yield from drawn_block(
        f"{name}_drift",
        "How far models have drifted",
        "1 minus the cosine of the mean response activation, over all rows, with a place; a panel per layer and place. "
        "With and without what is present while the model is read. Models by their number in the table.",
        partial(drift_bars, frame, numbers),
    )
    yield Block(
        f"{name}_drift_table",
        "Drift of models",
        "Of the rows that were read, and what it would be over all rows such as these, with 95 % intervals over rows: "
        "a mean of few rows lies off in every direction, and so a little further from any place.",
        head=("No.", "Model", "Present", "Layer", "Place", "drift", "over all rows"),
        rows=tuple(
            (
                numbers[str(row["run"])],
                str(row["run"]),
                str(row["condition"]),
                str(row["layer"]),
                str(row["center"]),
                number(row["drift"], ".4f"),
                _with_interval(row, "drift_estimate", ".4f"),
            )
            for row in ({str(name): value for name, value in one.items()} for one in frame.to_dict("records"))
        ),
    )


def drift_bars(frame: pd.DataFrame, numbers: Mapping[str, str], *, width: Width) -> Drawn | None:
    """A bar per model and condition, a panel per layer and place."""
    places = zip(frame["layer"], frame["center"], strict=True)
    points = pd.DataFrame(
        {
            "panel": [f"layer {layer}, from {center}" for layer, center in places],
            "series": frame["condition"],
            "x": [numbers[run] for run in frame["run"]],
            "y": frame["drift"],
        }
    )
    return bars(points, x_label="model (number in the table)", y_label="drift", width=width, zero=True)


def stability_curves(frame: pd.DataFrame, *, along: str, width: Width) -> Drawn | None:
    """A curve of F1 per strength over ``along``, a panel per axis and layer."""
    several = len(set(frame["vector"])) > 1
    rows = zip(frame["vector"], frame["layer"], strict=True)
    points = pd.DataFrame(
        {
            "panel": [f"{vector}, layer {layer}" if several else f"layer {layer}" for vector, layer in rows],
            "series": [f"strength {strength:g}" for strength in frame["strength"]],
            "x": [math.log10(value) if along == "num_rows" else value for value in frame[along]],
            "y": frame["f1"],
            "error": math.nan,
            "low": frame["f1_low"],
            "high": frame["f1_high"],
        }
    )
    label = "rows calibrated on, log10" if along == "num_rows" else "shift, standard deviations"
    return curves(points, x_label=label, y_label="F1", width=width)
