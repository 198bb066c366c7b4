"""A training by several workers: a job of Ray Train that a trial starts and waits for.

Each worker calls what a trial with one worker calls, on its share of every step (trainables/workers.py). The first one
writes to the store; a checkpoint there is what all of them resume from, so Ray Train keeps none of its own, and a
worker that dies is Tune's business: the trial fails, and goes on from the checkpoint when it is started again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
import torch
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.util.queue import Empty, Queue

from engine.pack_work import is_trained
from engine.run_sink import StoreSink, says_it_waits
from engine.tasks import RunJob
from engine.train_work import keep_rows_of_failed, train_jobs, train_tasks
from trainables.errors import ShiftgradError
from trainables.memory import is_out_of_memory
from trainables.rows import SignalRow, TrainingRow
from trainables.tune_trainable import Report

if TYPE_CHECKING:
    from engine.work import SweepWork

_POLL_S = 0.5


class WorkersDiedError(RuntimeError):
    """Workers ended without an error of ours: worth another attempt."""


class _Follower(StoreSink):
    """The sink of all workers but the first: what it would write is what the first one writes."""

    def log(self, message: str) -> None:
        """The first worker has the same line."""

    def progress(self, *, phase: str, done: int, total: int, **figures: float) -> None:
        """The first worker says how far all of them are."""

    def training(self, row: TrainingRow) -> None:
        """The first worker has the same row, but for its seconds."""

    def signal(self, row: SignalRow) -> None:
        """The first worker has the same row."""

    def adapter(self, train_id: str, folder: Path) -> None:
        """The first worker has the same adapter."""

    def checkpoint(self, train_id: str, folder: Path) -> None:
        """The first worker has the same state: what is divided among workers is put together for a checkpoint."""


def train_by_workers(work: SweepWork, job_id: str, report: Report) -> dict[str, float | str | int]:
    """Train the run of a job by ``work.workers`` processes, unless it is trained; reports as training a pack does.

    Raises the error of ours that a worker has raised, or WorkersDiedError.
    """

    with work.store.claimed(job_id, says_it_waits(report)):
        if not is_trained(work, job_id):
            _fit(work, job_id, report)
    report(last=True, job=job_id, pack_trained=1)
    return {}


def _fit(work: SweepWork, job_id: str, report: Report) -> None:
    """Start the workers, pass on what the first one reports, and wait for all of them."""
    queue = Queue(actor_options={"num_cpus": 0})
    sink = StoreSink(work.store, job_id, report)
    with tempfile.TemporaryDirectory(prefix="shiftgrad-train-") as throw_away, ThreadPoolExecutor(1) as pool:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"work": work, "job": job_id, "queue": queue},
            torch_config=TorchConfig(backend="nccl" if work.device == "cuda" else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=work.workers,
                use_gpu=work.device == "cuda",
                resources_per_worker=dict(work.worker_resources),
            ),
            run_config=ray.train.RunConfig(name=job_id, storage_path=throw_away),
        )
        fitted = pool.submit(trainer.fit)  # beside the reports, which belong to this thread
        try:
            while not fitted.done() or not queue.empty():
                sink.training_rows += _pass_on(queue, report)
            fitted.result()
        except TrainingFailedError as error:
            cause = _cause(error)
            if not is_trained(work, job_id):  # the first worker may have been ended before it could do this
                keep_rows_of_failed(work, sink, cause)
                sink.log(f"failed: {_line(cause)}")
            raise cause from error
        finally:
            queue.shutdown(force=True)


def _pass_on(queue: Queue, report: Report) -> list[TrainingRow]:
    """Report what the first worker says next, if it says something; the rows that came with it."""
    try:
        last, rows, figures = queue.get(timeout=_POLL_S)
    except Empty:
        return []
    report(last=last, rows=rows, **figures)
    return list(rows)


def _cause(error: TrainingFailedError) -> Exception:
    """What a trial should say: an error of ours before those of workers that lost the one which raised it."""
    if not isinstance(error, WorkerGroupError):
        return WorkersDiedError(_line(error))
    causes = [getattr(failure, "cause", failure) for failure in error.worker_failures.values()]
    for is_it in (lambda cause: isinstance(cause, ShiftgradError), is_out_of_memory):
        for cause in causes:
            if is_it(cause):
                return cause
    ranks = ", ".join(f"worker {rank}: {_line(failure)}" for rank, failure in sorted(error.worker_failures.items()))
    return WorkersDiedError(ranks or _line(error))


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _worker(config: Mapping[str, Any]) -> None:
    """One worker, with the process group that Ray Train has made."""
    from ray.train.torch import get_device

    work, job, queue = config["work"], config["work"].jobs[config["job"]], config["queue"]
    assert isinstance(job, RunJob)
    assert job.train is not None
    work.check_place()
    torch.set_num_threads(work.threads)
    if work.device == "cuda":
        torch.cuda.set_device(get_device())  # a node's workers see all of its GPUs
    base = work.loaded(job.train.base, job.train.start.merged)
    if ray.train.get_context().get_world_rank() > 0:
        train_tasks(work, base, [job.train], {job.id: _Follower(work.store, job.id, lambda **_: None)})
        return

    def report(*, last: bool = False, rows: Sequence[TrainingRow] = (), **figures: float | str | int) -> None:
        queue.put((last, list(rows), {"job": job.id, **figures}))

    train_jobs(work, base, [(job, job.train)], {job.id: StoreSink(work.store, job.id, report)})
