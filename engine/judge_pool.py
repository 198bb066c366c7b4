"""The judge pool: Ray actors that score finished answers while other runs still train."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from typing import Any

import ray

from analysis.judges import Item
from analysis.rows import ScoreRow
from analysis.tables import table_key
from engine.store import Store
from engine.tasks import JudgeTask


@ray.remote(num_cpus=0, max_restarts=2, max_task_retries=2)
class JudgeActor:
    """Does judging tasks one batch at a time; asynchronous, so that a slow judge does not block the next task."""

    def __init__(self, store: Store) -> None:
        self.store = store

    async def judge(self, task: JudgeTask) -> int:
        """Score the answers of one sampling task by one metric and publish them; returns how many were scored."""
        return await judge_task(self.store, task)


async def judge_task(store: Store, task: JudgeTask) -> int:
    """The same without Ray. A task that is done already is not done again."""
    if store.exists(table_key("scores", task.id)):
        return 0
    answers = store.read_table("generations", task.sample_id).to_pylist()
    judge = task.metric.make()
    judgements = await judge.judge([Item(answer["question"], answer["answer"]) for answer in answers])
    rows = [
        ScoreRow(
            judge_id=task.id,
            sample_id=task.sample_id,
            question_id=answer["question_id"],
            sample_index=answer["sample_index"],
            value=judgement.value,
            status=judgement.status,
            judge=judge.name,
            reply=judgement.reply,
        )
        for answer, judgement in zip(answers, judgements, strict=True)
    ]
    store.publish_table("scores", task.id, rows)
    return len(rows)


class JudgePool:
    """Submits judging tasks as their answers come in and collects what failed. Lives in the driver."""

    def __init__(self, store: Store, tasks: Mapping[str, JudgeTask], failed: Callable[[str, str], None]) -> None:
        self.tasks = tasks
        self.failed = failed
        self.actor: Any = JudgeActor.remote(store)  # type: ignore[attr-defined]
        self.pending: dict[Any, str] = {}
        self.submitted: set[str] = set()

    def submit(self, sample_id: str) -> None:
        """Judge the answers of a finished sampling task by every metric; asking again does nothing."""
        for task in self.tasks.values():
            if task.sample_id == sample_id and task.id not in self.submitted:
                self.submitted.add(task.id)
                self.pending[self.actor.judge.remote(task)] = task.id

    def wait(self) -> None:
        """Wait for everything submitted; a task that raised is reported with its error on one line."""
        while self.pending:
            ready, _ = ray.wait(list(self.pending), num_returns=1)
            for reference in ready:
                task_id = self.pending.pop(reference)
                try:
                    ray.get(reference)
                except ray.exceptions.RayError as error:
                    self.failed(task_id, _reason(error))


def _reason(error: Exception) -> str:
    """What the judge itself raised, without the remote traceback; else what Ray says."""
    cause = getattr(error, "cause", None)
    text = "".join(traceback.format_exception_only(cause)) if isinstance(cause, BaseException) else str(error)
    return " ".join(text.split()) or type(error).__name__
