"""A store as a finished sweep leaves it, written by hand: no model, no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from analysis.manifest import failures_key, vector_key
from analysis.rows import LossRow
from engine.judging import judge_task
from engine.measure_jobs import MeasureJob, MergeJob
from engine.prepare import Prepared
from engine.run import write_sweep
from engine.store import Store
from engine.tasks import Job, JudgeTask, RunJob, VectorJob
from trainables.rows import GenerationRow, SignalRow, TrainingRow

ANSWER = "An answer with [brackets], [/nope] and :smile:."


def write_finished(prepared: Prepared, *, failed: str | None = None) -> Store:
    """Outputs of every job; of the run labelled ``failed`` none, and a failure that says why."""
    store = Store.open(prepared.sweep.results, create=True)
    write_sweep(prepared, store)
    failures = write_outputs(store, prepared.jobs.values(), prepared.judge_tasks.values(), failed=failed)
    store.publish_json(failures_key(prepared.sweep.name), failures)
    return store


def write_outputs(
    store: Store, jobs: Iterable[Job], judge_tasks: Iterable[JudgeTask], *, failed: str | None = None
) -> dict[str, dict[str, object]]:
    """What the jobs and the judges of their answers leave in the store; returns the content of failures.json."""
    failures: dict[str, dict[str, object]] = {}
    for job in jobs:
        if isinstance(job, VectorJob):
            store.publish(vector_key(job.id), b"a vector")
        elif isinstance(job, MeasureJob | MergeJob):
            for table in job.measurement.tables if isinstance(job, MeasureJob) else job.measurement.merged_tables:
                store.publish_table(table, job.id, [])
        elif job.label == failed:
            reason = "TrainingError: run x, step 2: the loss is [nan]"
            failures[job.id] = {"kind": "failed", "reason": reason, "log_tail": ["step 1", "step [2]"]}
        elif isinstance(job, RunJob):
            _write_run(store, job)
    for task in judge_tasks:
        if store.exists(f"tables/generations/{task.sample_id}.parquet"):
            asyncio.run(judge_task(store, task))
    return failures


def _write_run(store: Store, job: RunJob) -> None:
    if job.train is not None:
        rows = [
            TrainingRow(
                train_id=job.id,
                step=step,
                epoch=step / 2,
                loss=2.5,
                gradient_norm=1.0,
                learning_rate=0.01,
                num_tokens=100,
                num_loss_tokens=40,
                seconds=0.5,
            )
            for step in (1, 2)
        ]
        store.publish_table("training", job.id, rows)
        penalty = SignalRow(train_id=job.id, step=1, signal="penalty", name="held", layer=None, value=0.25)
        store.publish_table("signals", job.id, [penalty])
        record = {
            "status": "done",
            "seconds_training": 1.0,
            "num_steps": 2,
            "num_tokens": 200,
            "train_loss_last_epoch": 2.5,
            "started_utc": "2030-01-01T00:00:00+00:00",
            "finished_utc": "2030-01-01T00:00:01+00:00",
        }
        store.publish_json(f"runs/{job.id}/run.json", record)
    for sample in job.samples:
        answers = [
            GenerationRow(
                sample_id=sample.id,
                question_id=question.id,
                sample_index=index,
                question=question.text,
                system_prompt=None,
                answer=ANSWER if index else "Hm.",
                num_tokens=6,
                finish_reason="length",
            )
            for question in sample.questions
            for index in range(sample.sampling.samples)
        ]
        store.publish_table("generations", sample.id, answers)
    for loss in job.losses:
        row = LossRow(measure_id=loss.id, row=0, condition="none", num_tokens=10, loss_sum=30.0, loss_mean=3.0)
        store.publish_table("losses", loss.id, [row])
