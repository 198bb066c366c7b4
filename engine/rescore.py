"""Scoring again offline: judges' rules applied to replies that are on disk. Nothing is asked or trained."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from analysis.results import Results, load
from analysis.tables import table_key
from engine.judging import Judged, ReplyDesk, judge_task
from engine.lease import Lease
from engine.machine import read_machine
from engine.prepare import prepare
from engine.run import pending_judge_tasks, publish_report, write_sweep
from engine.stopping import Stoppable
from engine.store import Store


@dataclass(frozen=True)
class Rescored:
    """What came of it. ``num_open``: answers whose judge was never asked; ``num_waiting``: judging tasks without
    answers yet."""

    results: Results
    num_tasks: int
    num_scored: int
    num_open: int
    num_waiting: int


def rescore(path: str | Path, overrides: Sequence[str] = ()) -> Rescored:
    """Do all judging of a sweep that is not done, by what is known.

    What a rule makes of a reply is part of a judging task's identity, so another threshold, another prompt of the same
    requests or a fix of the rule makes new tasks; their requests may be known already. An answer whose request is not
    known has the status ``api_error`` and is asked by the next ``run``.

    Raises ConfigError for a faulty file, StoreError if there is no store yet, LeaseHeldError while a driver runs the
    sweep.
    """
    prepared = prepare(path, overrides, read_machine())
    store = Store.open(prepared.sweep.results)
    with Stoppable() as driver, Lease(store, prepared.sweep.name, lambda _: driver.stop()):
        write_sweep(prepared, store)
        unjudged = pending_judge_tasks(prepared, store).values()
        ready = [task for task in unjudged if store.exists(table_key("generations", task.sample_id))]

        async def judge_all() -> list[Judged]:
            desk = ReplyDesk(store, None)
            return [await judge_task(store, task, desk) for task in ready]

        with ThreadPoolExecutor(1) as thread:  # a notebook's own thread has an event loop already
            judged = thread.submit(lambda: asyncio.run(judge_all())).result()
        results = load(store.sweep(prepared.sweep.name))
        publish_report(results, store)
    return Rescored(
        results=results,
        num_tasks=len(ready),
        num_scored=sum(one.num_answers - one.num_open for one in judged),
        num_open=sum(one.num_open for one in judged),
        num_waiting=len(unjudged) - len(ready),
    )
