"""What happens inside a trial: a job is done with plain functions and its results go to the store."""

from __future__ import annotations

import datetime
import json
import resource
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from analysis.losses import response_losses
from analysis.manifest import adapter_key, log_key, run_key, vector_key
from analysis.tables import table_key
from analysis.vectors import Answer, Vector
from engine.judging import judged_answers
from engine.location import MARKER
from engine.measure_work import measure_shard, merge_shards
from engine.software import Software, check_same, software
from engine.store import Store
from engine.tasks import AnswersJob, Job, MeasureJob, MergeJob, RunJob, SampleTask, TrainTask, VectorJob
from engine.versions import versions
from trainables.base_model import LoadedBase, ResolvedBase, load_base
from trainables.checkpoint import NO_CHECKPOINTS, CheckpointSettings
from trainables.deepspeed_driver import ZeroStage
from trainables.defenses import Message
from trainables.errors import StoreError
from trainables.lora import ADAPTER_WEIGHTS, load_adapter
from trainables.memory import release_memory
from trainables.rows import GenerationRow, SignalRow, TrainingRow
from trainables.sample import Question, sample_answers
from trainables.start_from import merged_base
from trainables.train import RunResult, RunSpec, train_pack
from trainables.tune_trainable import Report

_loaded: dict[str, LoadedBase] = {}  # one base per process: trials reuse the process, and loading costs seconds
_merged: dict[tuple[str, ...], LoadedBase] = {}  # at most one: that base with adapters merged, for jobs in a row


def _base(resolved: ResolvedBase, device: torch.device) -> LoadedBase:
    key = resolved.model_dump_json()
    if key not in _loaded:
        _merged.clear()
        _loaded.clear()
        _loaded[key] = load_base(resolved, device)
    return _loaded[key]


def _base_name(task: TrainTask) -> str:
    """What the adapter belongs on, as its files say it: nobody must take it for an adapter of the base alone."""
    merged = task.start.merged
    return f"{task.base.model} with the adapters of {', '.join(merged)} merged" if merged else task.base.model


def _utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def checkpoint_key(train_id: str) -> str:
    """Where a training that is not done keeps its last checkpoint."""
    return f"runs/{train_id}/checkpoint"


@dataclass
class StoreSink:
    """The RunSink of a trial: log lines at once, rows together when a phase is done."""

    store: Store
    run_id: str
    report: Report
    training_rows: list[TrainingRow] = field(default_factory=list)
    unreported_rows: list[TrainingRow] = field(default_factory=list)
    signal_rows: list[SignalRow] = field(default_factory=list)

    def log(self, message: str) -> None:
        self.store.append_line(log_key(self.run_id), f"{_utc_now()} {message}")

    def progress(self, *, phase: str, done: int, total: int, **figures: float) -> None:
        rows, self.unreported_rows = self.unreported_rows, []
        self.report(last=done == total, rows=rows, phase=phase, units_done=done, units_total=total, **figures)

    def training(self, row: TrainingRow) -> None:
        self.training_rows.append(row)
        self.unreported_rows.append(row)

    def signal(self, row: SignalRow) -> None:
        self.signal_rows.append(row)

    def adapter(self, train_id: str, folder: Path) -> None:
        self.store.publish(adapter_key(train_id), folder)
        shutil.rmtree(folder)

    def checkpoint(self, train_id: str, folder: Path) -> None:
        self.store.publish(checkpoint_key(train_id), folder)
        shutil.rmtree(folder)

    def load_checkpoint(self, train_id: str) -> Path | None:
        key = checkpoint_key(train_id)
        return self.store.path(key) if self.store.is_complete(key) else None


@dataclass(frozen=True)
class SweepWork:
    """Does any job of a sweep. Plain data: it is sent to every trial."""

    store: Store
    jobs: Mapping[str, Job]
    device: str
    threads: int
    zero_stage: ZeroStage
    gradient_checkpointing: bool
    checkpoints: CheckpointSettings = NO_CHECKPOINTS
    software: Software = field(default_factory=software)  # of the driver, where this is made

    def run(self, job_id: str, report: Report) -> None:
        """Do the job; what it already has in the store is not done again. Raises what the work raises."""
        check_same(self.software, software())
        job = self.jobs[job_id]
        if not self.store.exists(MARKER):
            raise StoreError(
                f"{socket.gethostname()} does not see the store at {self.store.root}; "
                "give `results` a folder that all machines of the cluster share"
            )

        def waiting() -> None:
            report(phase="waits for another sweep that does this", units_done=0, units_total=1)

        try:
            with self.store.claimed(job.id, waiting):
                if isinstance(job, VectorJob):
                    self._vector(job, report)
                elif isinstance(job, MergeJob):
                    self._unless_done(job, lambda: merge_shards(self.store, job))
                elif isinstance(job, MeasureJob):
                    self._unless_done(job, lambda: self._measure(job, report))
                elif isinstance(job, AnswersJob):
                    self._answers(job, report)
                else:
                    self._run_and_log(job, StoreSink(self.store, job.id, report))
        finally:
            release_memory()

    def _vector(self, job: VectorJob, report: Report) -> None:
        if not self.store.exists(vector_key(job.id)):
            vector = job.vector.make(_Making(self, job, report))
            self.store.publish(vector_key(job.id), vector.to_bytes())

    def _unless_done(self, job: MeasureJob | MergeJob, do: Callable[[], None]) -> None:
        if not all(self.store.exists(key) for key in job.outputs()):
            do()

    def _base(self, resolved: ResolvedBase, merged: Sequence[str] = ()) -> LoadedBase:
        """The base, with the adapters of these trainings merged into a copy of it."""
        base = _base(resolved, torch.device(self.device))
        key = (resolved.model_dump_json(), *merged)
        if key not in _merged:
            _merged.clear()
            if merged:
                _merged[key] = merged_base(base, [self._adapter(train_id) for train_id in merged])
        return _merged.get(key, base)

    def _adapter(self, train_id: str) -> Path:
        key = adapter_key(train_id)
        if not self.store.is_complete(key):
            raise StoreError(
                f"{key} is not in the store, though its training is done; remove {run_key(train_id)} from the store "
                "and run the sweep again to train it anew"
            )
        return self.store.path(key)

    def _measure(self, job: MeasureJob, report: Report) -> None:
        base = self._base(job.base, job.merged)
        model = base.model
        if not job.is_base:
            model = load_adapter(base.fresh(), self.store.path(adapter_key(job.run_id)), job.run_id)
        measure_shard(self.store, job, base, model, self.rows(job.content), report)

    def _answers(self, job: AnswersJob, report: Report) -> None:
        if not self.store.exists(table_key("generations", job.sample.id)):
            base = self._base(job.base)
            self._sample(base.model, base, job.sample, job.run_id, StoreSink(self.store, job.run_id, report))

    def _run_and_log(self, job: RunJob, sink: StoreSink) -> None:
        try:
            self._run(job, sink)
        except Exception as error:
            sink.log(f"failed: {type(error).__name__}: {error}")
            raise

    def _run(self, job: RunJob, sink: StoreSink) -> None:
        base = self._base(job.base, job.merged)
        model = base.model
        if job.train is not None:
            adapter = adapter_key(job.id)
            if self.store.exists(run_key(job.id)) and self.store.is_complete(adapter):
                self.store.remove(checkpoint_key(job.id))  # of an invocation that was killed just before it did so
                model = load_adapter(base.fresh(), self.store.path(adapter), job.id)
            else:
                model = self._train(job, job.train, base, sink)
                release_memory()
        for sample in job.samples:
            if sample.endpoint is not None:
                continue
            if not self.store.exists(table_key("generations", sample.id)):
                self._sample(model, base, sample, job.id, sink)
            sink.report(last=True, sampled=sample.id)
        for loss in job.losses:
            if not self.store.exists(table_key("losses", loss.id)):
                started = time.perf_counter()
                losses = list(
                    response_losses(
                        base, model, self.rows(loss.content), measure_id=loss.id, max_length=loss.max_length
                    )
                )
                self.store.publish_table("losses", loss.id, losses)
                sink.log(f"plain loss of {len(losses)} answers, {time.perf_counter() - started:.1f} s")

    def _sample(self, model: Any, base: LoadedBase, sample: SampleTask, noise_key: str, sink: StoreSink) -> None:
        started = time.perf_counter()
        questions = [Question(question.id, question.text) for question in sample.questions]
        rows: list[GenerationRow] = []
        total = len(questions) * sample.sampling.samples
        for batch in sample_answers(
            model, base.tokenizer, questions, sample.sampling, sample_id=sample.id, noise_key=noise_key
        ):
            rows += batch
            sink.progress(phase="sample", done=len(rows), total=total)
            release_memory()
        self.store.publish_table("generations", sample.id, rows)
        sink.log(f"sampled {len(rows)} answers, {time.perf_counter() - started:.1f} s")

    def _train(self, job: RunJob, task: TrainTask, base: LoadedBase, sink: StoreSink) -> Any:
        started = _utc_now()
        sink.log(f"training starts: {job.label}")
        start = task.start
        if start.ids:
            how = "and goes on with it" if start.continued is not None else "merged, with a new adapter"
            sink.log(f"it starts from the adapter of {start.ids[-1]}, {how}")
        vectors = {name: Vector.read(self.store.path(vector_key(name))).values for name in task.vector_ids()}
        spec = RunSpec(
            train_id=task.id,
            rows=self.rows(task.train_content),
            data=task.data,
            defense=task.defense,
            vectors=vectors,
            training=task.training,
            seed=task.seed,
            base_name=_base_name(task),
            adapter=None if start.continued is None else load_file(self._adapter(start.continued) / ADAPTER_WEIGHTS),
        )
        try:
            model, (result,) = train_pack(
                base,
                [spec],
                {task.id: sink},
                zero_stage=self.zero_stage,
                gradient_checkpointing=self.gradient_checkpointing,
                checkpoints=self.checkpoints,
            )
        except Exception as error:
            self._keep_rows_of_failed(sink, error)
            raise
        self.store.publish_table("training", task.id, sink.training_rows)
        if sink.signal_rows:
            self.store.publish_table("signals", task.id, sink.signal_rows)
        self.store.publish_json(run_key(task.id), self._record(task, result, started))
        self.store.remove(checkpoint_key(task.id))
        sink.log(f"training done: {result.num_steps} steps, {result.seconds_training:.1f} s")
        return model

    def _keep_rows_of_failed(self, sink: StoreSink, error: Exception) -> None:
        """Publish the steps that a training did before it failed; run.json, which says that it is done, stays away.

        A later attempt gives these steps again and replaces the table whole.
        """
        if sink.training_rows:
            try:
                self.store.publish_table("training", sink.run_id, sink.training_rows)
            except (StoreError, MemoryError) as second:  # the first one is what went wrong
                error.add_note(f"its steps could not be kept: {second}")

    def _record(self, task: TrainTask, result: RunResult, started: str) -> dict[str, Any]:
        """What run.json says: what was trained, how it went, and what may change the last bits."""
        return {
            "status": "done",
            "train_id": task.id,
            "task": task.model_dump(mode="json", exclude={"base": {"source"}}),
            "started_utc": started,
            "finished_utc": _utc_now(),
            "seconds_training": result.seconds_training,
            "num_steps": result.num_steps,
            "stopped_early": result.stopped_early,
            "num_tokens": result.num_tokens,
            "num_loss_tokens": result.num_loss_tokens,
            "num_rows": result.num_rows,
            "train_loss_last_epoch": result.train_loss_last_epoch,
            "chat_format": dict(result.chat_format),
            # of this process so far: it may have done other jobs before
            "peak_process_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
            "placement": {
                "device": self.device,
                "threads": self.threads,
                "zero_stage": self.zero_stage,
                "gradient_checkpointing": self.gradient_checkpointing,
                "pack": [task.id],
            },
            "versions": versions(),
        }

    def rows(self, content: str) -> list[list[Message]]:
        """The chat rows with this hash."""
        lines = self.store.read_input(content).split(b"\n")  # not splitlines: JSON may hold other line ends
        return [json.loads(line)["messages"] for line in lines if line]


@dataclass(frozen=True)
class _Making:
    """What a vector is made of, out of the store (``analysis.vectors.Making``)."""

    work: SweepWork
    job: VectorJob
    report: Report

    @property
    def name(self) -> str:
        return self.job.name

    @property
    def base(self) -> LoadedBase:
        return self.work._base(self.job.base)

    def rows(self, content: str) -> list[list[Message]]:
        return self.work.rows(content)

    def file(self, content: str) -> Path:
        self.work.store.read_input(content)  # says so if it is damaged
        return self.work.store.path(f"inputs/{content}")

    def vector(self, task_id: str) -> Vector:
        return Vector.read(self.work.store.path(vector_key(task_id)))

    def answers(self, index: int) -> list[Answer]:
        return judged_answers(self.work.store, self.job.asked[index], self.job.vector.asked()[index])

    def vector_of(self, values: torch.Tensor) -> Vector:
        return Vector(values, "pre_norm", self.job.base.model, self.job.base.revision)

    def progress(self, done: int, total: int) -> None:
        self.report(phase="vector", units_done=done, units_total=total)

    def log(self, message: str) -> None:
        self.work.store.append_line(f"vectors/{self.job.id}.log", f"{_utc_now()} {message}")
