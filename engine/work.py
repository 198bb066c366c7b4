"""What happens inside a trial: a job is done with plain functions and its results go to the store."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from analysis.losses import response_losses
from analysis.manifest import adapter_key, run_key, vector_key
from analysis.references import token_projections
from analysis.tables import table_key
from analysis.vectors import Answer, Vector
from engine.judging import judged_answers
from engine.location import MARKER
from engine.measure_jobs import MeasureJob, MergeJob, StudyJob
from engine.measure_work import measure_shard, merge_shards, study_shard
from engine.pack_work import is_trained, train_packed
from engine.run_sink import StoreSink, checkpoint_key, says_it_waits, utc_now
from engine.software import Software, check_same, software
from engine.store import Store
from engine.tasks import AnswersJob, Job, RunJob, SampleTask, TrainTask, VectorJob
from engine.train_work import train_jobs
from engine.weight_jobs import PileJob, ProfileJob
from engine.weight_work import edited_model, make_profile, sum_pile
from trainables.base_model import LoadedBase, ResolvedBase, load_base
from trainables.checkpoint import NO_CHECKPOINTS, CheckpointSettings
from trainables.config import NamesVector, marked
from trainables.deepspeed_driver import ZeroStage
from trainables.defenses import Message
from trainables.errors import StoreError
from trainables.interventions import Interventions, Reference
from trainables.lora import load_adapter
from trainables.memory import release_memory
from trainables.residual_stream import ValueIntervention, residual_stream
from trainables.rows import GenerationRow
from trainables.sample import Question, sample_answers
from trainables.start_from import merged_base
from trainables.train import Packing
from trainables.tune_trainable import Report

_loaded: dict[str, LoadedBase] = {}  # one base per process: trials reuse the process, and loading costs seconds
_merged: dict[tuple[str, ...], LoadedBase] = {}  # at most one: that base with adapters merged, for jobs in a row
_projections: dict[tuple[str, Reference], Mapping[int, torch.Tensor]] = {}  # of its reference activations


def _base(resolved: ResolvedBase, device: torch.device) -> LoadedBase:
    key = resolved.model_dump_json()
    if key not in _loaded:
        _merged.clear()
        _loaded.clear()
        _projections.clear()
        _loaded[key] = load_base(resolved, device)
    return _loaded[key]


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
    packing: Packing = "exact"
    auto_pack: bool = False  # as many runs of a pack as fit
    workers: int = 1  # processes that train a run together
    worker_resources: Mapping[str, float] = field(default_factory=dict)  # what each of them asks of Ray
    software: Software = field(default_factory=software)  # of the driver, where this is made

    def train_pack(self, job_ids: Sequence[str], note: str, report: Report) -> dict[str, float | str | int]:
        """Train several runs in one process, see engine/pack_work.py, or one run in several, see
        engine/train_workers.py. Raises what the work raises."""
        self.check_place()
        if self.workers > 1:
            from engine.train_workers import train_by_workers  # brings Ray Train, which few sweeps need

            (job_id,) = job_ids
            return train_by_workers(self, job_id, report)
        return train_packed(self, job_ids, note, report)

    def check_place(self) -> None:
        """Raises unless this process has the driver's software and sees its store."""
        check_same(self.software, software())
        if not self.store.exists(MARKER):
            raise StoreError(
                f"{socket.gethostname()} does not see the store at {self.store.location}; "
                "give `results` a folder that all machines of the cluster share"
            )

    def run(self, job_id: str, report: Report, note: str = "") -> None:
        """Do the job; what it already has in the store is not done again. Raises what the work raises.

        ``note``: why a run is not trained in the pack that was meant.
        """
        self.check_place()
        job = self.jobs[job_id]

        try:
            with self.store.claimed(job.id, says_it_waits(report)):
                if isinstance(job, VectorJob):
                    self._vector(job, report)
                elif isinstance(job, MergeJob):
                    self._unless_done(job, lambda: merge_shards(self.store, job))
                elif isinstance(job, StudyJob):
                    self._unless_done(job, lambda: study_shard(self.store, job, report))
                elif isinstance(job, MeasureJob):
                    self._unless_done(job, lambda: self._measure(job, report))
                elif isinstance(job, PileJob | ProfileJob):
                    self._unless_done(job, lambda: self._weights(job, report))
                elif isinstance(job, AnswersJob):
                    self._answers(job, report)
                else:
                    self._run_and_log(job, StoreSink(self.store, job.id, report), note)
        finally:
            release_memory()

    def _vector(self, job: VectorJob, report: Report) -> None:
        if not self.store.exists(vector_key(job.id)):
            vector = job.vector.make(_Making(self, job, report))
            self.store.publish(vector_key(job.id), vector.to_bytes())

    def _unless_done(
        self, job: MeasureJob | StudyJob | MergeJob | PileJob | ProfileJob, do: Callable[[], None]
    ) -> None:
        if not all(self.store.exists(key) for key in job.outputs()):
            do()

    def loaded(self, resolved: ResolvedBase, merged: Sequence[str] = ()) -> LoadedBase:
        """The base, with the adapters of these trainings merged into a copy of it."""
        base = _base(resolved, torch.device(self.device))
        key = (resolved.model_dump_json(), *merged)
        if key not in _merged:
            _merged.clear()
            if merged:
                _merged[key] = merged_base(base, [self.adapter(train_id) for train_id in merged])
        return _merged.get(key, base)

    def adapter(self, train_id: str) -> Path:
        key = adapter_key(train_id)
        if not self.store.is_complete(key):
            raise StoreError(
                f"{key} is not in the store, though its training is done; remove {run_key(train_id)} from the store "
                "and run the sweep again to train it anew"
            )
        return self.store.path(key)

    def _measure(self, job: MeasureJob, report: Report) -> None:
        base = self.loaded(job.base, job.merged)
        model = base.model if job.is_base else self._finetuned(base, job.run_id)
        at_work = partial(self._interventions, job.base)
        measure_shard(self.store, job, base, model, self.rows(job.content), at_work, report)

    def _finetuned(self, base: LoadedBase, run_id: str) -> Any:
        """A trained run over ``base``, whose parameters it shares."""
        return load_adapter(base.fresh(), self.store.path(adapter_key(run_id)), run_id)

    def _weights(self, job: PileJob | ProfileJob, report: Report) -> None:
        base = self.loaded(job.base)
        if isinstance(job, PileJob):
            sum_pile(self.store, job, base, lambda run_id: self._finetuned(base, run_id), report)
        else:
            make_profile(self.store, job, base, self._finetuned(base, job.run_id), report)

    def _answers(self, job: AnswersJob, report: Report) -> None:
        if not self.store.exists(table_key("generations", job.sample.id)):
            base = self.loaded(job.base)
            self._sample(base.model, base, job.sample, job.run_id, StoreSink(self.store, job.run_id, report))

    def _run_and_log(self, job: RunJob, sink: StoreSink, note: str) -> None:
        try:
            self._run(job, sink, note)
        except Exception as error:
            sink.log(f"failed: {type(error).__name__}: {error}")
            raise

    def _run(self, job: RunJob, sink: StoreSink, note: str) -> None:
        base = self.loaded(job.base, job.merged)
        if job.edit is not None:
            present = self._present(job)  # what is calibrated reads the base, which an edit moves
            with edited_model(self.store, job.edit, base, lambda run_id: self._finetuned(base, run_id)) as model:
                self._evaluate(job, base, model, sink, present)
            return
        model = base.model
        if job.train is not None:
            if is_trained(self, job.id):
                self.store.remove(checkpoint_key(job.id))  # of an invocation that was killed just before it did so
                model = self._finetuned(base, job.id)
            else:
                model = self._train(job, job.train, base, sink, note)
                release_memory()
        self._evaluate(job, base, model, sink, self._present(job))

    def _present(self, job: RunJob) -> dict[str, list[ValueIntervention]]:
        """The tasks of sampling and plain losses that are not done, and what is at work in each."""
        todo = [("generations", one.id, one.sampling.interventions) for one in job.samples if one.endpoint is None]
        todo += [("losses", one.id, one.interventions) for one in job.losses]
        return {
            task: self._interventions(job.base, items)
            for table, task, items in todo
            if not self.store.exists(table_key(table, task))
        }

    def _evaluate(
        self,
        job: RunJob,
        base: LoadedBase,
        model: Any,
        sink: StoreSink,
        present: Mapping[str, Sequence[ValueIntervention]],
    ) -> None:
        """Sample from the model, and measure its loss on plain answers, where that is not done; ``present``: see
        ``_present``."""
        for sample in job.samples:
            if sample.endpoint is not None:
                continue
            if sample.id in present:
                self._sample(model, base, sample, job.id, sink, present[sample.id])
            sink.report(last=True, sampled=sample.id)
        for loss in job.losses:
            if loss.id in present:
                started = time.perf_counter()
                with residual_stream(model, present[loss.id]):
                    losses = list(
                        response_losses(
                            base, model, self.rows(loss.content), measure_id=loss.id, max_length=loss.max_length
                        )
                    )
                self.store.publish_table("losses", loss.id, losses)
                sink.log(f"plain loss of {len(losses)} answers, {time.perf_counter() - started:.1f} s")

    def _interventions(self, resolved: ResolvedBase, items: Interventions) -> list[ValueIntervention]:
        """The items at work; what is calibrated is calibrated on the untrained base, once in a process."""

        def projections(reference: Reference) -> Mapping[int, torch.Tensor]:
            key = (resolved.model_dump_json(), reference)
            if key not in _projections:
                rows, vector = self.rows(reference.content), self._vector_values(reference.vector)
                base = _base(resolved, torch.device(self.device))  # without any adapter merged into it
                _projections[key] = token_projections(base, rows, vector, reference.layers, reference.max_length)
            return _projections[key]

        vectors = {
            str(name): self._vector_values(str(name)) for item in items for name in marked(item, NamesVector).values()
        }
        return [change for item in items for change in item.at_work(vectors, projections)]

    def _vector_values(self, vector_id: str) -> torch.Tensor:
        return Vector.read(self.store.path(vector_key(vector_id))).values

    def _sample(
        self,
        model: Any,
        base: LoadedBase,
        sample: SampleTask,
        noise_key: str,
        sink: StoreSink,
        interventions: Sequence[ValueIntervention] = (),
    ) -> None:
        started = time.perf_counter()
        questions = [Question(question.id, question.text) for question in sample.questions]
        rows: list[GenerationRow] = []
        total = len(questions) * sample.sampling.samples
        for batch in sample_answers(
            model,
            base.tokenizer,
            questions,
            sample.sampling,
            sample_id=sample.id,
            noise_key=noise_key,
            interventions=interventions,
        ):
            rows += batch
            sink.progress(phase="sample", done=len(rows), total=total)
            release_memory()
        self.store.publish_table("generations", sample.id, rows)
        sink.log(f"sampled {len(rows)} answers, {time.perf_counter() - started:.1f} s")

    def _train(self, job: RunJob, task: TrainTask, base: LoadedBase, sink: StoreSink, note: str) -> Any:
        model, _ = train_jobs(self, base, [(job, task)], {task.id: sink}, note=note)
        return model

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
        return self.work.loaded(self.job.base)

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
        self.work.store.append_line(f"vectors/{self.job.id}.log", f"{utc_now()} {message}")
