"""The order in which jobs are handed to Tune, and what is said of those that fail, without Ray."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.cloudpickle
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError, RayTaskError
from ray.tune.error import TuneError
from ray.tune.search import Searcher

from analysis.judges.local import LocalMetric
from analysis.vectors import FileVector
from engine.prepare import _waits_for_local_judge
from engine.scheduler import LESS_MEMORY, _Callback, _GraphSearcher, why_failed
from engine.tasks import AskedTask, SampleTask, VectorJob
from trainables.base_model import ResolvedBase
from trainables.sample import SamplingConfig

BASE = ResolvedBase(model="org/model", revision="abc", dtype="float32", source="org/model")


class _Notes:
    def __init__(self) -> None:
        self.said: list[tuple[str, ...]] = []
        self.judging: dict[str, bool | str] = {}  # what is said of a job that needs judgements
        self.after_waiting: dict[str, bool | str] = {}

    def started(self, job_id: str) -> None:
        self.said.append(("started", job_id))

    def figures(self, job_id: str, figures: Mapping[str, Any]) -> None:
        self.said.append(("figures", job_id, *figures))

    def done(self, job_id: str) -> None:
        self.said.append(("done", job_id))

    def failed(self, job_id: str, reason: str) -> None:
        self.said.append(("failed", job_id, reason))

    def remark(self, text: str, *, ok: bool = True) -> None:
        self.said.append(("remark" if ok else "warning", text))

    def skipped(self, job_id: str, reason: str) -> None:
        self.said.append(("skipped", job_id, reason))

    def unjudged(self, job_id: str) -> bool | str:
        return self.judging.get(job_id, False)

    def wait_for_judgement(self) -> None:
        self.said.append(("waited",))
        self.judging = dict(self.after_waiting)

    def look(self) -> None:
        self.said.append(("looked",))


def job(name: str, *parents: str) -> VectorJob:
    vector = FileVector(file="v.safetensors")
    return VectorJob(id=name, label=f"job {name}", name=name, base=BASE, vector=vector, parents=parents)


def searcher(*jobs: VectorJob) -> tuple[_GraphSearcher, _Notes]:
    notes = _Notes()
    return _GraphSearcher({each.id: each for each in jobs}, notes), notes


def test_a_child_waits_for_its_parent_and_others_do_not() -> None:
    graph, notes = searcher(job("child", "parent"), job("parent"), job("other"))
    assert graph.suggest("t1") == {"job": "parent"}
    assert graph.suggest("t2") == {"job": "other"}
    assert graph.suggest("t3") is None
    graph.finish("t2", None)
    assert graph.suggest("t3") is None
    graph.finish("t1", None)
    assert graph.suggest("t3") == {"job": "child"}
    assert graph.suggest("t4") == Searcher.FINISHED
    assert notes.said == [("done", "other"), ("done", "parent")]


def test_a_parent_that_was_done_before_holds_nobody_back() -> None:
    graph, _ = searcher(job("child", "done long ago"))
    assert graph.suggest("t1") == {"job": "child"}


def test_children_and_grandchildren_of_a_failed_job_are_skipped_with_the_reason() -> None:
    graph, notes = searcher(job("a"), job("b", "a"), job("c", "b"), job("d"))
    assert graph.suggest("t1") == {"job": "a"}
    graph.finish("t1", "no luck")
    assert graph.suggest("t2") == {"job": "d"}
    assert graph.suggest("t3") == Searcher.FINISHED
    assert ("failed", "a", "no luck") in notes.said
    assert ("skipped", "b", "needs job a, which failed") in notes.said
    assert ("skipped", "c", "needs job b, which was skipped") in notes.said


def judged_job(name: str, *parents: str) -> VectorJob:
    """A vector that is made of answers, so it waits for judgements too."""
    sample = SampleTask(id="abc", questions=(), sampling=SamplingConfig())
    asked = AskedTask(about="positive 1", sample=sample, judge_ids={"trait": "def"}, compared_ids={})
    return job(name, *parents).model_copy(update={"asked": (asked,)})


def test_a_vector_of_answers_waits_for_their_judgements() -> None:
    graph, notes = searcher(job("answers"), judged_job("vector", "answers"), job("run", "vector"), job("other"))
    notes.judging = {"vector": True}
    assert graph.suggest("t1") == {"job": "answers"}
    graph.finish("t1", None)
    assert graph.suggest("t2") == {"job": "other"}
    assert graph.suggest("t3") is None, "while others run Tune goes on"
    assert ("waited",) not in notes.said
    notes.judging = {}
    assert graph.suggest("t3") == {"job": "vector"}
    graph.finish("t3", None)
    assert graph.suggest("t4") == {"job": "run"}


def test_judges_are_looked_after_while_no_trial_gives_a_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is done holds a GPU, which the trial that waits for it cannot ask for."""
    graph, notes = searcher(job("waits"))
    callback = _Callback(graph, notes)
    clock = iter([0.0, 0.0, 0.3, 0.9, 1.2, 1.2, 1.5])
    monkeypatch.setattr("engine.scheduler.time", SimpleNamespace(monotonic=lambda: next(clock)))
    for step in range(5):
        callback.on_step_end(step, [])
    assert notes.said == [("looked",)] * 2


def test_with_nothing_else_to_do_it_waits_for_a_judgement() -> None:
    graph, notes = searcher(judged_job("vector"))
    notes.judging = {"vector": True}
    assert graph.suggest("t1") == {"job": "vector"}
    assert notes.said == [("waited",)]


def test_who_waits_for_a_local_judge_is_known_before_anything_starts() -> None:
    """Where GPUs are not enough for both that would be for ever: Tune keeps the GPU of a trial that has ended."""
    local: Any = SimpleNamespace(metric=SimpleNamespace(asking=object.__new__(LocalMetric)))
    rule: Any = SimpleNamespace(metric=SimpleNamespace(asking=None))
    assert _waits_for_local_judge(judged_job("vector"), {"def": local})
    assert not _waits_for_local_judge(judged_job("vector"), {"def": rule, "other": local})
    assert not _waits_for_local_judge(job("vector"), {"def": local})


def test_judgements_that_cannot_be_had_skip_the_vector_and_what_needs_it() -> None:
    graph, notes = searcher(judged_job("vector"), job("run", "vector"))
    notes.judging, notes.after_waiting = {"vector": True}, {"vector": "the judge is gone"}
    assert graph.suggest("t1") == Searcher.FINISHED
    assert notes.said == [
        ("waited",),
        ("skipped", "vector", "the judge is gone"),
        ("skipped", "run", "needs job vector, which was skipped"),
    ]


def test_a_searcher_pickles_without_what_it_holds() -> None:
    graph, _ = searcher(job("a"))
    graph.watcher = lambda: None  # type: ignore[assignment]  # cannot be pickled
    pickle.dumps(graph)


class _Trial:
    """What is read of a Tune trial that failed for good: the files in which Tune keeps what was raised."""

    def __init__(self, folder: Path, *errors: Exception) -> None:
        self.error_file, self.pickled_error_file = str(folder / "error.txt"), None
        for number, error in enumerate(errors, start=1):
            with open(self.error_file, "a") as file:
                file.write(f"Failure # {number} (occurred at noon)\n{error}\n")
            if isinstance(error, RayTaskError | RayActorError):
                self.pickled_error_file = str(folder / "error.pkl")
                Path(self.pickled_error_file).write_bytes(ray.cloudpickle.dumps(error))
        self.run_metadata = SimpleNamespace(num_failures=len(errors))


def raised(cause: Exception) -> RayTaskError:
    return RayTaskError("train", f"Traceback (most recent call last):\n{type(cause).__name__}: {cause}", cause)


RAY_WAS_OUT_OF_MEMORY = OutOfMemoryError(
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: 8ef9) was "
    "4.35GB used / 4.54GB limit (0.96)\nTop 10 memory users: ..."
)


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ([raised(ValueError("no\nluck"))], "ValueError: no luck"),
        ([raised(MemoryError("4 GB"))], f"out of memory: MemoryError: 4 GB; {LESS_MEMORY}"),
        (
            [raised(torch.OutOfMemoryError("CUDA out of memory."))],
            f"out of memory: torch.OutOfMemoryError: CUDA out of memory.; {LESS_MEMORY}",
        ),
        (
            [raised(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."))],
            "out of memory: RuntimeError: DefaultCPUAllocator: can't allocate memory: "
            f"you tried to allocate 9 bytes.; {LESS_MEMORY}",
        ),
        (
            [raised(ValueError("before")), RAY_WAS_OUT_OF_MEMORY],
            "out of memory: Ray killed the trial's process, as the machine's memory was full "
            f"(4.35GB used / 4.54GB limit); {LESS_MEMORY}",
        ),
        (
            [ActorDiedError(), ActorDiedError()],
            "the trial's process died 2 times: killed from outside (by the kernel if memory ran out: "
            f"then {LESS_MEMORY}), or a crash",
        ),
        ([TuneError("the placement group was removed\nby hand")], "the placement group was removed"),
    ],
    ids=["any", "python", "gpu", "cpu", "ray's monitor", "killed", "tune"],
)
def test_why_a_trial_failed_is_said_on_one_line(tmp_path: Path, errors: list[Exception], said: str) -> None:
    trial: Any = _Trial(tmp_path, *errors)
    assert why_failed(trial, raised=True) == said
