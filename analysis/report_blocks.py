"""Blocks: the things to look at that the report shows of a measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import pandas as pd

from analysis.figure_style import Drawn, Width
from analysis.report_content import NO_VALUE

MAX_LAYERS = 3
"""Of a figure that has a panel, or more, for each."""
WIDTHS: tuple[Width, ...] = ("page", "column")


@dataclass(frozen=True)
class Block:
    """One thing to look at. ``name`` is the stem of its files; ``drawn`` holds the figure by width, if there is one;
    ``head`` and ``rows`` are a table, if there is one."""

    name: str
    title: str
    text: str
    drawn: Mapping[Width, Drawn] = field(default_factory=dict)
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def drawn_block(name: str, title: str, text: str, draw: Callable[..., Drawn | None]) -> Iterator[Block]:
    drawn = {width: figure for width in WIDTHS if (figure := draw(width=width)) is not None}
    if drawn:
        yield Block("".join(c if c.isalnum() or c in "-_" else "_" for c in name), title, text, drawn)


def few_layers(read: pd.DataFrame) -> list[int]:
    """Layers that are drawn: the first, the middle and the last that were read; nothing is chosen by what it shows."""
    layers = sorted(set(read["layer"].dropna()))
    if len(layers) <= MAX_LAYERS:
        return layers
    return [layers[0], layers[len(layers) // 2], layers[-1]]


def number(value: float, form: str) -> str:
    return NO_VALUE if pd.isna(value) else format(value, form)


def interval(value: float, low: float, high: float) -> str:
    return NO_VALUE if pd.isna(value) else f"{value:+.2f} ({low:+.2f} to {high:+.2f})"
