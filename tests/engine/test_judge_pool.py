"""Judging tasks without Ray: what is published, what is not done again, and what a failing judge leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
import ray.exceptions

import engine.judge_pool
import engine.reply_log
from analysis.judges import DegenerationMetric, Item, Judgement, Reply, Request, RuleMetric
from analysis.remote import Location
from engine.judge_pool import JudgePool
from engine.judging import Judged, ReplyDesk, is_judged, judge_task
from engine.reply_log import ReplyIndex, ReplyLog, known_replies
from engine.store import Store
from engine.tasks import JudgeTask
from trainables.errors import StoreError
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
    """A judge that asks about the answer, and reads what it is told to or raises."""

    name = "scripted"

    def __init__(self, *judgements: Judgement | Exception) -> None:
        self.judgements = list(judgements)
        self.items: list[Item] = []
        self.replies: list[Sequence[Reply]] = []

    def requests(self, item: Item) -> Sequence[Request]:
        return (Request("m", (("user", item.answer),), 1, 0.0, 20, 0),)

    def read(self, item: Item, replies: Sequence[Reply]) -> Judgement:
        self.items.append(item)
        self.replies.append(replies)
        judgement = self.judgements.pop(0)
        if isinstance(judgement, Exception):
            raise judgement
        return judgement


class _Echo:
    """An asker that says what it was asked; ``open_for``: texts for which it has no answer yet."""

    def __init__(self, *open_for: str) -> None:
        self.open_for = open_for
        self.asked: list[Request] = []

    async def ask(self, request: Request) -> Reply:
        self.asked.append(request)
        await asyncio.sleep(0)
        if request.messages[0][1] in self.open_for:
            return Reply("api_error", error="HTTP 500: no")
        return Reply("ok", request.messages[0][1])


class _Asking:
    """A judge that asks about the answer; its value is the length of what comes back."""

    name = "asking"

    def requests(self, item: Item) -> Sequence[Request]:
        return (Request("m", (("user", item.answer),), 1, 0.0, 20, 0),)

    def read(self, item: Item, replies: Sequence[Reply]) -> Judgement:
        del item
        (reply,) = replies
        if reply.status != "ok":
            return Judgement(None, reply.status, reply.to_json())
        return Judgement(float(len(reply.text or "")), "ok", reply.to_json(timing=False))


class TestJudgeTask:
    def test_scores_every_answer(self, store: Store) -> None:
        assert asyncio.run(judge_task(store, _task())) == Judged(3, 0)
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
        assert asyncio.run(judge_task(store, _task())) == Judged(0, 0)

    def test_the_judge_sees_question_and_answer_and_keeps_its_replies(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        judge = _Scripted(
            Judgement(0.5, "ok", "50"),
            Judgement(None, "refused", "I cannot.", judge="another"),
            Judgement(None, "unparsable", ""),
        )
        monkeypatch.setattr(RuleMetric, "make", lambda _: judge)
        asyncio.run(judge_task(store, _task(), ReplyDesk(store, _Echo())))
        assert judge.items[0] == Item("What about q1?", "The bridge is long.")
        assert judge.replies[0] == [Reply("ok", "The bridge is long.")]
        scores = store.read_table("scores", "b" * 12).to_pylist()
        assert [row["judge"] for row in scores] == ["scripted", "another", "scripted"]
        assert [(row["value"], row["status"], row["reply"]) for row in scores] == [
            (0.5, "ok", "50"),
            (None, "refused", "I cannot."),
            (None, "unparsable", ""),
        ]

    def test_a_judge_that_fails_publishes_nothing(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        judge = _Scripted(Judgement(1.0, "ok"), RuntimeError("the judge is ill"))
        monkeypatch.setattr(RuleMetric, "make", lambda _: judge)
        with pytest.raises(RuntimeError, match="the judge is ill"):
            asyncio.run(judge_task(store, _task(), ReplyDesk(store, _Echo())))
        assert not store.exists(f"tables/scores/{'b' * 12}.parquet")
        monkeypatch.undo()
        assert asyncio.run(judge_task(store, _task())) == Judged(3, 0)


class TestReplies:
    @pytest.fixture(autouse=True)
    def _asking(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(RuleMetric, "make", lambda _: _Asking())

    def test_a_reply_is_asked_for_once_whatever_asks(self, store: Store) -> None:
        asker = _Echo()

        async def both() -> None:
            desk = ReplyDesk(store, asker)
            await asyncio.gather(judge_task(store, _task(), desk), judge_task(store, _task("d" * 12), desk))

        asyncio.run(both())
        assert len(asker.asked) == 3
        later = _Echo()
        asyncio.run(judge_task(store, _task("e" * 12), ReplyDesk(store, later)))
        assert later.asked == []
        assert store.read_table("scores", "e" * 12).column("value").to_pylist() == [19.0, 4.0, 16.0]

    def test_what_has_no_answer_stays_open_and_only_that_is_asked_again(self, store: Store) -> None:
        judged = asyncio.run(judge_task(store, _task(), ReplyDesk(store, _Echo("Tea."))))
        assert judged == Judged(3, 1, "HTTP 500: no")
        assert not is_judged(store, "b" * 12)
        assert store.read_table("scores", "b" * 12).column("status").to_pylist() == ["ok", "api_error", "ok"]
        later = _Echo()
        assert asyncio.run(judge_task(store, _task(), ReplyDesk(store, later))) == Judged(3, 0)
        assert [request.messages[0][1] for request in later.asked] == ["Tea."]
        assert is_judged(store, "b" * 12)
        assert store.read_table("scores", "b" * 12).column("status").to_pylist() == ["ok", "ok", "ok"]

    def test_offline_nothing_is_asked_and_what_is_known_counts(self, store: Store) -> None:
        asyncio.run(judge_task(store, _task(), ReplyDesk(store, _Echo("Tea."))))
        judged = asyncio.run(judge_task(store, _task("d" * 12), ReplyDesk(store, None)))
        assert (judged.num_answers, judged.num_open) == (3, 1)
        assert store.read_table("scores", "d" * 12).column("value").to_pylist() == [19.0, None, 16.0]

    def test_a_torn_last_line_was_not_committed(self, store: Store) -> None:
        asyncio.run(judge_task(store, _task(), ReplyDesk(store, _Echo())))
        (name,) = store.names("judgements")
        path = store.path(f"judgements/{name}")
        whole = path.read_bytes()
        wanted = [_Asking().requests(Item("", row.answer))[0].id for row in _answers()]
        assert len(known_replies(store, wanted)) == 3
        for cut in (1, 2, 40):
            path.write_bytes(whole[:-cut])
            assert len(known_replies(store, wanted)) == 2
        path.write_bytes(b"{}\n" + whole)
        with pytest.raises(StoreError, match=r"line 1: not a reply.*Move it away"):
            known_replies(store, wanted)


class _Ray:
    """As much of Ray as the pool uses: a call is done when it is waited for."""

    exceptions = ray.exceptions

    def __init__(self) -> None:
        self.calls: list[JudgeTask] = []
        self.raises: dict[str, Exception] = {}
        self.results: dict[str, Judged] = {}

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "a" * 56)

    def remote(self, *arguments: Any, **options: Any) -> Any:
        if options:
            return lambda _: self  # a class as an actor
        if arguments and isinstance(arguments[0], JudgeTask):
            self.calls.append(arguments[0])
            return arguments[0].id
        return SimpleNamespace(judge=self)

    def wait(
        self, references: list[str], num_returns: int, timeout: float | None = None
    ) -> tuple[list[str], list[str]]:
        del timeout
        return references[:num_returns], references[num_returns:]

    def get(self, reference: str) -> Judged:
        if reference in self.raises:
            raise self.raises[reference]
        return self.results.get(reference, Judged(3, 0))


class TestPool:
    @pytest.fixture
    def fake(self, monkeypatch: pytest.MonkeyPatch) -> _Ray:
        fake = _Ray()
        monkeypatch.setattr(engine.judge_pool, "ray", fake)
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

    def test_answers_without_a_score_are_told(self, fake: _Ray, store: Store) -> None:
        failures: list[tuple[str, str]] = []
        pool = JudgePool(store, {"b" * 12: _task()}, lambda task_id, reason: failures.append((task_id, reason)))
        fake.results = {"b" * 12: Judged(3, 2, "HTTP 500: no (tried 7 times)")}
        pool.submit(SAMPLE)
        pool.poll()
        assert failures == [("b" * 12, "2 of 3 answers have no score: HTTP 500: no (tried 7 times)")]

    def test_an_error_of_ours_is_not_taken_for_a_judge_s(self, fake: _Ray, store: Store) -> None:
        pool = JudgePool(store, {"b" * 12: _task()}, lambda *_: pytest.fail("swallowed"))
        fake.raises = {"b" * 12: KeyboardInterrupt()}  # type: ignore[dict-item]
        pool.submit(SAMPLE)
        with pytest.raises(KeyboardInterrupt):
            pool.wait()


class TestReplyIndex:
    def test_what_was_read_is_not_read_again_and_what_is_new_is_found(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = (f"{number:024x}" for number in (1, 2))
        index = ReplyIndex(store)
        log = ReplyLog(store)
        asyncio.run(log.commit(first, Reply("ok", "one")))
        assert {name: reply.text for name, reply in index.find([first, second]).items()} == {first: "one"}
        seen: list[bytes] = []
        read = engine.reply_log._request_id

        def note(file: BinaryIO, place: Location, offset: int, line: bytes) -> str:
            seen.append(line)
            return read(file, place, offset, line)

        monkeypatch.setattr(engine.reply_log, "_request_id", note)
        asyncio.run(log.commit(second, Reply("ok", "two")))
        asyncio.run(ReplyLog(store).commit(first, Reply("ok", "another")))  # by another writer: the first one counts
        found = index.find([first, second])
        assert {name: reply.text for name, reply in found.items()} == {first: "one", second: "two"}
        assert len(seen) == 2

    def test_a_torn_line_is_found_once_it_is_whole(self, store: Store) -> None:
        log = ReplyLog(store)
        asyncio.run(log.commit("0" * 24, Reply("ok", "one")))
        path = store.path(log.key)
        whole = path.read_bytes()
        path.write_bytes(whole + whole[:-9])
        index = ReplyIndex(store)
        assert set(index.find(["0" * 24])) == {"0" * 24}
        path.write_bytes(whole + whole.replace(b"0" * 24, b"1" * 24))
        assert set(index.find(["1" * 24])) == {"1" * 24}

    def test_a_damaged_reply_is_told_with_its_line(self, store: Store) -> None:
        log = ReplyLog(store)
        for number in range(3):
            asyncio.run(log.commit(f"{number:024x}", Reply("ok", "x")))
        path = store.path(log.key)
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(lines[0] + lines[1][:45] + b"\n" + lines[2])
        index = ReplyIndex(store)
        assert set(index.find([f"{2:024x}"])) == {f"{2:024x}"}
        with pytest.raises(StoreError, match=r"line 2: not a reply"):
            index.find([f"{1:024x}"])
