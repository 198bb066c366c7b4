"""A pack inside a trial: the trainings of several jobs. What follows a training is the business of each job itself."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from analysis.manifest import adapter_key, run_key
from engine.run_sink import StoreSink, says_it_waits
from engine.tasks import RunJob, TrainTask
from engine.train_work import run_spec, train_jobs
from trainables.base_model import LoadedBase
from trainables.errors import ShiftgradError
from trainables.memory import is_out_of_memory, release_memory
from trainables.pack_memory import Measured, estimated, num_fitting
from trainables.tune_trainable import Report

if TYPE_CHECKING:
    from engine.work import SweepWork

# what a trial says of its pack in the figures of its last report; of its members: pack_trained, pack_failed
FITS, OUT_OF_MEMORY, TRIED = "pack_fits", "pack_out_of_memory", "pack_tried"


def is_trained(work: SweepWork, run_id: str) -> bool:
    return work.store.exists(run_key(run_id)) and work.store.is_complete(adapter_key(run_id))


def train_packed(work: SweepWork, job_ids: Sequence[str], note: str, report: Report) -> dict[str, float | str | int]:
    """Train those of the jobs that are not trained; reports each that is, and each that cannot go on.

    Where the size of packs is left to the machine, only as many as fit are trained: how many that is, and how many
    would have fitted by what this pack took, is in the figures that are returned. A lack of memory is one of these
    figures too, as the same pack would not fit again. Anything else that goes wrong is raised.
    """
    jobs = {job_id: work.jobs[job_id] for job_id in job_ids}

    try:
        with contextlib.ExitStack() as claims:
            for job_id in sorted(jobs):  # in one order: two sweeps that share runs cannot wait for each other
                claims.enter_context(work.store.claimed(job_id, says_it_waits(report)))
            todo: list[tuple[RunJob, TrainTask]] = []
            for job_id, job in jobs.items():
                assert isinstance(job, RunJob)
                assert job.train is not None
                if is_trained(work, job_id):
                    report(last=True, job=job_id, pack_trained=1)
                else:
                    todo.append((job, job.train))
            return _train(work, todo, note, report) if todo else {}
    finally:
        release_memory()


def _train(
    work: SweepWork, todo: list[tuple[RunJob, TrainTask]], note: str, report: Report
) -> dict[str, float | str | int]:
    base = work.loaded(todo[0][1].base, todo[0][1].start.merged)
    measured = Measured(base.device)
    figures: dict[str, float | str | int] = {}
    if work.auto_pack:
        fits = _fitting(work, base, [task for _, task in todo], measured)
        if fits < len(todo):
            todo = todo[:fits]
            figures[FITS] = fits

    def done(run_id: str) -> None:
        report(last=True, job=run_id, pack_trained=1)

    def failed(run_id: str, error: ShiftgradError) -> None:
        report(last=True, job=run_id, pack_failed=f"{type(error).__name__}: {error}")

    sinks = {task.id: StoreSink(work.store, task.id, functools.partial(report, job=task.id)) for _, task in todo}
    try:
        train_jobs(work, base, todo, sinks, note=note, on_done=done, on_failure=failed)
    except Exception as error:
        for sink in sinks.values():
            if not is_trained(work, sink.run_id):
                sink.log(f"the pack failed: {type(error).__name__}: {error}")
        if not is_out_of_memory(error):
            raise
        return {OUT_OF_MEMORY: " ".join(f"out of memory: {error}".split()), TRIED: len(todo)}
    if work.auto_pack and (by_measure := measured.num_fitting(len(todo))) is not None:
        figures[FITS] = by_measure
    return figures


def _fitting(work: SweepWork, base: LoadedBase, tasks: Sequence[TrainTask], measured: Measured) -> int:
    """How many of the trainings fit by estimate, the first ones."""
    memory = [
        estimated(base.model, run_spec(work, task), gradient_checkpointing=work.gradient_checkpointing)
        for task in tasks
    ]
    shared = work.packing == "fast" and not any(item.is_second_order for item in tasks[0].defense)
    return num_fitting(memory, measured.free_before, shared_passes=shared)


def told(result: Mapping[str, object]) -> tuple[str, str | None] | None:
    """What a report says of a member: the job and why it cannot go on (None: it is trained); None: nothing."""
    if "pack_failed" in result:
        return str(result["job"]), str(result["pack_failed"])
    return (str(result["job"]), None) if "pack_trained" in result else None
