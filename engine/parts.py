"""Which part of a sweep's jobs is done when not all of it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from analysis.manifest import RunEntry
from engine.measure_jobs import MeasureJob, MergeJob, StudyJob
from engine.tasks import Job, RunJob
from engine.weight_jobs import PileJob, ProfileJob


def part_of(jobs: Mapping[str, Job], rows: Sequence[RunEntry]) -> dict[str, Job]:
    """What of a sweep's ``jobs`` some of its rows need, in the same order: their runs and bases, of those the
    evaluations of ``rows`` alone, their measurements, and the vectors that all this rests on."""
    part: dict[str, Job] = {}
    for row in rows:
        job = jobs[row.run_id]
        assert isinstance(job, RunJob)
        same = [other for other in rows if other.run_id == row.run_id]
        samples, losses = {other.sample_id for other in same}, {other.plain_loss_id for other in same}
        part[job.id] = job.model_copy(
            update={
                "label": same[0].label,
                "samples": tuple(sample for sample in job.samples if sample.id in samples),
                "losses": tuple(loss for loss in job.losses if loss.id in losses),
            }
        )
    asked = set(part)
    part |= {job.id: job for job in jobs.values() if isinstance(job, MeasureJob) and job.run_id in asked}
    part |= {
        job.id: job
        for job in jobs.values()
        if isinstance(job, MergeJob) and all(shard in part for shard in job.shard_ids)
    }
    edited = {job.edit.finetuned_id for job in part.values() if isinstance(job, RunJob) and job.edit is not None}
    part |= {job.id: job for job in jobs.values() if isinstance(job, ProfileJob) and job.run_id in edited}
    needed = with_parents(jobs, part)
    for pile in [job for job in needed.values() if isinstance(job, PileJob)]:
        needed[pile.run_id] = _with_sample(needed[pile.run_id], jobs[pile.run_id], pile.sample_id)
    return needed


def _with_sample(part: Job, whole: Job, sample_id: str) -> Job:
    """``part`` of the run's job ``whole`` with this sampling task, which a pile needs."""
    assert isinstance(part, RunJob)
    assert isinstance(whole, RunJob)
    known = {sample.id for sample in part.samples} | {sample_id}
    return part.model_copy(update={"samples": tuple(sample for sample in whole.samples if sample.id in known)})


def measurements_of(jobs: Mapping[str, Job], table: str | None = None) -> dict[str, Job]:
    """What of a sweep's ``jobs`` its measurements need, in the same order: trainings of runs that are measured, without
    sampling from them, and vectors. ``table``: of those measurements alone that make this table."""
    part: dict[str, Job] = {
        job.id: job
        for job in jobs.values()
        if isinstance(job, MeasureJob | StudyJob | MergeJob)
        and table in (None, *job.measurement.tables, *job.measurement.merged_tables)
    }
    return with_parents(jobs, part)


def with_parents(jobs: Mapping[str, Job], part: Mapping[str, Job]) -> dict[str, Job]:
    """``part`` of ``jobs`` with all that it rests on, in the order of ``jobs``. A run that something else rests on is
    trained, and not sampled from."""
    needed = list(dict.fromkeys(parent for job in part.values() for parent in job.parents))
    for parent in needed:  # grows by the parents of parents
        needed += [other for other in jobs[parent].parents if other not in needed]
    rest = {job_id: job.bare() if isinstance(job, RunJob) else job for job_id, job in jobs.items() if job_id in needed}
    return {job_id: part.get(job_id) or rest[job_id] for job_id in jobs if job_id in part or job_id in rest}
