"""How many requests are under way at a time: more while the server keeps up, half as many when it does not."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

OVERLOAD_SHARE = 0.5
"""Share of recent requests that the server could not take from which on it counts as overloaded. A server that turns
away one in four whatever comes is not: halving again and again would slow everything down and help nothing."""
_FEWEST_RECENT = 16


class AdaptiveConcurrency:
    """Additive increase, multiplicative decrease of the number of requests under way, as TCP does with its window.

    It begins at ``most``, because a judge's server usually takes it. Every success adds 1 / limit: one more for every
    round of ``limit`` requests. When, of the last ``limit`` outcomes, ``OVERLOAD_SHARE`` say that the server had too
    much to do, the limit is halved, and the count begins anew: 64 refusals of one burst are one sign, not 64.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = float(most)
        self.under_way = 0
        self.num_decreases = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._recent: deque[bool] = deque()  # True: too much to do
        self._round = 0  # raised by every decrease

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[int]:
        """Wait for a place; gives the round in which the request begins, for ``ended``."""
        await self._enter()
        try:
            yield self._round
        finally:
            self.under_way -= 1
            self._wake()

    def ended(self, begun_in: int, *, overload: bool) -> bool:
        """Note how a request ended that began in this round; True if the server counts as overloaded now.

        What began before the last decrease was sent at the old limit and says nothing about the new one.
        """
        if begun_in != self._round:
            return overload
        if not overload:
            self.limit = min(float(self.most), self.limit + 1.0 / self.limit)
            self._wake()
        num_recent = max(_FEWEST_RECENT, int(self.limit))
        self._recent.append(overload)
        while len(self._recent) > num_recent:
            self._recent.popleft()
        if not overload or sum(self._recent) < OVERLOAD_SHARE * num_recent:
            return False
        self.limit = max(1.0, self.limit / 2)
        self._recent.clear()
        self._round += 1
        self.num_decreases += 1
        return True

    async def _enter(self) -> None:
        if not self._waiting and self.under_way < int(self.limit):
            self.under_way += 1
            return
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # it had been let in already
                self.under_way -= 1
                self._wake()
            raise

    def _wake(self) -> None:
        while self._waiting and self.under_way < int(self.limit):
            place = self._waiting.popleft()
            if not place.done():
                self.under_way += 1
                place.set_result(None)
