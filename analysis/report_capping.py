"""What the report shows of capping: harm reduction beside capability over the caps, per model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pandas as pd

from analysis.figure_style import Drawn, Width
from analysis.panels import bars
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


def _with_interval(row: Mapping[str, Any], name: str) -> str:
    text, low, high = number(row[name], ".2f"), row[f"{name}_low"], row[f"{name}_high"]
    return text if pd.isna(low) else f"{text} ({low:.2f} to {high:.2f})"
