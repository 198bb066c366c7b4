"""Which tasks of a sweep failed or were skipped, and what each was to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import pandas as pd

from analysis.manifest import Failure, Manifest, pile_key, vector_key
from analysis.row_tasks import measurement_keys, tasks_of

COLUMNS = ("run", "run_id", "task", "task_id", "kind", "reason", "log_tail")


def failures_frame(manifest: Manifest, failures: Mapping[str, Failure], exists: Callable[[str], bool]) -> pd.DataFrame:
    """One row per task of ``failures`` whose output is still missing; ``exists`` says whether a key is in the store.

    In the order of the sweep; tasks that nobody knows any more come last.
    """
    rows: list[dict[str, str | None]] = []
    known: set[str] = set()
    for task_id, keys, run, run_id, task in _tasks(manifest):
        if task_id in failures and not (all(exists(key) for key in keys) if keys else task_id in known):
            rows.append(_row(task_id, failures[task_id], run, run_id, task))
        known.add(task_id)
    rows += [_row(task_id, failure, None, None, None) for task_id, failure in failures.items() if task_id not in known]
    return pd.DataFrame({name: pd.Series([row[name] for row in rows], dtype="str") for name in COLUMNS})


def _tasks(manifest: Manifest) -> Iterator[tuple[str, Sequence[str], str | None, str | None, str]]:
    """Id, keys of the outputs (none: not asked after), run, its id, and what the task does."""
    for entry in manifest.runs:
        for task in tasks_of(entry):
            yield task.task_id, (task.key,), entry.label, entry.run_id, task.name
    for name, vector_id in manifest.vectors.items():
        yield vector_id, (vector_key(vector_id),), None, None, f"vector {name}"
    for measure in manifest.measurements:
        for task_id, keys in measurement_keys(measure).items():
            yield task_id, tuple(keys), measure.run, measure.run_id, f"measure {measure.name}"
    for asked in manifest.asked:
        what = f"vector {asked.vector}, {asked.about}"
        yield asked.sample_id, (), None, None, f"answers for {what}"
        for metric, judge_id in asked.judge_ids.items():
            yield judge_id, (), None, None, f"judge {metric} of {what}"
    for pile in manifest.piles:
        yield pile.sample_id, (), pile.run, None, "answers for piles"
        for metric, judge_id in pile.judge_ids.items():
            yield judge_id, (), pile.run, None, f"judge {metric} of answers for piles"
        for shard_id in pile.shard_ids:
            yield shard_id, (pile_key(shard_id),), pile.run, None, f"pile {pile.name}"


def _row(
    task_id: str, failure: Failure, run: str | None, run_id: str | None, task: str | None
) -> dict[str, str | None]:
    return {
        "run": run,
        "run_id": run_id,
        "task": task,
        "task_id": task_id,
        "kind": failure.kind,
        "reason": failure.reason,
        "log_tail": "\n".join(failure.log_tail),
    }
