"""The order in which jobs are handed to Tune, without Ray."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

from ray.tune.search import Searcher

from engine.scheduler import _GraphSearcher
from engine.tasks import FileRecipe, VectorJob


class _Notes:
    def __init__(self) -> None:
        self.said: list[tuple[str, ...]] = []

    def started(self, job_id: str) -> None:
        self.said.append(("started", job_id))

    def figures(self, job_id: str, figures: Mapping[str, Any]) -> None:
        self.said.append(("figures", job_id, *figures))

    def done(self, job_id: str) -> None:
        self.said.append(("done", job_id))

    def failed(self, job_id: str, reason: str) -> None:
        self.said.append(("failed", job_id, reason))

    def skipped(self, job_id: str, reason: str) -> None:
        self.said.append(("skipped", job_id, reason))


def job(name: str, *parents: str) -> VectorJob:
    return VectorJob(id=name, label=f"job {name}", recipe=FileRecipe(content=""), parents=parents)


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


def test_a_searcher_pickles_without_what_it_holds() -> None:
    graph, _ = searcher(job("a"))
    graph.watcher = lambda: None  # type: ignore[assignment]  # cannot be pickled
    pickle.dumps(graph)
