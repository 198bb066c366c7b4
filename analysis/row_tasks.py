"""What a row of a sweep, or a measurement, is made of: its tasks, each with the keys of what it makes in the store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from analysis.manifest import MeasureEntry, RunEntry, run_key, tensors_key
from analysis.tables import table_key


@dataclass(frozen=True)
class RowTask:
    """A task of an entry and the key of what it makes."""

    name: str
    task_id: str
    key: str


def tasks_of(entry: RunEntry) -> Iterator[RowTask]:
    """The tasks of a row of the sweep, in the order in which they can be done."""
    if entry.kind == "run":
        yield RowTask("train", entry.run_id, run_key(entry.run_id))
    yield RowTask("sample", entry.sample_id, table_key("generations", entry.sample_id))
    for metric, judge_id in entry.judge_ids.items():
        yield RowTask(f"judge {metric}", judge_id, table_key("scores", judge_id))
    if entry.plain_loss_id is not None:
        yield RowTask("plain loss", entry.plain_loss_id, table_key("losses", entry.plain_loss_id))


def measurement_keys(entry: MeasureEntry) -> dict[str, list[str]]:
    """The tasks of a measurement, each with the keys of what it makes."""
    keys = {
        shard: [
            *(table_key(table, shard) for table in entry.tables),
            *([tensors_key(shard)] if entry.has_tensors else []),
        ]
        for shard in entry.shard_ids
    }
    if entry.merge_id is not None:
        keys[entry.merge_id] = [table_key(table, entry.merge_id) for table in entry.merged_tables]
    return keys
