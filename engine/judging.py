"""Judging tasks without Ray: answers from the store, replies asked for once, scores to the store."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from analysis.judges import Asker, Item, Reply, Request
from analysis.judges.openai import OpenaiMetric
from analysis.rows import ScoreRow
from analysis.tables import table_key
from analysis.vectors import Answer, Asking, Score
from engine.endpoints import EndpointConfig
from engine.reply_log import FOLDER, ReplyIndex, ReplyLog
from engine.store import Store
from engine.tasks import AnswerTask, AskedTask, JudgeTask
from trainables.errors import Fault, StoreError

OPEN_STATUSES = frozenset({"api_error", "budget_exhausted"})
"""Judgements that a later invocation tries again."""


def open_key(judge_id: str) -> str:
    """Key of the mark of a judging task whose published scores have gaps that asking again may fill."""
    return f"{FOLDER}/{judge_id}.open"


def is_judged(store: Store, judge_id: str) -> bool:
    """Whether nothing is left to do: the scores are there, and none of them is to be asked for again."""
    return store.exists(table_key("scores", judge_id)) and not store.exists(open_key(judge_id))


def missing_keys(
    tasks: Iterable[JudgeTask],
    answers: Iterable[AnswerTask],
    endpoints: Mapping[str, EndpointConfig],
    environment: Mapping[str, str],
) -> list[Fault]:
    """Endpoints that are to be asked and whose key is not in the environment."""
    named = {asking.endpoint for task in tasks if isinstance(asking := task.metric.asking, OpenaiMetric)}
    named |= {task.endpoint for task in answers}
    return [
        Fault(
            f"endpoints.{name}.api_key_env",
            f"the environment variable {variable} is not set; it holds the key (null: the server wants none)",
        )
        for name in sorted(named)
        if (variable := endpoints[name].api_key_env) is not None and not environment.get(variable)
    ]


class ReplyDesk:
    """Gets replies: from the segments on disk, from what is under way for another task, or by asking.

    ``asker`` None: nothing can be asked (judges that need no model, or work offline); a request that is not known ends
    as ``api_error``. A final reply is on disk before it is given out.
    """

    def __init__(self, store: Store, asker: Asker | None, log: ReplyLog | None = None) -> None:
        self.store = store
        self.asker = asker
        self.log = log or ReplyLog(store)
        self.known = ReplyIndex(store)
        self.num_asked = 0
        self._under_way: dict[str, asyncio.Task[Reply]] = {}

    async def replies(self, requests: Sequence[Request]) -> dict[str, Reply]:
        """One reply per request, by its id."""
        wanted = {request.id: request for request in requests}
        if not wanted:
            return {}
        known = await asyncio.to_thread(self.known.find, wanted.keys())
        asked = [self._ask(request_id, request) for request_id, request in wanted.items() if request_id not in known]
        return known | dict(await asyncio.gather(*asked))

    async def _ask(self, request_id: str, request: Request) -> tuple[str, Reply]:
        task = self._under_way.get(request_id)
        if task is None:
            task = asyncio.create_task(self._ask_and_commit(request_id, request))
            self._under_way[request_id] = task
            task.add_done_callback(lambda _: self._under_way.pop(request_id, None))
        return request_id, await asyncio.shield(task)

    async def _ask_and_commit(self, request_id: str, request: Request) -> Reply:
        if self.asker is None:
            return Reply("api_error", error="not asked before, and nothing is asked offline")
        self.num_asked += 1
        reply = await self.asker.ask(request)
        if reply.is_final:
            await self.log.commit(request_id, reply)
        return reply


@dataclass(frozen=True)
class Judged:
    """What a judging task came to. ``num_open``: answers that a later invocation tries again; ``why``: of one."""

    num_answers: int
    num_open: int
    why: str | None = None


async def judge_task(store: Store, task: JudgeTask, desk: ReplyDesk | None = None) -> Judged:
    """Score the answers of one sampling task by one metric and publish the scores. What is judged is not done again.

    With gaps that asking again may fill, the task stays marked as open: the mark is written before the scores and
    removed after complete ones, so that a kill between the two means doing it again from the known replies.
    """
    desk = desk or ReplyDesk(store, None)
    if is_judged(store, task.id):
        return Judged(0, 0)
    answers = store.read_table("generations", task.sample_id).to_pylist()
    judge = task.metric.make()
    items = [Item(answer["question"], answer["answer"]) for answer in answers]
    wanted = [tuple(judge.requests(item)) for item in items]
    replies = await desk.replies([request for requests in wanted for request in requests])
    rows = []
    for answer, item, requests in zip(answers, items, wanted, strict=True):
        judgement = judge.read(item, [replies[request.id] for request in requests])
        rows.append(
            ScoreRow(
                judge_id=task.id,
                sample_id=task.sample_id,
                question_id=answer["question_id"],
                sample_index=answer["sample_index"],
                value=judgement.value,
                status=judgement.status,
                judge=judgement.judge or judge.name,
                reply=judgement.reply,
            )
        )
    num_open = sum(row.status in OPEN_STATUSES for row in rows)
    if num_open:
        store.publish(open_key(task.id), b"")
    store.publish_table("scores", task.id, rows)
    if not num_open:
        store.remove(open_key(task.id))
    return Judged(len(rows), num_open, _why(replies))


def _why(replies: Mapping[str, Reply]) -> str | None:
    """The error of the first reply that is not final."""
    return next((reply.error for reply in replies.values() if not reply.is_final), None)


def judged_answers(store: Store, asked: AskedTask, asking: Asking) -> list[Answer]:
    """The answers of a sampling task with their scores from 0 to 100. Raises StoreError if a judgement is open."""
    for metric, judge_id in asked.judge_ids.items():
        if not is_judged(store, judge_id):
            raise StoreError(f"{asked.about}: not all answers are judged by {metric!r}; run the sweep again")
    scores: dict[str, dict[tuple[str, int], Score]] = {}
    for metric, judge_id in asked.judge_ids.items():
        low, high = asking.metrics[metric].bounds
        rows = store.read_table("scores", judge_id).to_pylist()
        scores[metric] = {
            (row["question_id"], row["sample_index"]): Score(
                None if row["value"] is None else 100.0 * (row["value"] - low) / (high - low), row["status"]
            )
            for row in rows
        }
    return [
        Answer(
            question=row["question"],
            system_prompt=row["system_prompt"],
            text=row["answer"],
            scores={metric: known[row["question_id"], row["sample_index"]] for metric, known in scores.items()},
        )
        for row in store.read_table("generations", asked.sample.id).to_pylist()
    ]
