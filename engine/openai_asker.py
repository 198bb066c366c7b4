"""Asking a server that speaks OpenAI's chat protocol: retries, limits, and a status for whatever goes wrong."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

from openai import APIConnectionError, APIError, APIStatusError, APITimeoutError, AsyncOpenAI

from analysis.judges import Reply, Request
from engine.budget import Estimate, Grant, estimate
from engine.concurrency import AdaptiveConcurrency
from engine.endpoints import EndpointConfig

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
LONGEST_RETRY_AFTER_S = 600.0
CONNECTIONS_PER_CLIENT = 8
"""A client looks through all of its connections at every request; several with few of them take less time than one."""
_HIDDEN = "[key]"
_DECLINED = frozenset({"content_filter", "content_policy_violation", "context_length_exceeded"})
_NO_MONEY = frozenset({"insufficient_quota", "billing_hard_limit_reached"})


class Reservations(Protocol):
    """The shared budget, in this process or another."""

    async def reserve(self, estimates: Sequence[Estimate]) -> list[Grant]: ...

    async def settle(self, used: Sequence[tuple[Estimate, int, int]]) -> None: ...


@dataclass
class Counts:
    """What happened, for progress and benchmarks. ``num_sent`` counts attempts."""

    num_sent: int = 0
    num_retries: int = 0
    num_rate_limited: int = 0
    num_timeouts: int = 0


@dataclass(frozen=True)
class _Trouble:
    """Why an attempt gave no reply, and what follows from it."""

    error: str
    again: bool  # trying again may help
    overload: bool = False  # the server has too much to do
    wait_s: float | None = None  # what the server asked for
    declined: bool = False  # it will never answer this request
    closed: bool = False  # it will not answer any request


class OpenAIAsker:
    """Asks one endpoint. Every request ends with exactly one Reply; nothing is raised for what a server does.

    ``max_concurrency``: this asker's share of the endpoint's. ``answers``: runs are asked, not a judge. The key is read
    from the environment here and is in no reply, message or error.
    """

    def __init__(
        self,
        endpoint: EndpointConfig,
        *,
        max_concurrency: int | None = None,
        budget: Reservations | None = None,
        key: str | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        answers: bool = False,
    ) -> None:
        self.endpoint = endpoint
        self.concurrency = AdaptiveConcurrency(max_concurrency or endpoint.max_concurrency)
        self.budget = budget
        self.counts = Counts()
        self.closed: str | None = None  # why nothing can be asked any more
        self._key = key or (os.environ.get(endpoint.api_key_env, "") if endpoint.api_key_env else "")
        self._sleep = sleep
        self._answers = answers
        self._paused_until = 0.0  # on the monotonic clock
        number = math.ceil((max_concurrency or endpoint.max_concurrency) / CONNECTIONS_PER_CLIENT)
        self._clients = [
            AsyncOpenAI(
                api_key=self._key or "none",
                base_url=endpoint.base_url,
                timeout=endpoint.timeout_s,
                max_retries=0,  # ours know the limits, and are counted
            )
            for _ in range(number)
        ]

    async def aclose(self) -> None:
        """Close the connections."""
        for client in self._clients:
            await client.close()

    async def models(self) -> frozenset[str] | None:
        """Names of the models that the server has; None where it does not say, or is not there (which the asking
        itself tries again, and tells)."""
        try:
            async with asyncio.timeout(self.endpoint.timeout_s):
                return frozenset(model.id for model in (await self._clients[0].models.list()).data)
        except (APIError, TimeoutError, ValueError, TypeError, AttributeError):
            return None

    async def ask(self, request: Request) -> Reply:
        """The model's reply, after as many tries as it takes and the endpoint allows."""
        wanted = estimate(request)
        for attempt in range(self.endpoint.max_retries + 1):
            if self.closed is not None:
                return Reply("api_error", error=self.closed)
            async with self.concurrency.slot() as begun_in:
                grant = await self._leave(wanted)
                if grant.wait_s is None:
                    return Reply("budget_exhausted", error=f"max_dollars of {self.endpoint.max_dollars} is spent")
                await self._wait(grant.wait_s)
                if self.closed is not None:
                    await self._settle(wanted, 0, 0)
                    return Reply("api_error", error=self.closed)
                self.counts.num_sent += 1
                outcome = await self._attempt(request)
                overloaded = self.concurrency.ended(
                    begun_in, overload=isinstance(outcome, _Trouble) and outcome.overload
                )
                if isinstance(outcome, Reply):
                    await self._settle(wanted, outcome.num_prompt_tokens, outcome.num_completion_tokens)
                    return outcome
                await self._settle(wanted, 0, 0)
            if outcome.closed:
                self.closed = outcome.error
            if outcome.declined:
                return Reply("refused", error=outcome.error)
            asked_to_wait_s = outcome.wait_s or 0.0
            if overloaded:  # what the server asks of one request it means for all of them
                self._paused_until = max(self._paused_until, time.monotonic() + asked_to_wait_s)
            if not outcome.again or attempt == self.endpoint.max_retries:
                break
            self.counts.num_retries += 1
            await self._sleep(asked_to_wait_s + self._pause(attempt))
        tries = f" (tried {attempt + 1} times)" if attempt else ""
        return Reply("api_error", error=f"{outcome.error}{tries}")

    async def _leave(self, wanted: Estimate) -> Grant:
        return Grant(0.0) if self.budget is None else (await self.budget.reserve([wanted]))[0]

    async def _settle(self, wanted: Estimate, num_prompt_tokens: int | None, num_completion_tokens: int | None) -> None:
        if self.budget is not None:
            prompt = wanted.num_prompt_tokens if num_prompt_tokens is None else num_prompt_tokens
            completion = wanted.num_completion_tokens if num_completion_tokens is None else num_completion_tokens
            await self.budget.settle([(wanted, prompt, completion)])

    async def _wait(self, wait_s: float) -> None:
        """Until the budget and the server's own Retry-After allow a request."""
        if wait_s > 0:
            await self._sleep(wait_s)
        while (left := self._paused_until - time.monotonic()) > 0:
            await self._sleep(left * random.uniform(1.0, 1.1))  # not all at the same instant

    def _pause(self, attempt: int) -> float:
        """Full jitter: a random part of a wait that doubles, so that those who failed together come back apart."""
        return random.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt))

    async def _attempt(self, request: Request) -> Reply | _Trouble:
        begun = time.monotonic()
        arguments: dict[str, Any] = {
            "model": request.model,
            "messages": [{"role": role, "content": content} for role, content in request.messages],
            "max_completion_tokens"
            if self._wants_completion_tokens(request.model)
            else "max_tokens": request.max_tokens,
            "temperature": request.temperature,
        }
        if request.top_logprobs is not None:
            arguments |= {"logprobs": True, "top_logprobs": request.top_logprobs}
        if request.seed is not None:
            arguments["seed"] = request.seed
        if self._answers:
            arguments["top_p"] = 1.0  # nothing but the temperature shapes the distribution
        try:
            async with asyncio.timeout(self.endpoint.timeout_s):  # the client's own is per read, not for the whole
                # not chat.completions.create: checking our plain data against its types takes a seventh of the time
                client = self._clients[self.counts.num_sent % len(self._clients)]
                body = await client.post("/chat/completions", body=arguments, cast_to=object)
            return _reply(body, time.monotonic() - begun, ending=self._answers)
        except (APITimeoutError, TimeoutError):
            self.counts.num_timeouts += 1
            return _Trouble(f"no reply within {self.endpoint.timeout_s:g} s", again=True, overload=True)
        except APIStatusError as error:
            trouble = self._status_trouble(error)
            self.counts.num_rate_limited += error.status_code == 429
            return trouble
        except APIConnectionError as error:
            return _Trouble(self._clean(f"connection: {error.__cause__ or error}"), again=True)
        except APIError as error:
            return _Trouble(self._clean(str(error)), again=True)
        except json.JSONDecodeError as error:  # the client's own word about a body that is cut off
            return _Trouble(f"the reply is not JSON: {error}", again=True)
        except UnreadableReplyError as error:
            return _Trouble(str(error), again=True)

    @staticmethod
    def _wants_completion_tokens(model: str) -> bool:
        """OpenAI's reasoning models refuse max_tokens; other servers may not know its new name."""
        return model.startswith(("o1", "o3", "o4", "gpt-5"))

    def _status_trouble(self, error: APIStatusError) -> _Trouble:
        status = error.status_code
        code = str(getattr(error, "code", None) or "")
        text = self._clean(f"HTTP {status}: {error.message}")
        if code in _DECLINED:
            return _Trouble(text, again=False, declined=True)
        if status in (401, 403):
            return _Trouble(f"{text}; is {self.endpoint.api_key_env} the right key?", again=False, closed=True)
        if code in _NO_MONEY:
            return _Trouble(text, again=False, closed=True)
        wait = retry_after_s(error.response.headers)
        again = status in (408, 409, 425, 429) or status >= 500
        return _Trouble(text, again=again, overload=status in (429, 503, 529), wait_s=wait)

    def _clean(self, text: str) -> str:
        """One line of a server's message without the key, should the server repeat it."""
        line = " ".join(text.split())[:500]
        return line.replace(self._key, _HIDDEN) if self._key else line


class UnreadableReplyError(Exception):
    """A reply that is not what the protocol says."""


def _reply(body: object, seconds: float, *, ending: bool = False) -> Reply:
    """The reply in a response's body (JSON data, or text), with why it ended if ``ending``.

    Raises UnreadableReplyError if it is cut off or of another kind.
    """
    raw: Any = body
    if isinstance(body, str):  # the client gives what it cannot read as JSON as text
        try:
            raw = json.loads(body)
        except ValueError as error:
            raise UnreadableReplyError(f"the reply is not JSON: {error}") from error
    choices = raw.get("choices") if isinstance(raw, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise UnreadableReplyError("the reply has no choice with a message")
    usage = raw.get("usage") if isinstance(raw.get("usage"), dict) else {}
    content, refusal = message.get("content"), message.get("refusal")
    declined = choice.get("finish_reason") == "content_filter" or isinstance(refusal, str)
    return Reply(
        status="refused" if declined else "ok",
        text=content if isinstance(content, str) else None,
        top_logprobs=_top_logprobs(choice.get("logprobs")),
        error=(refusal if isinstance(refusal, str) else "content filter") if declined else None,
        num_prompt_tokens=_count(usage, "prompt_tokens"),
        num_completion_tokens=_count(usage, "completion_tokens"),
        seconds=round(seconds, 4),
        finish_reason=_word(choice.get("finish_reason")) if ending else None,
    )


def _word(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _count(usage: Mapping[str, Any], name: str) -> int | None:
    value = usage.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _top_logprobs(raw: object) -> tuple[tuple[str, float], ...] | None:
    """(token, logprob) of the first token, as given; None where there are none or they are not what they should be."""
    content = raw.get("content") if isinstance(raw, dict) else None
    first = content[0] if isinstance(content, list) and content else None
    top = first.get("top_logprobs") if isinstance(first, dict) else None
    if not isinstance(top, list):
        return None
    pairs = []
    for item in top:
        token, value = (item.get("token"), item.get("logprob")) if isinstance(item, dict) else (None, None)
        if not isinstance(token, str) or isinstance(value, bool) or not isinstance(value, int | float):
            return None
        pairs.append((token, float(value)))
    return tuple(pairs)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: ``retry-after-ms``, or ``retry-after`` as a number or an HTTP date.

    None where it asks for nothing that can be read; never more than ``LONGEST_RETRY_AFTER_S``.
    """
    milliseconds, value = headers.get("retry-after-ms"), headers.get("retry-after")
    seconds: float | None = None
    try:
        if milliseconds is not None:
            seconds = float(milliseconds) / 1000
        elif value is not None:
            seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value or "").timestamp() - time.time()
        except ValueError:
            return None
    if seconds is None or not math.isfinite(seconds):
        return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S)
