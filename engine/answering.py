"""Answers from a server that has the adapters by name, in place of sampling in the trial; without Ray.

A run is known to the server by its id (so is a base), because a label says nothing about which training is served.
Every answer is on disk, as replies of judges are, before it counts; the table is published when all are there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import Protocol

from analysis.judges import Reply, Request
from analysis.tables import table_key
from engine.judging import Judged, ReplyDesk
from engine.store import Store
from engine.tasks import AnswerTask, QuestionText
from trainables.rows import GenerationRow

FILTERED = "filtered"


class KnowsModels(Protocol):
    """An asker that can say which models its server has."""

    async def models(self) -> Collection[str] | None:
        """Their names; None where the server does not say."""


async def answer_task(store: Store, task: AnswerTask, desk: ReplyDesk, server: KnowsModels) -> Judged:
    """Ask for the answers of one sampling task and publish them when all are there; what is committed is not asked
    again, whatever happened in between."""
    sample = task.sample
    if store.exists(table_key("generations", sample.id)):
        return Judged(0, 0)
    wanted = [
        (question, index, _request(task, question, index))
        for question in sample.questions
        for index in range(sample.sampling.samples)
    ]
    names = await server.models()
    if names is not None and task.run_id not in names:
        listed = ", ".join(sorted(names)[:5]) or "none"
        why = (
            f"the server has no model {task.run_id}, it has {listed}; serve the run by its id "
            "(`shiftgrad serving` prints the command), then run again"
        )
        return Judged(len(wanted), len(wanted), why)
    replies = await desk.replies([request for _, _, request in wanted])
    rows = [_row(task, question, index, replies[request.id]) for question, index, request in wanted]
    missing = [row for row in rows if row is None]
    if missing:
        return Judged(len(rows), len(missing), next(one.error for one in replies.values() if not one.is_final))
    store.publish_table("generations", sample.id, rows)
    return Judged(len(rows), 0)


def requests(task: AnswerTask) -> Sequence[Request]:
    """Everything that the server is asked for this task."""
    indices = range(task.sample.sampling.samples)
    return [_request(task, question, index) for question in task.sample.questions for index in indices]


def _request(task: AnswerTask, question: QuestionText, index: int) -> Request:
    sampling = task.sample.sampling
    system = () if sampling.system_prompt is None else (("system", sampling.system_prompt),)
    # one seed per answer: with one for all, a server that honours it would give one answer n times
    digest = hashlib.sha256(f"{task.run_id}\0{question.id}\0{index}".encode()).digest()
    return Request(
        model=task.run_id,
        messages=(*system, ("user", question.text)),
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_logprobs=None,
        seed=int.from_bytes(digest[:4]) % 2**31,
        draw=index,
    )


def _row(task: AnswerTask, question: QuestionText, index: int, reply: Reply) -> GenerationRow | None:
    """None: there is no answer yet. What a server's filter keeps back is an answer without text, and says so."""
    if not reply.is_final:
        return None
    return GenerationRow(
        sample_id=task.sample.id,
        question_id=question.id,
        sample_index=index,
        question=question.text,
        system_prompt=task.sample.sampling.system_prompt,
        answer=reply.text or "",
        num_tokens=reply.num_completion_tokens,
        finish_reason=FILTERED if reply.status == "refused" else reply.finish_reason or "unknown",
    )
