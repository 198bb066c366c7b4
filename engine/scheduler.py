"""The task graph inside one ``Tuner.fit``: Tune places jobs and starts them again when their process dies.

Tune's own storage is throw-away: what is done is known from the store alone. A Searcher hands Tune a job once all of
its parents are done; children of a failed job are never handed out.
"""

from __future__ import annotations

import math
import re
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
import ray.cloudpickle
from ray import tune
from ray.exceptions import RayActorError, RayTaskError
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from engine.pack_work import FITS, OUT_OF_MEMORY, TRIED, told
from engine.packs import Packer
from engine.tasks import Job, VectorJob
from engine.weight_jobs import PileJob
from trainables.memory import is_out_of_memory
from trainables.tune_trainable import Work, tune_trainable

LOOK_INTERVAL_S = 1.0
LESS_MEMORY = (
    "lower training.micro_batch_size or data.max_length, set execution.gradient_checkpointing, "
    "or run fewer trials side by side (execution.trials)"
)


class Watcher(Protocol):
    """Told what happens to jobs while they run, in the driver process."""

    def started(self, job_id: str) -> None: ...

    def figures(self, job_id: str, figures: Mapping[str, Any]) -> None: ...

    def done(self, job_id: str) -> None: ...

    def failed(self, job_id: str, reason: str) -> None: ...

    def remark(self, text: str, *, ok: bool = True) -> None:
        """Something about no one job."""

    def skipped(self, job_id: str, reason: str) -> None: ...

    def unjudged(self, job_id: str) -> bool | str:
        """Whether judgements that the job needs are still being made; a text says why they cannot be had."""

    def wait_for_judgement(self) -> None:
        """Wait until one more judging task has ended; there is one under way."""

    def look(self) -> None:
        """Called every second or so, whatever happens or does not: a judge that is done must not keep the GPU that a
        trial waits for, and a waiting trial gives no sign."""


@dataclass(frozen=True)
class Placement:
    """Where trials run and how often a dead one is started again. ``workers``: processes that train a run together,
    each with what is said of a trial."""

    num_trials: int
    workers: int
    cpus_per_trial: int
    gpus_per_trial: float
    memory_bytes_per_trial: int | None
    max_retries: int

    def resources(self) -> dict[str, float]:
        """What a trial, or one of its workers, asks of Ray."""
        asked = {"CPU": self.cpus_per_trial, "GPU": self.gpus_per_trial, "memory": self.memory_bytes_per_trial}
        return {name: amount for name, amount in asked.items() if amount}


class StaysInDriver:
    """Tune pickles searchers and callbacks for a restore that is never made; what they hold cannot be pickled."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _GraphSearcher(StaysInDriver, Searcher):
    """Suggests jobs whose parents are done and whose answers are judged, in order; None while the rest has to wait;
    FINISHED when none is left. Trainings go out in packs where ``packer`` makes some; what else a job does is then
    suggested for itself."""

    def __init__(self, jobs: Mapping[str, Job], watcher: Watcher, packer: Packer | None = None) -> None:
        super().__init__(metric=None, mode=None)
        self.jobs = jobs
        self.waiting = dict(jobs)
        self.open = set(jobs)  # not done: a parent that is not open was done before this invocation
        self.lost: dict[str, str] = {}  # failed or skipped -> what to say of it
        self.job_of_trial: dict[str, str] = {}
        self.packer = packer or Packer({}, {}, 1, 1)
        self.packs: dict[str, list[str]] = {}  # jobs whose trainings a trial is doing, by trial
        self.trained: set[str] = set()
        self.num_running = 0
        self.watcher = watcher

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        while True:
            self._skip_children_of_lost()
            is_judging = False
            ready: list[str] = []
            for job_id, job in list(self.waiting.items()):
                if any(parent in self.open for parent in job.parents):
                    continue
                unjudged = self.watcher.unjudged(job_id) if _rests_on_judgements(job) else False
                if isinstance(unjudged, str):
                    self._skip(job_id, unjudged)
                elif unjudged:
                    is_judging = True
                else:
                    ready.append(job_id)
            under_way = self._under_way()
            for job_id in ready:
                members = self.packer.members(job_id, ready, under_way)
                if members is not None:
                    return self._hand_out(trial_id, job_id, members)
            if not self.waiting and not self.packs:
                return Searcher.FINISHED
            if self.num_running or not (is_judging or self._has_children_of_lost()):
                return None
            if is_judging:  # nothing else is left to do: Tune would take it for a lack of resources
                self.watcher.wait_for_judgement()

    def _under_way(self) -> list[str]:
        """Waiting jobs that need nothing but vectors which are being made now."""
        at_work = {job_id for job_id in self.job_of_trial.values() if isinstance(self.jobs[job_id], VectorJob)}
        made = at_work & self.open - self.waiting.keys()
        return [
            job_id
            for job_id, job in self.waiting.items()
            if (needed := [parent for parent in job.parents if parent in self.open]) and made.issuperset(needed)
        ]

    def _hand_out(self, trial_id: str, job_id: str, members: list[str]) -> dict[str, Any]:
        self.num_running += 1
        config: dict[str, Any] = {"job": job_id}
        if self.packer.only_train(members):
            config |= {"job": members[0], "pack": members}
            self.packs[trial_id] = members
            if len(members) > 1:
                labels = ", ".join(self.jobs[member].label for member in members)
                self.watcher.remark(f"a pack of {len(members)} trainings: {labels}")
        for member in members:
            del self.waiting[member]
        self.job_of_trial[trial_id] = members[0]
        notes = dict.fromkeys(self.packer.notes[one] for one in members if one in self.packer.notes)
        return config | ({"note": "; ".join(notes)} if notes else {})

    def _skip_children_of_lost(self) -> None:
        found = True
        while found:
            found = False
            for job_id, job in list(self.waiting.items()):
                lost = [parent for parent in job.parents if parent in self.lost]
                if lost:
                    self._skip(job_id, f"needs {self.lost[lost[0]]}")
                    found = True

    def _has_children_of_lost(self) -> bool:
        return any(parent in self.lost for job in self.waiting.values() for parent in job.parents)

    def _skip(self, job_id: str, reason: str) -> None:
        job = self.waiting.pop(job_id)
        self.lost[job_id] = f"{job.label}, which was skipped"
        self.watcher.skipped(job_id, reason)

    def member(self, job_id: str, reason: str | None) -> None:
        """A member of a pack is trained; with a ``reason`` it cannot go on, and its job has failed."""
        if reason is None:
            self.trained.add(job_id)
            self.packer.trained(job_id)
        elif job_id not in self.lost:  # a pack that is tried again tells it again
            self._lose(job_id, reason)

    def finish(self, trial_id: str, reason: str | None, result: Mapping[str, Any] | None = None) -> None:
        """A trial ended for good; with a ``reason`` its job failed, or its pack. ``result``: its last report."""
        job_id = self.job_of_trial[trial_id]
        self.num_running -= 1
        if trial_id in self.packs:
            self._finish_pack(self.packs.pop(trial_id), reason, result or {})
        elif reason is None:
            self.open.discard(job_id)
            self.watcher.done(job_id)
        else:
            self._lose(job_id, reason)

    def _finish_pack(self, members: list[str], reason: str | None, result: Mapping[str, Any]) -> None:
        """Members that are not lost wait again: the trained ones for what follows, the others for another pack."""
        left = [one for one in members if one not in self.lost and one not in self.trained]
        reason = reason or result.get(OUT_OF_MEMORY)
        if reason is not None and left and len(members) == 1:
            self._lose(members[0], reason)
        elif reason is not None and left:
            size = int(result.get(TRIED, len(members)))  # where as many as fit are taken, the first ones
            self.watcher.remark(self.packer.split(size, left[:size], reason), ok=False)
        elif FITS in result:
            self.packer.found(members[0], int(result[FITS]))
        back = {one for one in members if one not in self.lost}
        self.waiting = {one: job for one, job in self.jobs.items() if one in self.waiting or one in back}

    def _lose(self, job_id: str, reason: str) -> None:
        self.lost[job_id] = f"{self.jobs[job_id].label}, which failed"
        self.watcher.failed(job_id, reason)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Everything happens in the callback, which knows a failed trial's error; Tune calls it first."""

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Figures go to the watcher by the callback."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the store says what is done."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: the store says what is done."""


def _rests_on_judgements(job: Job) -> bool:
    return isinstance(job, PileJob) or (isinstance(job, VectorJob) and bool(job.asked))


class _Callback(StaysInDriver, tune.Callback):
    """Passes on what Tune tells about trials."""

    def __init__(self, searcher: _GraphSearcher, watcher: Watcher) -> None:
        self.searcher = searcher
        self.watcher = watcher
        self.looked_at = -math.inf

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        del iteration, trials, info
        if time.monotonic() - self.looked_at >= LOOK_INTERVAL_S:
            self.looked_at = time.monotonic()
            self.watcher.look()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        del iteration, trials, info
        for job_id in trial.config.get("pack", [trial.config["job"]]):
            self.watcher.started(job_id)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        del iteration, trials, info
        if (member := told(result)) is not None:
            self.searcher.member(*member)
        self.watcher.figures(str(result.get("job", trial.config["job"])), result)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        del iteration, trials, info
        self.searcher.finish(trial.trial_id, why_failed(trial, raised=False), trial.last_result)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        del iteration, trials, info
        self.searcher.finish(trial.trial_id, why_failed(trial, raised=True))


class _NoReporter(tune.ProgressReporter):
    """The watcher says how far things are. In a notebook Tune's own reporter would clear what the cell shows."""

    def should_report(self, trials: list[Trial], done: bool = False) -> bool:
        del trials, done
        return False

    def report(self, trials: list[Trial], done: bool, *sys_info: str) -> None:
        """Never asked to."""


def why_failed(trial: Trial, raised: bool) -> str | None:
    """Why the job of a trial that ended for good has failed, on one line; None: it is done."""
    if raised:
        return _error_text(trial)
    result = trial.last_result or {}
    if result.get("status") == "failed":
        return str(result.get("reason", "no reason was given"))
    if result.get("status") != "done":
        return f"the trial ended without a result (last status: {result.get('status')})"
    return None


def _error_text(trial: Trial) -> str:
    """One line that says why a trial failed for good."""
    text = _last_text(trial)
    if "low on memory" in text:
        used = re.search(r"was ([0-9.]+GB used / [0-9.]+GB limit)", text)
        memory = f" ({used[1]})" if used is not None else ""
        return f"out of memory: Ray killed the trial's process, as the machine's memory was full{memory}; {LESS_MEMORY}"
    error = _last_error(trial)
    if isinstance(error, RayTaskError):
        if not isinstance(error.cause, BaseException):
            return str(error).strip().splitlines()[-1]
        text = " ".join("".join(traceback.format_exception_only(error.cause)).split())
        return f"out of memory: {text}; {LESS_MEMORY}" if is_out_of_memory(error.cause) else text
    if isinstance(error, RayActorError):
        times = trial.run_metadata.num_failures
        return (
            f"the trial's process died {times} time{'s' if times != 1 else ''}: killed from outside (by the kernel if "
            f"memory ran out: then {LESS_MEMORY}), or a crash"
        )
    return next(iter(text.splitlines()), "the trial failed without a message")


def _last_text(trial: Trial) -> str:
    """What Tune has written about the last attempt, of any kind of error; empty if nothing."""
    path = trial.error_file
    if path is None or not Path(path).exists():
        return ""
    _, _, last = Path(path).read_text(errors="replace").rpartition("Failure # ")
    return last.partition("\n")[2].strip()  # after the heading with number and time


def _last_error(trial: Trial) -> BaseException | None:
    """The error of the last attempt, from Tune's staging folder: its storage may not have it yet.

    Tune keeps those of tasks and actors alone.
    """
    path = trial.pickled_error_file
    if path is None or not Path(path).exists():
        return None
    error = ray.cloudpickle.loads(Path(path).read_bytes())
    assert isinstance(error, BaseException)
    return error


def _trial_name(trial: Trial) -> str:
    """A pack is called by its first job and its size: the jobs themselves have trials later on."""
    pack = trial.config.get("pack")
    return str(trial.config["job"]) + (f"-pack{len(pack)}" if pack else "")


def run_graph(
    jobs: Mapping[str, Job],
    work: Work,
    placement: Placement,
    watcher: Watcher,
    callbacks: Sequence[tune.Callback] = (),
    packer: Packer | None = None,
) -> None:
    """Do all jobs that can be done. Ray must be initialised. One failed job never stops the others.

    ``packer``: which trainings share a trial; None: each has its own.
    ``callbacks`` are told what Tune tells, after the watcher; they must pickle (``StaysInDriver``) and not raise.
    Raises KeyboardInterrupt when the user stops it; finished jobs stay finished.
    """
    if not jobs:
        return
    searcher = _GraphSearcher(jobs, watcher, packer)

    def asked(config: Mapping[str, Any]) -> tune.PlacementGroupFactory:
        if "pack" in config and placement.workers > 1:
            # The workers have what they need from Ray Train, all or nothing. What waits for them computes nothing; were
            # it to hold a CPU, it could keep the last one from them. Ray knows no bundle of nothing: a byte of memory.
            return tune.PlacementGroupFactory([{"memory": 1}])
        return tune.PlacementGroupFactory([placement.resources()])

    trainable = tune.with_resources(tune.with_parameters(tune_trainable, work=work), asked)
    with tempfile.TemporaryDirectory(prefix="shiftgrad-tune-") as throw_away:
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=4 * len(jobs),  # a bound: a job, its pack, and packs that were tried again in halves
                max_concurrent_trials=placement.num_trials,
                reuse_actors=True,  # starting a process and importing torch costs 8 s, a reused one 0.4 s
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=throw_away,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=placement.max_retries),
                callbacks=[_Callback(searcher, watcher), *callbacks],
                progress_reporter=_NoReporter(),
            ),
        ).fit()
