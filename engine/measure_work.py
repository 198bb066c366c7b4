"""Measuring inside a trial: a shard is read by the model that the process holds, a merge step reads shards again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load, save

from analysis.manifest import tensors_key, vector_key
from analysis.measurements import Made, Part, Shard
from analysis.vectors import Vector
from engine.measure_jobs import MeasureJob, MergeJob, StudyJob
from engine.store import Store
from trainables.base_model import LoadedBase
from trainables.defenses import Message
from trainables.interventions import Interventions
from trainables.residual_stream import ValueIntervention
from trainables.tune_trainable import Report


def measure_shard(
    store: Store,
    job: MeasureJob,
    base: LoadedBase,
    model: Any,
    rows: Sequence[Sequence[Message]],
    at_work: Callable[[Interventions], list[ValueIntervention]],
    report: Report,
) -> None:
    """Measure a shard and publish what comes of it. ``rows`` are all rows of the data; ``at_work``: see ``Shard``."""

    def progress(done: int, total: int) -> None:
        report(phase="measure", units_done=done, units_total=total)

    made = job.measurement.measure(
        Shard(
            measure_id=job.id,
            base=base,
            model=model,
            rows={row: rows[row] for row in job.rows},
            max_length=job.max_length,
            vectors=_vectors(store, job.vector_ids),
            at_work=at_work,
            progress=progress,
        )
    )
    assert set(made.tables) == set(job.measurement.tables), made.tables.keys()
    if job.measurement.has_tensors:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in made.tensors.items()}
        store.publish(tensors_key(job.id), save(tensors))
    _publish(store, job.id, made)


def study_shard(store: Store, job: StudyJob, report: Report) -> None:
    """Compute a shard of a study and publish what comes of it."""

    def progress(done: int, total: int) -> None:
        report(phase="measure", units_done=done, units_total=total)

    made = job.measurement.compute(job.id, job.cells, progress)
    assert set(made.tables) == set(job.measurement.tables), made.tables.keys()
    _publish(store, job.id, made)


def merge_shards(store: Store, job: MergeJob) -> None:
    """Make the tables of the merge step from those of the shards."""
    parts = [
        Part(
            tables={table: store.read_table(table, shard).to_pandas() for table in job.measurement.tables},
            tensors=load(store.read(tensors_key(shard))) if job.measurement.has_tensors else {},
        )
        for shard in job.shard_ids
    ]
    made = job.measurement.merge(job.id, parts, _vectors(store, job.vector_ids))
    assert set(made.tables) == set(job.measurement.merged_tables), made.tables.keys()
    _publish(store, job.id, made)


def _publish(store: Store, task_id: str, made: Made) -> None:
    for table, rows in made.tables.items():
        store.publish_table(table, task_id, rows)


def _vectors(store: Store, ids: Sequence[str]) -> Mapping[str, torch.Tensor]:
    return {name: Vector.read(store.path(vector_key(name))).values for name in ids}
