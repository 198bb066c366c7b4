"""Running a sweep: from a sweep file to tables. Running it again IS resuming it."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.text import Text

from analysis.manifest import Failure, manifest_key, sweep_key
from analysis.remote import Location
from analysis.results import Results, load
from analysis.tables import table_key
from engine.judging import is_judged, missing_keys
from engine.lease import Lease
from engine.machine import read_cluster, read_machine
from engine.measure_jobs import MeasureJob, StudyJob
from engine.packs import trained_runs
from engine.prepare import Prepared, prepare
from engine.progress import make_progress
from engine.proved import proved_key
from engine.ray_session import RaySession
from engine.stopping import Stoppable
from engine.store import Store
from engine.tasks import AnswerTask, Job, JudgeTask
from engine.trackers.feed import Feed
from engine.versions import versions
from engine.watching import SweepWatcher
from trainables.errors import ConfigError

if TYPE_CHECKING:
    pass

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
    watcher = SweepWatcher(prepared, store, view, num_shards=num_shards)
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
    watcher: SweepWatcher,
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
    placement = Placement(
        num_trials=prepared.num_trials,
        workers=execution.workers,
        cpus_per_trial=execution.cpus_per_trial,
        gpus_per_trial=prepared.gpus_per_trial,
        memory_bytes_per_trial=None if memory_gb is None else int(memory_gb * 1e9),
        max_retries=execution.max_retries,
    )
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
                workers=execution.workers,
                worker_resources=placement.resources(),
                zero_stage=execution.zero_stage,
                gradient_checkpointing=execution.gradient_checkpointing,
                checkpoints=CheckpointSettings(execution.checkpoint_every_steps, execution.checkpoint_every_minutes),
                packing=prepared.packing,
                auto_pack=packer.size is None,
            ),
            placement,
            watcher,
            [TrackerCallback(feed)],
            packer,
        )
        watcher.pool.wait()
    finally:
        watcher.view.stop()
