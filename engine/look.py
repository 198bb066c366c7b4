"""Looking at the runs of a sweep: how far they are, what one was, how two differ."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from analysis.manifest import RunEntry, adapter_key, metrics_of, vector_key
from analysis.one_run import Run
from analysis.one_run import find_run as find_run
from analysis.quantities import PLAIN_LOSS
from analysis.reading import NOTHING, TRAIN_LOSS, interval_text, mean_text, readings
from analysis.results import Results
from engine.lease import current_holder
from engine.progress import duration
from engine.show import frame_table, plain_table
from engine.store import Store
from engine.watching import log_lines

NUM_ANSWERS = 4
NUM_LOG_LINES = 8
TIMES = ("seconds_training", "num_steps", "num_tokens", "train_loss_last_epoch", "started_utc", "finished_utc")


def status_view(results: Results) -> RenderableType:
    """Who runs the sweep, how far it is, and per run its status and the last thing that its log says.

    ``running``: not done, and its log has grown since the driver that runs the sweep began.
    """
    store = Store.open(results.location)
    holder = current_holder(store, results.name)
    records = results.runs().to_dict("records")
    lines = [_last_line(store, str(row["run_id"])) for row in records]
    states = [str(row["status"]) for row in records]
    for number, line in enumerate(lines):
        if states[number] == "missing" and holder is not None and _since(line, holder.taken_utc):
            states[number] = "running"
    counts = ", ".join(f"{count} {state}" for state, count in Counter(states).items())
    table = plain_table()
    for column in ("run", "id", "status", "last log line"):
        table.add_column(column, no_wrap=column in ("id", "status"), overflow="fold")
    for row, state, line in zip(records, states, lines, strict=True):
        said = str(row["reason"]) if not pd.isna(row["reason"]) else _ago(line)
        table.add_row(*(Text(text) for text in (str(row["run"]), str(row["run_id"]), state, said)))
    who = f"being run by {holder.describe()}" if holder is not None else "nobody runs it now"
    heading = Text(f"{results.name}: {who}\n{counts}", style="bold")
    vectors = [
        f"{name} ({'done' if store.exists(vector_key(vector)) else 'missing'})"
        for name, vector in results.manifest.vectors.items()
    ]
    lines_of_vectors = [Text(f"vectors: {', '.join(vectors)}")] if vectors else []
    return Group(heading, *lines_of_vectors, table, *_measurements_table(results))


def _measurements_table(results: Results) -> list[RenderableType]:
    """How far every measurement is; nothing where there is none."""
    frame = results.measurements()
    if frame.empty:
        return []
    table = plain_table()
    for column in ("measurement", "of", "status", "shards"):
        table.add_column(column, overflow="fold")
    for row in frame.to_dict("records"):
        shards = f"{row['shards_done']} of {row['num_shards']}"
        table.add_row(*(Text(str(text)) for text in (row["measurement"], row["run"], row["status"], shards)))
    return ["", table]


def show_view(results: Results, entry: RunEntry) -> RenderableType:
    """One run: settings, training, results, answers, the end of its log."""
    run = Run(results, entry)
    parts: list[RenderableType] = [Text(f"{entry.label} ({entry.run_id}): {run.status}", style="bold")]
    if run.reason:
        parts.append(Text(run.reason, style="red"))
    parts += _pairs("settings", entry.config)
    record = _row(results.runs(), entry)
    trained = {name: record[name] for name in TIMES if not pd.isna(record[name])}
    if trained:
        parts += _pairs("training", trained)
    measured = readings(_row(results.summary(), entry), results.manifest.runs)
    parts.append("")
    parts.append(frame_table(measured, title="results") if len(measured) else Text("nothing was measured yet"))
    answers = run.generations().head(NUM_ANSWERS)[["question", "answer"]]
    if len(answers):
        parts += ["", frame_table(answers, title="first answers")]
    lines = run.log.splitlines()[-NUM_LOG_LINES:]
    if lines:
        parts += ["", Text("last log lines", style="bold"), Text("\n".join(lines))]
    if run.has_adapter:
        parts += ["", Text(f"adapter: {results.location / adapter_key(entry.run_id)}", overflow="fold")]
        if entry.merged:
            parts.append(Text(f"it belongs on the base with the adapters of {', '.join(entry.merged)} merged into it"))
    return Group(*parts)


def diff_view(results: Results, one: RunEntry, other: RunEntry) -> RenderableType:
    """Two runs side by side: the settings that differ, then all results."""
    parts: list[RenderableType] = []
    absent = object()
    settings = _side_by_side(one, other)
    for name in dict.fromkeys([*one.config, *other.config]):
        values = [entry.config.get(name, absent) for entry in (one, other)]
        if values[0] != values[1]:
            settings.add_row(Text(name), *(Text("" if value is absent else _text(value)) for value in values))
    if settings.row_count:
        parts += [Text("settings that differ", style="bold"), settings]
    else:
        parts.append(Text("no setting differs", style="bold"))
    rows = [_row(results.summary(), entry) for entry in (one, other)]
    outcome = _side_by_side(one, other)
    for name in ("status", *metrics_of(results.manifest.runs), PLAIN_LOSS, TRAIN_LOSS):
        texts = [str(row[name]) if name == "status" else _with_interval(row, name) for row in rows]
        if any(text != NOTHING for text in texts):
            outcome.add_row(Text(name.replace("_", " ") if name in (PLAIN_LOSS, TRAIN_LOSS) else name), *texts)
    return Group(*parts, "", Text("results: mean ± standard error, 95 % interval", style="bold"), outcome)


def _side_by_side(one: RunEntry, other: RunEntry) -> Table:
    table = plain_table()
    table.add_column("", overflow="fold")
    for entry in (one, other):
        table.add_column(Text(entry.label), overflow="fold")
    return table


def _with_interval(row: dict[str, Any], name: str) -> str:
    interval = interval_text(row, name)
    return mean_text(row, name) + (f"\n{interval}" if interval else "")


def _last_line(store: Store, run_id: str) -> str:
    return next(reversed(log_lines(store, run_id)), "")


def _time_and_rest(line: str) -> tuple[datetime.datetime | None, str]:
    """When a line of a log was written, and what it says; None for a line that does not begin with its time."""
    stamp, _, rest = line.partition(" ")
    try:
        return datetime.datetime.fromisoformat(stamp), rest
    except ValueError:
        return None, line


def _since(line: str, start: datetime.datetime) -> bool:
    written, _ = _time_and_rest(line)
    return written is not None and written >= start.replace(microsecond=0)  # logs have whole seconds


def _ago(line: str) -> str:
    """The line with its age in place of its time."""
    written, said = _time_and_rest(line)
    if written is None:
        return line
    seconds = (datetime.datetime.now(datetime.UTC) - written).total_seconds()
    return f"{said} ({duration(max(0.0, seconds))} ago)"


def _row(frame: pd.DataFrame, entry: RunEntry) -> dict[str, Any]:
    (row,) = frame[frame["run"] == entry.label].to_dict("records")
    return {str(name): value for name, value in row.items()}


def _pairs(title: str, pairs: Mapping[str, object]) -> list[RenderableType]:
    table = plain_table()
    table.show_header = False
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        table.add_row(Text(name), Text(_text(value)))
    return ["", Text(title, style="bold"), table]


def _text(value: object) -> str:
    if value is None or value is pd.NA:
        return "-"
    if isinstance(value, float):
        return "-" if pd.isna(value) else f"{value:.4g}"
    return str(value)
