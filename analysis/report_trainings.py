"""The trainings of a sweep, each once: rows that differ in their evaluation alone share one.

A training is called by the words that the labels of its rows begin with; where something else is called the same, by
the label of its first row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import takewhile

import pandas as pd

from analysis.figure_style import Drawn, Width
from analysis.figures import thinned
from analysis.manifest import RunEntry
from analysis.panels import curves
from analysis.report_blocks import Block, drawn_block, few_layers
from analysis.report_content import kinds_of

_MAX_CURVES = 12
_WORDS = {
    "activation_projection": "activation along",
    "gradient_cosine": "gradient's cosine with",
    "drift": "drift from",
    "penalty": "",  # its name says so
}


def training_names(entries: Sequence[RunEntry]) -> dict[str, str]:
    """What the training of each run is called, by run id, in the order of the sweep."""
    labels: dict[str, list[str]] = {}
    for entry in entries:
        if entry.kind == "run":
            labels.setdefault(entry.run_id, []).append(entry.label)
    names = {run_id: _beginning(of_one) for run_id, of_one in labels.items()}
    counts = Counter(names.values())
    others = Counter(entry.label for entry in entries if entry.kind != "run")
    return {
        run_id: name if name and counts[name] + others[name] == 1 else labels[run_id][0]
        for run_id, name in names.items()
    }


def kinds_of_trainings(entries: Sequence[RunEntry]) -> dict[str, str]:
    """The kind of defense of each training, by its name."""
    kinds, first = kinds_of(entries), _first_rows(entries)
    return {name: kinds[first[run_id]] for run_id, name in training_names(entries).items()}


def once_each(frame: pd.DataFrame, entries: Sequence[RunEntry]) -> pd.DataFrame:
    """What a table with the columns ``run`` and ``run_id`` has of the first row of each training, under its name."""
    own = frame[frame["run"] == frame["run_id"].map(_first_rows(entries))]
    return own.assign(run=own["run_id"].map(training_names(entries)))


def signal_blocks(signals: pd.DataFrame, entries: Sequence[RunEntry]) -> Iterator[Block]:
    """A figure of what trainings showed beside their loss, the table ``signals``; nothing where that is empty."""
    own = once_each(signals, entries)
    if own.empty:
        return
    names = list(dict.fromkeys(own["run"]))
    more = f" The first {_MAX_CURVES} of {len(names)} trainings." if len(names) > _MAX_CURVES else ""
    shown, num_layers = few_layers(own), own["layer"].nunique()
    if len(shown) < num_layers:
        own = own[own["layer"].isna() | own["layer"].isin(shown)]
        more += f" The first, middle and last of {num_layers} layers."
    yield from drawn_block(
        "signals",
        "What was watched while runs trained",
        "Over optimizer steps, a curve per training: what training.watch asks for, of the response tokens of a step, "
        f"and what penalties add to the loss, in nats.{more}",
        partial(signal_curves, own[own["run"].isin(names[:_MAX_CURVES])]),
    )


def signal_curves(own: pd.DataFrame, *, width: Width) -> Drawn | None:
    """A panel per figure, name and layer of the table ``signals``, a curve per run."""
    parts = []
    where = own["layer"].map(lambda layer: "" if pd.isna(layer) else f", layer {layer:.0f}")
    for (signal, name, at, run), rows in own.assign(where=where).groupby(
        ["signal", "name", "where", "run"], sort=False
    ):
        points = thinned(rows, "value")
        parts.append(
            pd.DataFrame(
                {
                    "panel": f"{_WORDS[str(signal)]} {name}{at}".strip(),
                    "series": str(run),
                    "x": points["step"],
                    "y": points["value"],
                    "error": float("nan"),
                }
            )
        )
    return curves(
        pd.concat(parts, ignore_index=True),
        x_label="optimizer step",
        y_label="",
        width=width,
        shared_y=False,
        shared_x=True,
    )


def _first_rows(entries: Sequence[RunEntry]) -> dict[str, str]:
    """The label of the first row of each training, by run id."""
    return {entry.run_id: entry.label for entry in reversed(entries) if entry.kind == "run"}


def _beginning(labels: Sequence[str]) -> str:
    """The words that all labels begin with."""
    words = [label.split(" ") for label in labels]
    return " ".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False)))
