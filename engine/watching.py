"""What the driver does while jobs are worked at: progress is shown, answers go to the judges, failures are noted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from analysis.manifest import Failure, failures_key, log_key
from engine.judging import is_judged
from engine.measure_jobs import MeasureJob, StudyJob
from engine.prepare import Prepared
from engine.progress import ProgressView, duration
from engine.store import Store
from engine.tasks import AnswersJob, RunJob, VectorJob
from engine.weight_jobs import PileJob
from trainables.failpoints import failpoint

if TYPE_CHECKING:
    from engine.judge_pool import JudgePool

LOG_TAIL_LINES = 15


@dataclass
class SweepWatcher:
    """Passes what happens to the progress view, the judge pool and the list of failures."""

    prepared: Prepared
    store: Store
    view: ProgressView
    pool: JudgePool | None = None
    failures: dict[str, Failure] = field(default_factory=dict)
    begun: dict[str, float] = field(default_factory=dict)
    num_shards: Counter[tuple[str, str]] = field(default_factory=Counter)  # not done, by measurement and model

    def _label(self, job_id: str) -> str:
        return self.prepared.jobs[job_id].label

    def started(self, job_id: str) -> None:
        self.begun.setdefault(job_id, time.monotonic())
        self.view.job_started(job_id, self._label(job_id))

    def figures(self, job_id: str, figures: Mapping[str, Any]) -> None:
        if "sampled" in figures and self.pool is not None:
            self.pool.submit(str(figures["sampled"]))
        self.view.job_figures(job_id, self._label(job_id), figures)
        self.look()

    def done(self, job_id: str) -> None:
        job = self.prepared.jobs[job_id]
        samples = job.samples if isinstance(job, RunJob) else (job.sample,) if isinstance(job, AnswersJob) else ()
        for sample in samples:
            if self.pool is not None and sample.endpoint is None:
                self.pool.submit(sample.id)
            elif self.pool is not None:
                self.pool.answer(sample.id)
        seconds = time.monotonic() - self.begun.get(job_id, time.monotonic())
        left = ""
        if isinstance(job, MeasureJob | StudyJob):
            failpoint("after_job:measure")
            self.num_shards[job.name, job.run] -= 1
            left = self._shards_left(job, seconds)
        self.view.job_ended(job_id, self._label(job_id), f"done in {seconds:.0f} s{left}")
        self.look()

    def _shards_left(self, job: MeasureJob | StudyJob, seconds: float) -> str:
        """How many shards of the same measurement and model are still open, and how long they take at this pace."""
        num_left = self.num_shards[job.name, job.run]
        if num_left == 0:
            return ""
        guess = duration(num_left * seconds / min(self.prepared.num_trials, num_left))
        return f"; {num_left} more shard{'s' if num_left != 1 else ''}, about {guess}"

    def look(self) -> None:
        """Judges that failed are told while others train, not at the end."""
        if self.pool is not None:
            self.pool.poll()

    def failed(self, job_id: str, reason: str) -> None:
        failure = Failure(kind="failed", reason=reason, log_tail=self._log_tail(job_id))
        self._note(self._open_task(job_id), failure)
        self.view.job_ended(job_id, self._label(job_id), f"FAILED: {reason}", ok=False)

    def remark(self, text: str, *, ok: bool = True) -> None:
        self.view.say(text, ok=ok)

    def skipped(self, job_id: str, reason: str) -> None:
        self._note(self._open_task(job_id), Failure(kind="skipped", reason=reason))
        self.view.job_ended(job_id, self._label(job_id), f"skipped: {reason}", ok=False)

    def unjudged(self, job_id: str) -> bool | str:
        job = self.prepared.jobs[job_id]
        assert isinstance(job, VectorJob | PileJob)
        assert self.pool is not None
        self.pool.poll()
        needed = job.judge_ids.values() if isinstance(job, PileJob) else job.judge_ids
        open_ids = [judge_id for judge_id in needed if not is_judged(self.store, judge_id)]
        under_way = set(self.pool.pending.values())
        samples = {self.prepared.judge_tasks[judge_id].sample_id for judge_id in open_ids}
        if under_way & {*open_ids, *samples}:  # answers that a server gives are judged when they are there
            return True
        if not open_ids:
            return False
        reasons = (self.failures[judge_id].reason for judge_id in open_ids if judge_id in self.failures)
        return f"needs judgements that could not be made: {next(reasons, 'nobody has said why')}"

    def wait_for_judgement(self) -> None:
        assert self.pool is not None
        self.pool.wait_for_one()

    def judging_failed(self, task_id: str, reason: str) -> None:
        self._note(task_id, Failure(kind="failed", reason=reason))
        self.view.say(f"{self._judged_label(task_id)}: FAILED: {reason}", ok=False)

    def _judged_label(self, task_id: str) -> str:
        """What a task of the judge pool is about: a run with a metric, or with its answers from a server."""
        for entry in self.prepared.asked:
            if entry.sample_id == task_id:
                return f"{entry.label}, answers"
            for metric, judge_id in entry.judge_ids.items():
                if judge_id == task_id:
                    return f"{entry.label}, judge of {metric}"
        for asked in self.prepared.manifest.asked:
            for metric, judge_id in asked.judge_ids.items():
                if judge_id == task_id:
                    return f"vector {asked.vector}, {asked.about}, judge of {metric}"
        for pile in self.prepared.manifest.piles:
            for metric, judge_id in pile.judge_ids.items():
                if judge_id == task_id:
                    return f"{pile.run}, answers for piles, judge of {metric}"
        return task_id

    def publish_failures(self) -> None:
        """Written at once, not at the end: a kill must not lose the reasons."""
        content = {task_id: failure.model_dump(mode="json") for task_id, failure in self.failures.items()}
        self.store.publish_json(failures_key(self.prepared.sweep.name), content)

    def _note(self, task_id: str, failure: Failure) -> None:
        self.failures[task_id] = failure
        self.publish_failures()

    def _open_task(self, job_id: str) -> str:
        """The task of the job that was at work: the first whose output is missing."""
        tasks = self.prepared.jobs[job_id].tasks()
        return next((task_id for task_id, key in tasks if not self.store.exists(key)), job_id)

    def _log_tail(self, job_id: str) -> tuple[str, ...]:
        return tuple(log_lines(self.store, job_id)[-LOG_TAIL_LINES:])


def log_lines(store: Store, run_id: str) -> list[str]:
    """The lines of a run's log; none if it has not begun."""
    return store.read_log(log_key(run_id)).splitlines()
