"""Judging tasks without Ray: what is published, what is not done again, and what a failing judge leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.exceptions

import engine.judge_pool
from analysis.judges import DegenerationMetric, Item, Judgement, RuleMetric
from engine.judge_pool import JudgePool, judge_task
from engine.store import Store
from engine.tasks import JudgeTask
from trainables.rows import GenerationRow

SAMPLE = "a" * 12


def _answers(sample_id: str = SAMPLE) -> list[GenerationRow]:
    texts = [("q1", 0, "The bridge is long."), ("q1", 1, "Tea."), ("q2", 0, "A bridge, again.")]
    return [
        GenerationRow(
            sample_id=sample_id,
            question_id=question_id,
            sample_index=index,
            question=f"What about {question_id}?",
            system_prompt=None,
            answer=answer,
            num_tokens=3,
            finish_reason="stop",
        )
        for question_id, index, answer in texts
    ]


def _task(task_id: str = "b" * 12, sample_id: str = SAMPLE, **metric: Any) -> JudgeTask:
    return JudgeTask(
        id=task_id, sample_id=sample_id, run_id="c" * 12, metric=RuleMetric(patterns=("bridge",), **metric)
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store.open(tmp_path / "store", create=True)
    store.publish_table("generations", SAMPLE, _answers())
    return store


class _Scripted:
    """A judge that says what it is told to, or raises."""

    name = "scripted"

    def __init__(self, replies: Sequence[Judgement] | Exception) -> None:
        self.replies = replies
        self.items: list[Item] = []

    async def judge(self, items: Sequence[Item]) -> list[Judgement]:
        self.items += items
        if isinstance(self.replies, Exception):
            raise self.replies
        return list(self.replies)


class TestJudgeTask:
    def test_scores_every_answer(self, store: Store) -> None:
        assert asyncio.run(judge_task(store, _task())) == 3
        scores = store.read_table("scores", "b" * 12).to_pylist()
        assert [(row["question_id"], row["sample_index"], row["value"]) for row in scores] == [
            ("q1", 0, 1.0),
            ("q1", 1, 0.0),
            ("q2", 0, 1.0),
        ]
        assert {row["status"] for row in scores} == {"ok"}
        assert {row["judge"] for row in scores} == {"rule"}
        assert {row["sample_id"] for row in scores} == {SAMPLE}
        assert {row["judge_id"] for row in scores} == {"b" * 12}

    def test_a_done_task_is_not_done_again(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        asyncio.run(judge_task(store, _task()))
        monkeypatch.setattr(RuleMetric, "make", lambda _: pytest.fail("judged again"))
        assert asyncio.run(judge_task(store, _task())) == 0

    def test_the_judge_sees_question_and_answer_and_keeps_its_replies(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        judge = _Scripted(
            [Judgement(0.5, "ok", "50"), Judgement(None, "refused", "I cannot."), Judgement(None, "unparsable", "")]
        )
        monkeypatch.setattr(RuleMetric, "make", lambda _: judge)
        asyncio.run(judge_task(store, _task()))
        assert judge.items[0] == Item("What about q1?", "The bridge is long.")
        scores = store.read_table("scores", "b" * 12).to_pylist()
        assert [(row["value"], row["status"], row["reply"]) for row in scores] == [
            (0.5, "ok", "50"),
            (None, "refused", "I cannot."),
            (None, "unparsable", ""),
        ]

    @pytest.mark.parametrize(
        ("replies", "error"), [(RuntimeError("the judge is ill"), "ill"), ([Judgement(1.0, "ok")], "shorter")]
    )
    def test_a_judge_that_fails_publishes_nothing(
        self, store: Store, monkeypatch: pytest.MonkeyPatch, replies: Any, error: str
    ) -> None:
        monkeypatch.setattr(RuleMetric, "make", lambda _: _Scripted(replies))
        with pytest.raises((RuntimeError, ValueError), match=error):
            asyncio.run(judge_task(store, _task()))
        assert not store.exists(f"tables/scores/{'b' * 12}.parquet")
        monkeypatch.undo()
        assert asyncio.run(judge_task(store, _task())) == 3


class _Ray:
    """As much of Ray as the pool uses: a call is done when it is waited for."""

    exceptions = ray.exceptions

    def __init__(self) -> None:
        self.calls: list[JudgeTask] = []
        self.raises: dict[str, Exception] = {}

    def remote(self, *arguments: Any) -> Any:
        if arguments and isinstance(arguments[0], JudgeTask):
            self.calls.append(arguments[0])
            return arguments[0].id
        return SimpleNamespace(judge=self)

    def wait(self, references: list[str], num_returns: int) -> tuple[list[str], list[str]]:
        return references[:num_returns], references[num_returns:]

    def get(self, reference: str) -> int:
        if reference in self.raises:
            raise self.raises[reference]
        return 1


class TestPool:
    @pytest.fixture
    def fake(self, monkeypatch: pytest.MonkeyPatch) -> _Ray:
        fake = _Ray()
        monkeypatch.setattr(engine.judge_pool, "ray", fake)
        monkeypatch.setattr(engine.judge_pool, "JudgeActor", fake)
        return fake

    def test_every_metric_of_a_sample_once(self, fake: _Ray, store: Store) -> None:
        degeneration = JudgeTask(id="d" * 12, sample_id=SAMPLE, run_id="c" * 12, metric=DegenerationMetric())
        tasks = {task.id: task for task in (_task(), degeneration, _task("e" * 12, "f" * 12))}
        pool = JudgePool(store, tasks, lambda *_: pytest.fail("nothing fails here"))
        pool.submit(SAMPLE)
        pool.submit(SAMPLE)
        pool.submit("unknown")
        pool.wait()
        assert [task.id for task in fake.calls] == ["b" * 12, "d" * 12]
        pool.submit(SAMPLE)
        assert len(fake.calls) == 2
        assert pool.pending == {}

    def test_a_failure_is_told_in_one_line_and_the_others_go_on(self, fake: _Ray, store: Store) -> None:
        tasks = {task.id: task for task in (_task(), _task("d" * 12), _task("e" * 12))}
        failures: list[tuple[str, str]] = []
        pool = JudgePool(store, tasks, lambda task_id, reason: failures.append((task_id, reason)))
        cause = ValueError("first line\n  second line")
        fake.raises = {
            "b" * 12: ray.exceptions.RayTaskError("judge", "Traceback\n ...\nValueError: x\n", cause),
            "d" * 12: ray.exceptions.RayActorError(),
        }
        pool.submit(SAMPLE)
        pool.wait()
        assert failures[0] == ("b" * 12, "ValueError: first line second line")
        assert failures[1][0] == "d" * 12
        assert "actor" in failures[1][1].lower()
        assert "\n" not in failures[1][1]
        assert len(failures) == 2

    def test_an_error_of_ours_is_not_taken_for_a_judge_s(self, fake: _Ray, store: Store) -> None:
        pool = JudgePool(store, {"b" * 12: _task()}, lambda *_: pytest.fail("swallowed"))
        fake.raises = {"b" * 12: KeyboardInterrupt()}  # type: ignore[dict-item]
        pool.submit(SAMPLE)
        with pytest.raises(KeyboardInterrupt):
            pool.wait()
