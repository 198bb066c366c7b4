"""Predictions in a terminal: the ranking of candidates, alone and across traits, and how well it held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.text import Text

from analysis.cross_trait import cross_trait
from analysis.foretold import how_it_held, measurement_of, ranking
from analysis.manifest import RunEntry
from engine.labels import unique_labels
from engine.show import number_column, plain_table

NOTHING = "-"


def predict_view(frame: pd.DataFrame, runs: Sequence[RunEntry] = (), layer: int | None = None) -> RenderableType:
    """``frame`` is that of ``analysis.foretold.foretold``, ``runs`` are the rows of the sweep."""
    if frame.empty:
        return Text("there are no predictions yet")
    ranked = ranking(frame, layer)
    parts: list[RenderableType] = []
    for _, rows in ranked.groupby(["measurement", "run"], sort=False):
        parts += [*_ranked(rows, _short_names(rows, runs), layer), ""]
    crossed = cross_trait(frame, layer)
    if len(crossed):
        parts += [*_crossed(crossed), ""]
    held = how_it_held(frame)
    if len(held):
        parts += _held(held)
    else:
        parts.append(Text("no run has had one of these as its defense; `shiftgrad run` trains them", style="dim"))
    return Group(*parts)


def _short_names(rows: pd.DataFrame, runs: Sequence[RunEntry]) -> list[str]:
    """What the candidates of one measurement are called: with what tells apart several runs that had one of them, and
    without what all of these share, such as the data."""
    configs = {run.label: run.config for run in runs}
    return unique_labels(list(rows["condition"]), [configs.get(label, {}) for label in rows["trained"]])


def _ranked(rows: pd.DataFrame, names: Sequence[str], layer: int | None) -> list[RenderableType]:
    first = rows.iloc[0]
    where = "mean over the layers read" if layer is None else f"layer {layer}"
    name = measurement_of(first["measurement"], first["run"])
    title = f"{name}: data {first['data']}, cosine along {first['trait']}, {where}"
    table = plain_table()
    table.add_column("candidate", overflow="fold")
    has_outcome = bool(rows["outcome"].notna().any())
    has_difference = bool(rows["projection_difference"].notna().any())
    headings = ["shift", "least to\ngreatest", "loss\ngap"]
    headings += ["projec-\ntion"] * has_difference + ["kept away\n[95 %]"] * has_outcome
    for heading in headings:
        number_column(table, heading)
    for name, row in zip(names, rows.to_dict("records"), strict=True):
        cells = [_number(row["shift"], "+.4f"), f"{row['least_shift']:+.3f} {row['greatest_shift']:+.3f}"]
        cells.append(_number(row["loss_gap"], "+.3f"))
        cells += [_number(row["projection_difference"], "+.2f")] * has_difference
        if has_outcome:
            interval = f"{row['outcome']:+.2f} [{row['outcome_low']:+.2f}, {row['outcome_high']:+.2f}]"
            cells.append(NOTHING if pd.isna(row["outcome"]) else interval)
        table.add_row(*(Text(text) for text in (name, *cells)))
    notes = "shift above 0: the data pushes less along the trait. loss gap above 0: the candidate explains the data."
    if has_outcome:
        notes += " kept away: the metric of the undefended run minus that of the run."
    return [Text(title, style="bold"), table, Text(notes, style="dim")]


def _crossed(crossed: pd.DataFrame) -> list[RenderableType]:
    """Candidates in rows, data in columns: what was foreseen, and what was found once there are runs."""
    table = plain_table()
    table.add_column("candidate", overflow="fold")
    has_score = bool(crossed["score"].notna().any())
    by_data = list(crossed.groupby("measurement", sort=False))
    for measurement, rows in by_data:
        number_column(table, f"{measurement}\nshift")
        if has_score:
            number_column(table, f"\n{next(iter(rows['metric'].dropna()), 'score')}")
    for candidate in dict.fromkeys(crossed["candidate"]):
        cells = [str(candidate)]
        for _, rows in by_data:
            found = rows[rows["candidate"] == candidate]
            cells.append(_number(found["shift"].mean(), "+.4f"))
            cells += [_number(found["score"].mean(), ".2f")] * has_score
        table.add_row(*(Text(cell) for cell in cells))
    parts: list[RenderableType] = [Text("across traits: each candidate on each data", style="bold"), table]
    if has_score:
        parts.append(Text("under a metric: its mean over the runs that were trained with the candidate", style="dim"))
    return parts


def _held(held: pd.DataFrame) -> list[RenderableType]:
    table = plain_table()
    table.add_column("score", overflow="fold")
    for heading in ("n", "rank correlation\n[95 %]", "p", "pooled r\n[95 %]", "AUC"):
        number_column(table, heading)
    for row in held.to_dict("records"):
        cells = [
            str(row["num_candidates"]),
            _interval(row, "rank_correlation", "rank"),
            _number(row["rank_p"], ".3f"),
            _interval(row, "pooled_r", "pooled"),
            _number(row["auc"], ".2f"),
        ]
        table.add_row(*(Text(text) for text in (str(row["score"]), *cells)))
    title = "how well the scores foretold what was kept away, over all candidates with a run"
    return [Text(title, style="bold"), table]


def _interval(row: dict[Any, Any], name: str, bounds: str) -> str:
    if pd.isna(row[name]):
        return NOTHING
    return f"{row[name]:+.2f} [{row[f'{bounds}_low']:+.2f}, {row[f'{bounds}_high']:+.2f}]"


def _number(value: float, form: str) -> str:
    return NOTHING if pd.isna(value) else format(value, form)
