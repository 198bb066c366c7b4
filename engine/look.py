"""Looking at the runs of a sweep: how far they are, what one was, how two differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from analysis.manifest import RunEntry
from analysis.results import Results
from engine.lease import current_holder
from engine.run import log_lines
from engine.show import frame_table, plain_table
from engine.store import Store
from trainables.errors import ConfigError, Fault

NUM_ANSWERS = 4
NUM_LOG_LINES = 8
TIMES = ("seconds_training", "num_steps", "num_tokens", "train_loss_last_epoch", "started_utc", "finished_utc")


def find_run(results: Results, text: str) -> RunEntry:
    """The run or base called ``text``: its label, or the beginning of its id that no other one has."""
    entries = results.manifest.runs
    matching = [entry for entry in entries if entry.label == text]
    matching = matching or [entry for entry in entries if text and entry.run_id.startswith(text)]
    if len(matching) == 1:
        return matching[0]
    problem = "no run is called" if not matching else "several runs are called"
    known = ", ".join(f"{entry.label!r} ({entry.run_id})" for entry in entries)
    raise ConfigError([Fault("run", f"{problem} {text!r}; runs of {results.name}: {known}")], "nothing was read")


def status_view(results: Results) -> RenderableType:
    """Who runs the sweep, and per run its status and the last thing that its log says."""
    store = Store.open(results.root)
    holder = current_holder(store, results.name)
    heading = f"being run by {holder.describe()}" if holder is not None else "nobody runs it now"
    table = plain_table(f"{results.name}: {heading}")
    for column in ("run", "id", "status", "last log line"):
        table.add_column(column, no_wrap=column in ("id", "status"), overflow="fold")
    for row in results.runs().to_dict("records"):
        last = next(reversed(log_lines(store, str(row["run_id"]))), "")
        reason = "" if pd.isna(row["reason"]) else str(row["reason"])
        cells = (str(row["run"]), str(row["run_id"]), str(row["status"]), reason or last)
        table.add_row(*(Text(text) for text in cells))
    return table


def show_view(results: Results, entry: RunEntry) -> RenderableType:
    """One run: settings, times, results, answers, the end of its log."""
    store = Store.open(results.root)
    record = _row(results.runs(), entry)
    settings = _pairs("settings", ((name, _text(value)) for name, value in entry.config.items()))
    times = _pairs("training", ((name, _text(record[name])) for name in ("status", *TIMES)))
    measured = _measured(_row(results.summary(), entry))
    outcome = _pairs("results", ((name, _text(value)) for name, value in measured.items()))
    parts: list[RenderableType] = [Text(f"{entry.label} ({entry.run_id})", style="bold"), settings, times, outcome]
    answers = results.generations()
    answers = answers[answers["run"] == entry.label].head(NUM_ANSWERS)[["question", "answer"]]
    if len(answers):
        parts.append(frame_table(answers, title="first answers"))
    lines = log_lines(store, entry.run_id)[-NUM_LOG_LINES:]
    if lines:
        parts.append(Text("\n".join(["last log lines", *lines])))
    return Group(*parts)


def diff_view(results: Results, one: RunEntry, other: RunEntry) -> RenderableType:
    """Two runs side by side: the settings that differ, then all results."""
    settings = plain_table("settings that differ")
    outcome = plain_table("results")
    for table in (settings, outcome):
        table.add_column("")
        table.add_column(Text(one.label), overflow="fold")
        table.add_column(Text(other.label), overflow="fold")
    absent = object()
    for name in dict.fromkeys([*one.config, *other.config]):
        values = [entry.config.get(name, absent) for entry in (one, other)]
        if values[0] != values[1]:
            settings.add_row(name, *(Text("" if value is absent else _text(value)) for value in values))
    if not settings.row_count:
        settings.add_row("none", "", "")
    summary = results.summary()
    pairs = [_measured(_row(summary, entry)) for entry in (one, other)]
    for name in dict.fromkeys([*pairs[0], *pairs[1]]):
        outcome.add_row(name, *(Text(_text(pair.get(name))) for pair in pairs))
    return Group(settings, outcome)


def _row(frame: pd.DataFrame, entry: RunEntry) -> dict[str, Any]:
    (row,) = frame[frame["run"] == entry.label].to_dict("records")
    return {str(name): value for name, value in row.items()}


def _measured(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the summary without what is said elsewhere."""
    hidden = ("run", "kind")
    return {k: v for k, v in row.items() if k not in hidden and not k.endswith("_missing_by_status")}


def _pairs(title: str, pairs: Iterator[tuple[str, str]]) -> Table:
    table = plain_table(title)
    table.add_column("name", no_wrap=True)
    table.add_column("value", overflow="fold")
    for name, value in pairs:
        table.add_row(Text(name), Text(value))
    return table


def _text(value: object) -> str:
    if value is None or value is pd.NA:
        return "-"
    if isinstance(value, float):
        return "-" if pd.isna(value) else f"{value:.4g}"
    return str(value)
