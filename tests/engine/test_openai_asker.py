"""The asker against a server that misbehaves: every request ends with one reply, and the key is nowhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest

from analysis.judges import Reply, Request
from engine.budget import Budget, Estimate, Grant
from engine.endpoints import EndpointConfig
from engine.openai_asker import OpenAIAsker, retry_after_s
from tests.judge_server import Behaviour, JudgeServer, score_of

KEY = "sk-very-secret-0123456789"


def requests(number: int) -> list[Request]:
    return [Request("judge-model", (("user", f"item {i}"),), 1, 0.0, 20, seed=0) for i in range(number)]


async def _soon(seconds: float) -> None:
    """Pauses a hundred times shorter: what they are for is tested apart."""
    await asyncio.sleep(seconds / 100)


def ask(
    server: JudgeServer, wanted: Sequence[Request], *, patient: bool = False, **settings: object
) -> tuple[list[Reply], OpenAIAsker]:
    endpoint = EndpointConfig.model_validate({"base_url": server.url, "api_key_env": None, **settings})

    async def run() -> tuple[list[Reply], OpenAIAsker]:
        asker = OpenAIAsker(endpoint, key=KEY, sleep=asyncio.sleep if patient else _soon)
        try:
            return list(await asyncio.gather(*[asker.ask(request) for request in wanted])), asker
        finally:
            await asker.aclose()

    return asyncio.run(run())


class TestReplies:
    def test_scores_tokens_and_usage_come_through(self) -> None:
        with JudgeServer() as server:
            replies, _ = ask(server, requests(5))
        for request, reply in zip(requests(5), replies, strict=True):
            score = score_of(request.messages[-1][1])
            assert reply.status == "ok"
            assert reply.text == str(score)
            assert reply.top_logprobs is not None
            assert reply.top_logprobs[0][0] == str(score)
            assert (reply.num_prompt_tokens, reply.num_completion_tokens) == (50, 1)

    @pytest.mark.parametrize("trouble", ["no_logprobs", "garbage_logprobs", "empty_logprobs"])
    def test_what_are_no_logprobs_are_none_and_the_text_is_kept(self, trouble: str) -> None:
        with JudgeServer(Behaviour(troubles={trouble: 1.0})) as server:  # type: ignore[dict-item]
            (reply,), asker = ask(server, requests(1))
        assert (reply.status, reply.top_logprobs) == ("ok", None)
        assert reply.text == str(score_of("item 0"))
        assert asker.counts.num_sent == 1  # an answer, if a poor one: asking again would give the same

    @pytest.mark.parametrize("trouble", ["refusal", "content_filter"])
    def test_a_refusal_is_final_and_not_asked_again(self, trouble: str) -> None:
        with JudgeServer(Behaviour(troubles={trouble: 1.0})) as server:  # type: ignore[dict-item]
            (reply,), asker = ask(server, requests(1))
        assert reply.status == "refused"
        assert reply.is_final
        assert reply.error
        assert asker.counts.num_sent == 1

    def test_duplicates_and_odd_digits_are_kept_as_given(self) -> None:
        with JudgeServer(Behaviour(troubles={"duplicates": 1.0})) as server:
            (reply,), _ = ask(server, requests(1))
            assert reply.top_logprobs is not None
            assert [token for token, _ in reply.top_logprobs] == [str(score_of("item 0"))] * 2 + ["I"]
            server.behaviour = Behaviour(troubles={"unicode_digits": 1.0})
            (reply,), _ = ask(server, requests(1))
            assert reply.top_logprobs is not None
            assert reply.top_logprobs[0][0] == "٥"


class TestTroubles:
    @pytest.mark.parametrize("trouble", ["429", "500", "reset", "truncated"])
    def test_passing_trouble_is_tried_again(self, trouble: str) -> None:
        with JudgeServer(Behaviour(troubles={trouble: 0.4}, seed=3)) as server:  # type: ignore[dict-item]
            replies, asker = ask(server, requests(40), max_retries=20)
            assert [reply.status for reply in replies] == ["ok"] * 40
            assert server.seen.troubles[trouble] == asker.counts.num_retries > 0
            well = [count for count in server.seen.answered.values()]
        assert len(well) == 40

    def test_a_hanging_request_is_given_up_and_tried_again(self) -> None:
        with JudgeServer(Behaviour(troubles={"hang": 0.3}, seed=1)) as server:
            replies, asker = ask(server, requests(20), timeout_s=0.4, max_retries=20)
            assert asker.counts.num_timeouts == server.seen.troubles["hang"] > 0
        assert {reply.status for reply in replies} == {"ok"}

    def test_retries_are_bounded(self) -> None:
        with JudgeServer(Behaviour(troubles={"500": 1.0})) as server:
            (reply,), _ = ask(server, requests(1), max_retries=3)
            assert server.seen.num_requests == 4
        assert reply.status == "api_error"
        assert not reply.is_final
        assert "HTTP 500" in (reply.error or "")
        assert "tried 4 times" in (reply.error or "")

    def test_a_server_that_is_still_loading_is_waited_for(self) -> None:
        with JudgeServer(Behaviour(slow_start_s=0.5)) as server:
            replies, _ = ask(server, requests(5), patient=True, max_retries=6)
        assert {reply.status for reply in replies} == {"ok"}

    def test_a_wrong_key_ends_everything_at_once(self) -> None:
        with JudgeServer(Behaviour(key="another")) as server:
            replies, _ = ask(server, requests(200), max_concurrency=4)
            assert server.seen.num_requests <= 4
        assert {reply.status for reply in replies} == {"api_error"}
        assert "HTTP 401" in (replies[0].error or "")

    def test_no_server_is_an_error_that_says_so(self) -> None:
        with JudgeServer() as server:
            url = server.url
        endpoint = EndpointConfig(base_url=url, api_key_env=None, max_retries=1)

        async def run() -> Reply:
            return await OpenAIAsker(endpoint, sleep=_soon).ask(requests(1)[0])

        reply = asyncio.run(run())
        assert reply.status == "api_error"
        assert "connection" in (reply.error or "")

    @pytest.mark.parametrize("behaviour", [Behaviour(key="another"), Behaviour(troubles={"echo_key": 1.0})])
    def test_the_key_is_in_no_reply_though_the_server_repeats_it(self, behaviour: Behaviour) -> None:
        with JudgeServer(behaviour) as server:
            (reply,), asker = ask(server, requests(1))
        assert reply.error
        assert KEY not in reply.to_json()
        assert KEY not in repr(asker.endpoint)


class TestWaiting:
    def test_retry_after_is_honoured(self) -> None:
        """The request comes again no sooner than the server said; that it does come soon is not claimed."""
        with JudgeServer(Behaviour(troubles={"429_retry_after": 1.0}, retry_after_s=0.6)) as server:
            ask(server, requests(1), patient=True, max_retries=1)
            first, second = server.seen.arrivals
        assert second - first >= 0.6

    @pytest.mark.parametrize(
        ("headers", "seconds"),
        [
            ({"retry-after": "2"}, 2.0),
            ({"retry-after": "1.5"}, 1.5),
            ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
            ({"retry-after": "-3"}, 0.0),
            ({"retry-after": "99999999"}, 600.0),
            ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0),
            ({"retry-after": "soon"}, None),
            ({"retry-after": "nan"}, None),
            ({}, None),
        ],
    )
    def test_reading_retry_after(self, headers: dict[str, str], seconds: float | None) -> None:
        assert retry_after_s(headers) == seconds

    def test_reading_a_date(self) -> None:
        from email.utils import formatdate

        seconds = retry_after_s({"retry-after": formatdate(time.time() + 30, usegmt=True)})
        assert seconds is not None
        assert 20 < seconds <= 31  # the date has whole seconds

    def test_requests_under_way_adapt_to_the_server(self) -> None:
        with JudgeServer(Behaviour(most_at_once=4, latency_s=0.02)) as server:
            replies, asker = ask(server, requests(300), max_retries=50)
        assert {reply.status for reply in replies} == {"ok"}
        assert asker.concurrency.num_decreases >= 2
        assert asker.concurrency.limit < 32

    def test_no_more_than_allowed_are_under_way(self) -> None:
        with JudgeServer(Behaviour(latency_s=0.02)) as server:
            ask(server, requests(60), max_concurrency=7)
            assert server.seen.most_at_once <= 7


class _Money:
    """A budget in this process."""

    def __init__(self, endpoint: EndpointConfig) -> None:
        self.budget = Budget(endpoint)

    async def reserve(self, estimates: Sequence[Estimate]) -> list[Grant]:
        return self.budget.reserve(estimates)

    async def settle(self, used: Sequence[tuple[Estimate, int, int]]) -> None:
        self.budget.settle(used)


class TestBudget:
    def test_money_ends(self) -> None:
        """51 tokens a request at 10,000 dollars a million: 0.51 each, so one dollar pays for one and not for three."""
        prices = {"price_per_million_prompt_tokens": 1e4, "price_per_million_completion_tokens": 1e4}
        with JudgeServer() as server:
            endpoint = EndpointConfig.model_validate(
                {"base_url": server.url, "api_key_env": None, "max_dollars": 1.0, "max_concurrency": 1, **prices}
            )
            money = _Money(endpoint)

            async def run() -> list[Reply]:
                asker = OpenAIAsker(endpoint, budget=money, sleep=_soon)
                return [await asker.ask(request) for request in requests(10)]

            replies = asyncio.run(run())
            num_answered = server.seen.num_requests
        statuses = [reply.status for reply in replies]
        assert statuses == ["ok"] * num_answered + ["budget_exhausted"] * (10 - num_answered)
        assert 1 <= num_answered <= 2
        assert money.budget.dollars == pytest.approx(num_answered * 51 * 1e4 / 1e6, abs=1e-12)
        assert money.budget.dollars <= 1.02 + 1e-9  # an estimate may be low by one request's prompt

    def test_requests_per_minute_are_spread(self) -> None:
        now = 0.0
        budget = Budget(EndpointConfig(requests_per_minute=60), clock=lambda: now)
        waits = [grant.wait_s for grant in budget.reserve([Estimate(1, 1)] * 5)]
        assert waits == pytest.approx([0, 0, 1, 2, 3])  # one second's worth at once, then one a second
        now = 100.0
        assert budget.reserve([Estimate(1, 1)])[0].wait_s == 0

    def test_tokens_that_were_not_used_are_given_back(self) -> None:
        budget = Budget(EndpointConfig(tokens_per_minute=600), clock=lambda: 0.0)  # ten a second
        first, second = budget.reserve([Estimate(90, 10), Estimate(90, 10)])
        assert (first.wait_s, second.wait_s) == pytest.approx((0, 9))
        budget.settle([(Estimate(90, 10), 9, 1)])
        assert budget.reserve([Estimate(0, 1)])[0].wait_s == pytest.approx(10)  # 19 without what came back

    def test_limits_of_the_whole_endpoint_hold_with_several_that_ask(self) -> None:
        endpoint = EndpointConfig(requests_per_minute=600)
        budget = Budget(replace_nothing(endpoint), clock=lambda: 0.0)
        waits = [grant.wait_s for _ in range(4) for grant in budget.reserve([Estimate(1, 1)] * 10)]
        assert waits[-1] == pytest.approx((40 - 11) / 10)


def replace_nothing(endpoint: EndpointConfig) -> EndpointConfig:
    """A copy, as an actor would have it."""
    return EndpointConfig.model_validate(endpoint.model_dump())


def test_replies_survive_their_journey_to_disk() -> None:
    with JudgeServer(Behaviour(troubles={"duplicates": 1.0})) as server:
        (reply,), _ = ask(server, requests(1))
    assert Reply.from_json(reply.to_json()) == reply
    assert replace(reply, seconds=None) == Reply.from_json(reply.to_json(timing=False))
