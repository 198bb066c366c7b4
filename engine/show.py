"""Tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd
from rich.table import Table

from analysis.results import Results
from engine.prepare import Prepared
from engine.run import pending_jobs, pending_judge_tasks
from engine.store import Store
from engine.tasks import RunJob
from trainables.errors import StoreError


def summary_table(results: Results) -> Table:
    """One line per base and run: every metric with its standard error and count, plain loss, training loss."""
    frame = results.summary()
    metrics = list(dict.fromkeys(metric for entry in results.manifest.runs for metric in entry.judge_ids))
    table = Table(title=f"{results.name}: mean ± standard error clustered by question", title_justify="left")
    table.add_column("run", overflow="fold")
    for metric in metrics:
        table.add_column(metric, justify="right")
    for column in ("plain loss", "train loss", "answers", "status"):
        table.add_column(column, justify="right" if column != "status" else "left")
    for row in frame.to_dict("records"):
        cells = [_estimate(row, metric) for metric in metrics]
        cells += [_number(row["plain_loss"]), _number(row["train_loss"]), _count(row["num_answers"])]
        cells.append(str(row["status"]))
        table.add_row(str(row["run"]), *cells)
    return table


def _estimate(row: Mapping[Hashable, Any], metric: str) -> str:
    mean, error = row[metric], row[f"{metric}_se"]
    missing = row[f"{metric}_num_missing"]
    text = "-" if pd.isna(mean) else f"{mean:.2f}"
    if not pd.isna(mean) and not pd.isna(error):
        text += f" ± {error:.2f}"
    return text if pd.isna(missing) or missing == 0 else f"{text} ({missing} missing)"


def _number(value: Any) -> str:
    return "-" if pd.isna(value) or not math.isfinite(value) else f"{value:.3f}"


def _count(value: Any) -> str:
    return "-" if pd.isna(value) else str(int(value))


def failures_table(results: Results) -> Table:
    """What failed in the last invocation, with the reason."""
    return frame_table(results.failures(), title="failures")


def plan_table(prepared: Prepared) -> Table:
    """Every task group of a sweep with its cost and what is done already."""
    try:
        store = Store.open(prepared.sweep.results)
    except StoreError:
        store = None
    pending = set(prepared.jobs) if store is None else set(pending_jobs(prepared, store))
    unjudged = set(prepared.judge_tasks) if store is None else set(pending_judge_tasks(prepared, store))
    side = f"{prepared.num_trials} side by side on {prepared.device}"
    table = Table(title=f"{prepared.sweep.name}: {len(prepared.jobs)} jobs, {side}", title_justify="left")
    for column in ("job", "id", "done"):
        table.add_column(column, overflow="fold")
    for column in ("steps", "training tokens", "answers", "judgements"):
        table.add_column(column, justify="right")
    for job in prepared.jobs.values():
        if not isinstance(job, RunJob):
            table.add_row(job.label, job.id, _done(job.id not in pending), "", "", "", "")
    totals = [0, 0, 0, 0]
    for entry in prepared.manifest.runs:
        cost = prepared.costs[entry.label]
        numbers = (cost.num_steps, cost.num_training_tokens, cost.num_answers, cost.num_judgements)
        totals = [total + number for total, number in zip(totals, numbers, strict=True)]
        done = entry.run_id not in pending and not set(entry.judge_ids.values()) & unjudged
        table.add_row(entry.label, entry.run_id, _done(done), *(f"{number:,}" for number in numbers))
    table.add_section()
    table.add_row("all", "", "", *(f"{total:,}" for total in totals))
    table.caption = "judgements by rule cost nothing"
    return table


def _done(done: bool) -> str:
    return "yes" if done else "no"


def frame_table(frame: pd.DataFrame, title: str) -> Table:
    """Any data frame."""
    table = Table(title=f"{title}: {len(frame)} rows", title_justify="left")
    for column in frame.columns:
        table.add_column(str(column), overflow="fold")
    for row in frame.itertuples(index=False):
        table.add_row(*(_cell(value) for value in row))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return "-" if value is None or value is pd.NA else str(value)
