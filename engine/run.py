"""Running a sweep: from a sweep file to tables. Running it again IS resuming it."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.text import Text

from analysis.manifest import Failure, failures_key, log_key, manifest_key, sweep_key
from analysis.remote import Location
from analysis.results import Results, load
from analysis.tables import table_key
from engine.judging import is_judged, missing_keys
from engine.lease import Lease
from engine.machine import read_cluster, read_machine
from engine.packs import trained_runs
from engine.prepare import Prepared, prepare
from engine.progress import ProgressView, duration, make_progress
from engine.proved import proved_key
from engine.ray_session import RaySession
from engine.stopping import Stoppable
from engine.store import Store
from engine.tasks import AnswersJob, AnswerTask, Job, JudgeTask, MeasureJob, RunJob, StudyJob, VectorJob
from engine.trackers.feed import Feed
from engine.versions import versions
from engine.weight_jobs import PileJob
from trainables.errors import ConfigError
from trainables.failpoints import failpoint

if TYPE_CHECKING:
    from engine.judge_pool import JudgePool

LOG_TAIL_LINES = 15
TRACKER_PATIENCE_S = 10.0  # that a tracker has to come to an end in once the sweep is being stopped


@dataclass(frozen=True)
class Outcome:
    """How an invocation ended. ``failures`` maps task ids to what went wrong; empty means all that was asked for is
    done. Jobs are those that were asked for; runs are counted of the whole sweep and of what was asked for."""

    results: Results
    failures: Mapping[str, Failure]
    num_done_before: int
    num_jobs: int
    num_runs: int
    num_asked: int


@dataclass
class _Watcher:
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
        self._poll()

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
        self._poll()

    def _shards_left(self, job: MeasureJob | StudyJob, seconds: float) -> str:
        """How many shards of the same measurement and model are still open, and how long they take at this pace."""
        num_left = self.num_shards[job.name, job.run]
        if num_left == 0:
            return ""
        guess = duration(num_left * seconds / min(self.prepared.num_trials, num_left))
        return f"; {num_left} more shard{'s' if num_left != 1 else ''}, about {guess}"

    def _poll(self) -> None:
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

    def wait_for_judgement(self, timeout_s: float | None) -> None:
        assert self.pool is not None
        self.pool.wait_for_one(timeout_s)

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


def run_sweep(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    console: Console | None = None,
    address: str | None = None,
    only: str | None = None,
    smoke: bool = False,
    measure_only: bool = False,
    table: str | None = None,
) -> Outcome:
    """Do everything that the sweep file means and is not done yet, and return its results.

    ``address``: a running Ray cluster; None starts Ray on this machine and stops it again. ``only``: do just what the
    runs need that this expression selects (engine/only.py). ``smoke``: every cell cut short, in a store beside the real
    one (engine/smoke.py). Raises ConfigError before
    anything starts if the file cannot be meant, LeaseHeldError if another driver runs this sweep. A failed run never
    stops the others: it is in ``Outcome.failures``. SIGTERM and SIGHUP stop it as cleanly as Ctrl-C does (they raise
    Stopped, which is a KeyboardInterrupt).
    """
    console = console or Console()
    with Stoppable() as driver, RaySession(address) as session:
        nodes = session.nodes()
        machine = read_cluster(nodes) if nodes else read_machine()
        prepared = prepare(path, overrides, machine, only=only, smoke=smoke, measure_only=measure_only, table=table)
        store = Store.open(prepared.sweep.results, create=True)

        def lost(reason: str) -> None:
            console.print(f"The lease on this sweep is lost ({reason}); stopping.", style="red", markup=False)
            driver.stop()

        with Lease(store, prepared.sweep.name, lost):
            try:
                return _run_sweep(prepared, store, console, session)
            finally:
                session.close()  # while the lease is held: no trial of ours may write beside the next driver's


def _run_sweep(prepared: Prepared, store: Store, console: Console, session: RaySession) -> Outcome:
    rows_before = _manifest(prepared.sweep.name, store)
    unjudged = pending_judge_tasks(prepared, store)
    if faults := missing_keys(
        unjudged.values(), pending_answers(prepared, store), prepared.sweep.endpoints, os.environ
    ):
        raise ConfigError(faults)
    write_sweep(prepared, store)
    jobs = pending_jobs(prepared, store)
    view = make_progress(console)
    num_shards = Counter((job.name, job.run) for job in jobs.values() if isinstance(job, MeasureJob | StudyJob))
    watcher = _Watcher(prepared, store, view, num_shards=num_shards)
    watcher.publish_failures()  # those of an earlier invocation are history
    feed = _feed(prepared, store, console)
    try:
        if jobs or unjudged or pending_answers(prepared, store):
            session.start(prepared.sweep.execution.cpus_per_trial)
            _work(prepared, store, jobs, unjudged, watcher, feed)
        feed.settle()
    finally:
        feed.close(TRACKER_PATIENCE_S)
    results = load(store.sweep(prepared.sweep.name))
    same_rows = rows_before == _manifest(results.name, store)
    if jobs or unjudged or not same_rows or not store.exists(report_key(results.name)):
        publish_report(results, store)
    return Outcome(
        results=results,
        failures=watcher.failures,
        num_done_before=len(prepared.jobs) - len(jobs),
        num_jobs=len(prepared.jobs),
        num_runs=prepared.num_runs,
        num_asked=prepared.num_asked,
    )


def _feed(prepared: Prepared, store: Store, console: Console) -> Feed:
    """The trackers of this invocation. What ``--smoke`` does appears apart from the sweep."""
    name = prepared.sweep.name

    def say(message: str) -> None:
        console.print(Text(message, style="yellow"), soft_wrap=True)

    return Feed(prepared.sweep.trackers, prepared.manifest, store, f"{name}-smoke" if prepared.smoke else name, say)


def _manifest(sweep: str, store: Store) -> bytes | None:
    return store.read(manifest_key(sweep)) if store.exists(manifest_key(sweep)) else None


def log_lines(store: Store, run_id: str) -> list[str]:
    """The lines of a run's log; none if it has not begun."""
    return store.read_log(log_key(run_id)).splitlines()


def report_key(sweep: str) -> str:
    """Key of a sweep's report folder."""
    return sweep_key(sweep, "report")


def publish_report(results: Results, store: Store) -> Location:
    """Make the report of a sweep anew from its tables; returns where its page is."""
    from analysis.report import write_report  # brings matplotlib, which a sweep with nothing to do need not wait for

    with tempfile.TemporaryDirectory() as scratch:
        write_report(results, Path(scratch) / "report")
        store.publish(report_key(results.name), Path(scratch) / "report")
    return store.place(report_key(results.name)) / "index.html"


def pending_jobs(prepared: Prepared, store: Store) -> dict[str, Job]:
    """Jobs with an output that is not in the store, in order."""
    return {job_id: job for job_id, job in prepared.jobs.items() if not all(store.exists(key) for key in job.outputs())}


def pending_judge_tasks(prepared: Prepared, store: Store) -> dict[str, JudgeTask]:
    """Judging tasks whose scores are not in the store."""
    return {task.id: task for task in prepared.judge_tasks.values() if not is_judged(store, task.id)}


def pending_answers(prepared: Prepared, store: Store | None) -> list[AnswerTask]:
    """Answers that a server has to give."""
    return [task for task in prepared.answers if store is None or not store.exists(table_key("generations", task.id))]


def write_sweep(prepared: Prepared, store: Store) -> None:
    """Put inputs, the resolved sweep file, the manifest and the provenance of this invocation into the store."""
    name = prepared.sweep.name
    for content in prepared.inputs.values():
        store.put_input(content)
    text = yaml.safe_dump(prepared.sweep.raw, sort_keys=False, allow_unicode=True)
    store.keep(sweep_key(name, "sweep.yaml"), text.encode())
    store.publish_json(sweep_key(name, "provenance.json"), provenance(prepared))
    store.publish_json(proved_key(name), prepared.proved, unless_same=True)
    store.publish_json(manifest_key(name), prepared.manifest.model_dump(mode="json"), unless_same=True)


def provenance(prepared: Prepared) -> dict[str, Any]:
    """Where the numbers of this invocation come from."""
    options = [*(["--only", prepared.only] if prepared.only is not None else []), *(["--smoke"] * prepared.smoke)]
    return {
        "sweep_file": prepared.sweep.path.name,
        "arguments": [
            "measure" if prepared.measure_only else "run",
            prepared.sweep.path.name,
            *prepared.sweep.overrides,
            *options,
        ],
        "started_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "git_revision": _git_revision(),
        "platform": platform.platform(),
        "device": prepared.device,
        "trials_side_by_side": prepared.num_trials,
        "threads_per_trial": prepared.sweep.execution.cpus_per_trial,
    }


def _git_revision() -> str | None:
    """Commit of the checkout that this code runs from, with ``+changes``; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    revision = git("rev-parse", "HEAD")
    if revision is None:
        return None
    return revision + ("+changes" if git("status", "--porcelain") else "")


def _work(
    prepared: Prepared,
    store: Store,
    jobs: Mapping[str, Job],
    unjudged: Mapping[str, JudgeTask],
    watcher: _Watcher,
    feed: Feed,
) -> None:
    """Do the jobs and judge their answers on the Ray that is running."""
    # Here, because an invocation with nothing to do need not wait for Ray and its friends.
    from engine.judge_pool import JudgePool
    from engine.scheduler import Placement, run_graph
    from engine.trackers.callback import TrackerCallback
    from engine.work import SweepWork
    from trainables.checkpoint import CheckpointSettings

    execution = prepared.sweep.execution
    memory_gb = execution.memory_gb_per_trial
    packer = prepared.packer(jobs, trained_runs(jobs, store))
    watcher.view.start(len(jobs))
    try:
        watcher.pool = JudgePool(
            store,
            unjudged,
            watcher.judging_failed,
            prepared.sweep.endpoints,
            answers=pending_answers(prepared, store),
            local_gpus=prepared.gpus_per_local_judge,
            gives_gpus_back=prepared.judges_take_turns,
        )
        for task_id in watcher.pool.answers:
            if watcher.pool.answers[task_id].run_id not in jobs:  # what it asks about is done
                watcher.pool.answer(task_id)
        for task in unjudged.values():
            if store.exists(table_key("generations", task.sample_id)):
                watcher.pool.submit(task.sample_id)
        run_graph(
            jobs,
            SweepWork(
                store=store,
                jobs=dict(prepared.jobs),
                device=prepared.device,
                threads=execution.cpus_per_trial,
                zero_stage=execution.zero_stage,
                gradient_checkpointing=execution.gradient_checkpointing,
                checkpoints=CheckpointSettings(execution.checkpoint_every_steps, execution.checkpoint_every_minutes),
                packing=prepared.packing,
                auto_pack=packer.size is None,
            ),
            Placement(
                num_trials=prepared.num_trials,
                cpus_per_trial=execution.cpus_per_trial,
                gpus_per_trial=prepared.gpus_per_trial,
                memory_bytes_per_trial=None if memory_gb is None else int(memory_gb * 1e9),
                max_retries=execution.max_retries,
            ),
            watcher,
            [TrackerCallback(feed)],
            packer,
        )
        watcher.pool.wait()
    finally:
        watcher.view.stop()
