"""Tables for a terminal, readable at 80 columns: no lines, short headings, and ids and numbers are never cut."""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from analysis.results import Results
from engine.graph import Cost
from engine.judge_costs import answer_costs, judge_costs
from engine.measure_tasks import MeasureCost
from engine.packs import num_packs, trained_runs
from engine.prepare import Prepared
from engine.run import pending_answers, pending_jobs, pending_judge_tasks
from engine.smoke import WHAT
from engine.store import Store
from engine.tasks import AnswersJob, JudgeTask, RunJob, VectorJob
from engine.weight_jobs import PileJob
from trainables.errors import StoreError

_ENOUGH_CHARACTERS = 20  # a longer value can be read in a column of this width
_GAP = 2  # characters between two columns


def plain_table(title: str | None = None) -> Table:
    return Table(
        title=None if title is None else Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, _GAP - 1, 0, 0),  # the box draws one space between columns
    )


def number_column(table: Table, heading: str, justify: Literal["left", "right"] = "right") -> None:
    table.add_column(Text(heading), justify=justify, no_wrap=True, vertical="top")


def failures_table(results: Results) -> FrameView:
    """What failed in the last invocation, with the reason."""
    return frame_table(results.failures(), title="failures")


def plan_table(prepared: Prepared) -> Table:
    """Every task group of a sweep with its cost and what is done already. What rows share counts once in the sums.

    Rows that are not asked for (``--only``) are counted in the caption alone.
    """
    try:
        store = Store.open(prepared.sweep.results)
    except StoreError:
        store = None
    pending = set(prepared.jobs) if store is None else set(pending_jobs(prepared, store))
    unjudged = set(prepared.judge_tasks) if store is None else set(pending_judge_tasks(prepared, store))
    side = f"{prepared.num_trials} side by side on {prepared.device}"
    smoke = " (smoke)" if prepared.smoke else ""
    table = plain_table(f"{prepared.sweep.name}{smoke}: {len(prepared.jobs)} jobs, {side}")
    table.add_column("job", overflow="fold")
    for heading in ("id", "done"):
        number_column(table, heading, "left")
    for heading in ("steps", "training\ntokens", "answers", "judge-\nments"):
        number_column(table, heading)
    for job in prepared.jobs.values():
        if isinstance(job, VectorJob):
            table.add_row(Text(job.label), job.id, _done(job.id not in pending))
        elif isinstance(job, AnswersJob):
            done = job.id not in pending and not {task.id for task in _judged_of(job, prepared)} & unjudged
            table.add_row(Text(job.label), job.id, _done(done), *_numbers(_answers_cost(job, prepared)))
    for job in _only_trained(prepared):
        table.add_row(Text(job.label), job.id, _done(job.id not in pending), *_numbers(_training_cost(job, prepared)))
    for entry in prepared.asked:
        done = entry.run_id not in pending and not set(entry.judge_ids.values()) & unjudged
        numbers = _numbers(prepared.costs[entry.label])
        table.add_row(Text(entry.label), entry.run_id, _done(done), *numbers)
    measurements, notes = _planned_measurements(prepared, pending)
    piles, pile_notes = _planned_piles(prepared, pending)
    notes += pile_notes
    for row in (*piles, *measurements):
        table.add_row(*row)
    table.add_section()
    table.add_row("all", "", "", *_numbers(total_cost(prepared)))
    tasks = [task for task in prepared.judge_tasks.values() if task.id in unjudged]
    asked = judge_costs(tasks, prepared.jobs.values(), prepared.sweep.endpoints)
    asked += answer_costs(pending_answers(prepared, store), prepared.sweep.endpoints)
    notes += [cost.describe() for cost in asked] or ["judgements by rule cost nothing"]
    notes += _packs(prepared, store, pending)
    if prepared.only is not None:
        notes.append(f"{prepared.num_runs - prepared.num_asked} of {prepared.num_runs} runs not asked for (--only)")
    if prepared.smoke:
        notes += [f"smoke: {WHAT}", f"results go to {prepared.sweep.results}"]
    table.caption = Text("\n".join(notes))
    table.caption_justify = "left"
    return table


def _packs(prepared: Prepared, store: Store | None, pending: Set[str]) -> list[str]:
    """In how many packs the trainings that are left are done; nothing where each is a trial of its own."""
    jobs = {job_id: job for job_id, job in prepared.jobs.items() if job_id in pending}
    packer = prepared.packer(jobs, [] if store is None else trained_runs(jobs, store))
    count = num_packs(packer)
    if packer.size == 1 or not packer.keys:
        return []
    of = f"of at most {packer.size}" if packer.size is not None else "of as many runs as fit"
    packs = f"{count} pack{'s' if count != 1 else ''}"
    left = len(packer.keys)
    return [f"{left} training{'s' if left != 1 else ''} in {packs} {of}, {prepared.packing}"]


def _planned_measurements(prepared: Prepared, pending: Set[str]) -> tuple[list[list[Any]], list[str]]:
    """A row per measurement and model that is asked for, and what measuring takes in all."""
    rows: list[list[Any]] = []
    done: list[MeasureCost] = []
    for entry in prepared.manifest.measurements:
        ids = (*entry.shard_ids, *([entry.merge_id] if entry.merge_id else []))
        if not set(ids) & set(prepared.jobs):
            continue
        cost = prepared.measure_costs.get((entry.name, entry.run))
        open_shards = len(set(entry.shard_ids) & pending)
        state = "yes" if not set(ids) & pending else "no" if open_shards == len(entry.shard_ids) else "partly"
        rows.append([Text(f"measure {entry.name} of {entry.run}"), ids[-1], state, "", "", "", ""])
        done += [cost] if cost is not None else []
    if not done:
        return rows, []
    sums = [f"{sum(getattr(cost, name) for cost in done):,}" for name in ("num_shards", "num_forwards", "num_tokens")]
    return rows, [f"measuring: {sums[0]} shards, {sums[1]} forward passes of a row, about {sums[2]} tokens"]


def _planned_piles(prepared: Prepared, pending: Set[str]) -> tuple[list[list[Any]], list[str]]:
    """A row per pile that is asked for, and what its gradients take at most: which answers belong is not known yet."""
    rows: list[list[Any]] = []
    most: dict[str, int] = {}
    for pile in prepared.manifest.piles:
        jobs = [job for shard in pile.shard_ids if isinstance(job := prepared.jobs.get(shard), PileJob)]
        if not jobs:
            continue
        open_shards = len(set(pile.shard_ids) & pending)
        state = "yes" if not open_shards else "no" if open_shards == len(jobs) else "partly"
        rows.append([Text(f"pile {pile.name} of {pile.run}"), pile.shard_ids[-1], state, "", "", "", ""])
        most |= {job.id: job.stop - job.start for job in jobs}
    if not rows:
        return rows, []
    return rows, [f"piles: {len(most)} shards, at most {sum(most.values()):,} forward and backward passes of an answer"]


def total_cost(prepared: Prepared) -> Cost:
    """What the rows asked for, their vectors and the runs that they start from take together.

    Rows that differ in their evaluation alone share the training.
    """
    entries = [(entry, prepared.costs[entry.label]) for entry in prepared.asked]
    trainings = list({entry.run_id: cost for entry, cost in entries}.values())
    trainings += [_training_cost(job, prepared) for job in _only_trained(prepared)]
    asked = [_answers_cost(job, prepared) for job in prepared.jobs.values() if isinstance(job, AnswersJob)]
    samples = {entry.sample_id: cost.num_answers for entry, cost in entries}
    judged = {judge_id: cost.num_answers for entry, cost in entries for judge_id in entry.judge_ids.values()}
    return Cost(
        num_steps=sum(cost.num_steps for cost in trainings),
        num_training_tokens=sum(cost.num_training_tokens for cost in trainings),
        num_answers=sum(samples.values()) + sum(cost.num_answers for cost in asked),
        num_judgements=sum(judged.values()) + sum(cost.num_judgements for cost in asked),
    )


def _only_trained(prepared: Prepared) -> list[RunJob]:
    """Runs that are not asked for (``--only``), and that some of those start from: they are trained, no more."""
    asked = {entry.run_id for entry in prepared.asked}
    return [job for job in prepared.jobs.values() if isinstance(job, RunJob) and job.id not in asked]


def _training_cost(job: RunJob, prepared: Prepared) -> Cost:
    label = next(entry.label for entry in prepared.manifest.runs if entry.run_id == job.id)
    return replace(prepared.costs[label], num_answers=0, num_judgements=0)


def _judged_of(job: AnswersJob, prepared: Prepared) -> list[JudgeTask]:
    return [task for task in prepared.judge_tasks.values() if task.sample_id == job.id]


def _answers_cost(job: AnswersJob, prepared: Prepared) -> Cost:
    """What answers that a vector is made of take."""
    num_answers = len(job.sample.questions) * job.sample.sampling.samples
    return Cost(0, 0, num_answers, num_answers * len(_judged_of(job, prepared)))


def _numbers(cost: Cost) -> list[str]:
    counts = (cost.num_steps, cost.num_training_tokens, cost.num_answers, cost.num_judgements)
    return [f"{count:,}" for count in counts]


def _done(done: bool) -> str:
    return "yes" if done else "no"


def frame_table(frame: pd.DataFrame, title: str) -> FrameView:
    """Any data frame."""
    return FrameView(frame, title)


@dataclass(frozen=True)
class FrameView:
    """A data frame as a table, or where the terminal is too narrow for that, row by row with a line per column."""

    frame: pd.DataFrame
    title: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names = [str(column) for column in self.frame.columns]
        rows = [[_cell(value) for value in row] for row in self.frame.itertuples(index=False)]
        longest = [
            max(cell_len(line) for text in column for line in text.split("\n"))
            for column in zip(names, *rows, strict=True)
        ]
        yield Text(f"{self.title}: {len(rows)} row{'s' if len(rows) != 1 else ''}", style="bold")
        if not rows or sum(min(length, _ENOUGH_CHARACTERS) + _GAP for length in longest) - _GAP <= options.max_width:
            table = plain_table()
            for name, length in zip(names, longest, strict=True):
                table.add_column(Text(name), overflow="fold", no_wrap=length <= _ENOUGH_CHARACTERS)
            for row in rows:
                table.add_row(*(Text(text) for text in row))
            yield table
            return
        for number, row in enumerate(rows, start=1):
            yield Text(f"\nrow {number}", style="bold")
            record = Table.grid(padding=(0, _GAP, 0, 0))
            record.add_column(no_wrap=True, style="dim")
            record.add_column(overflow="fold")
            for name, text in zip(names, row, strict=True):
                record.add_row(Text(name), Text(text))
            yield record


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return "-" if value is None or value is pd.NA else str(value)
