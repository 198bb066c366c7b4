"""One budget for all who ask an endpoint: requests and tokens per minute, dollars."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from analysis.judges import Request
from engine.endpoints import EndpointConfig

CHARACTERS_PER_TOKEN = 3.0  # fewer than in usual English text: an estimate that is too high is given back
BURST_S = 1.0
"""What a second allows may go out at once: a server's own limits are kept over shorter times than a minute, too."""


@dataclass(frozen=True)
class Estimate:
    """What a request will take: completion tokens at most as many as it allows, prompt tokens by its length."""

    num_prompt_tokens: int
    num_completion_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_completion_tokens


def estimate(request: Request) -> Estimate:
    """What a request takes at most, by the length of its text."""
    characters = sum(len(content) for _, content in request.messages)
    return Estimate(math.ceil(characters / CHARACTERS_PER_TOKEN) + 8 * len(request.messages), request.max_tokens)


@dataclass(frozen=True)
class Grant:
    """Leave for one request: begin it ``wait_s`` from now, or not at all (``wait_s`` None: the money is spent)."""

    wait_s: float | None


class _Rate:
    """``per_minute`` units a minute as a line of reservations (the generic cell rate algorithm with a burst).

    ``ready_at`` is when the units reserved so far would be through at the allowed rate; a reservation may begin
    ``BURST_S`` before that. So over any time T at most per_minute * (T + BURST_S) / 60 units begin, plus one request.
    """

    def __init__(self, per_minute: float | None) -> None:
        self.seconds_per_unit = 0.0 if per_minute is None else 60.0 / per_minute
        self.ready_at = -math.inf

    def reserve(self, now: float, units: float) -> float:
        """Seconds from ``now`` at which these units may begin."""
        begin = max(now, self.ready_at - BURST_S)
        self.ready_at = max(now, self.ready_at) + units * self.seconds_per_unit
        return begin - now

    def give_back(self, units: float) -> None:
        """Reserved units that were not used (negative: more were)."""
        self.ready_at -= units * self.seconds_per_unit


class Budget:
    """Reservations for one endpoint. Not thread-safe; ``clock`` gives monotonic seconds."""

    def __init__(self, endpoint: EndpointConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.endpoint = endpoint
        self.clock = clock
        self.requests = _Rate(endpoint.requests_per_minute)
        self.tokens = _Rate(endpoint.tokens_per_minute)
        self.dollars = 0.0  # spent and reserved

    @staticmethod
    def limits(endpoint: EndpointConfig) -> bool:
        """Whether there is anything to keep count of."""
        limits = (endpoint.requests_per_minute, endpoint.tokens_per_minute, endpoint.max_dollars)
        return any(limit is not None for limit in limits)

    def reserve(self, estimates: Sequence[Estimate]) -> list[Grant]:
        """Leave for each of these requests, in order."""
        now = self.clock()
        return [self._reserve(now, estimate) for estimate in estimates]

    def settle(self, used: Sequence[tuple[Estimate, int, int]]) -> None:
        """Requests that ended: their estimate, and the prompt and completion tokens that they really took."""
        for estimate, num_prompt_tokens, num_completion_tokens in used:
            self.tokens.give_back(estimate.num_tokens - num_prompt_tokens - num_completion_tokens)
            self.dollars += self._dollars(num_prompt_tokens, num_completion_tokens) - self._estimated(estimate)

    def _reserve(self, now: float, estimate: Estimate) -> Grant:
        cost = self._estimated(estimate)
        most = self.endpoint.max_dollars
        if most is not None and self.dollars + cost > most:
            return Grant(None)
        self.dollars += cost
        return Grant(max(self.requests.reserve(now, 1), self.tokens.reserve(now, estimate.num_tokens)))

    def _estimated(self, estimate: Estimate) -> float:
        return self._dollars(estimate.num_prompt_tokens, estimate.num_completion_tokens)

    def _dollars(self, num_prompt_tokens: int, num_completion_tokens: int) -> float:
        return self.endpoint.price(num_prompt_tokens, num_completion_tokens) or 0.0
