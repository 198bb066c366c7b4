"""Two pieces of work timed in turn, so that whatever else the machine does falls on both alike.

A ratio of two times is taken pair by pair; what is reported is the median of the ratios with its 95 % interval from
order statistics, which assumes nothing about how the ratios are distributed.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import quantile_test


class Clock:
    """Seconds of this process: CPU time on a CPU, wall time after everything has been computed on a GPU.

    CPU time of one thread does not count what other processes take of the machine; they still slow down caches and
    memory, which is why times are taken in pairs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = "wall time, after synchronize" if device.type == "cuda" else "CPU time"

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()


class Stepper:
    """A loop in a thread of its own that stands still between its steps, so that several loops can be interleaved.

    ``work`` is called with a function ``pause`` that it must call before its first step and after every step (also
    after the last). ``step`` lets it do one. Only one stepper runs at a time. What ``work`` raises, ``step`` raises.
    """

    def __init__(self, name: str, work: Callable[[Callable[[], None]], Any]) -> None:
        self.name = name
        self._go, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        self._wait()  # for what comes before the first step

    def step(self) -> None:
        """Go on to the next pause."""
        self._go.release()
        self._wait()

    def finish(self) -> None:
        """Let the loop end; it must have done all of its steps."""
        self._go.release()
        self._thread.join()
        self._raise()

    def _wait(self) -> None:
        self._stands.acquire()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _pause(self) -> None:
        self._stands.release()
        self._go.acquire()

    def _run(self) -> None:
        try:
            self._work(self._pause)
        except BaseException as error:  # noqa: BLE001 - it is raised again in the thread that waits
            self._error = error
        self._stands.release()


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios with its 95 % interval; a goal is met if the whole interval is below it."""

    name: str
    median: float
    low: float
    high: float
    num_pairs: int

    @classmethod
    def of(cls, name: str, ours: Sequence[float], reference: Sequence[float]) -> Ratio:
        """Of ``ours[i] / reference[i]``. Fewer than six pairs have no 95 % interval: it is then infinite."""
        ratios = [one / other for one, other in zip(ours, reference, strict=True)]
        interval = quantile_test(ratios, q=0, p=0.5).confidence_interval(0.95)
        low = 0.0 if math.isnan(interval.low) else float(interval.low)
        high = math.inf if math.isnan(interval.high) else float(interval.high)
        return cls(name, statistics.median(ratios), low, high, len(ratios))

    def verdict(self, goal: float) -> str:
        if self.high <= goal:
            return "goal met"
        return "goal missed" if self.low > goal else f"not resolved at n = {self.num_pairs}"

    def line(self, goal: float | None = None) -> str:
        text = f"{self.name:<30}{self.median:7.3f}   95 % interval {self.low:.3f} to {self.high:.3f}"
        return text if goal is None else f"{text}   goal <= {goal:g}: {self.verdict(goal)}"


def interleave(steppers: Sequence[Stepper], num_rounds: int, clock: Clock, num_warmup: int = 2) -> Mapping[str, Any]:
    """Seconds of every step by stepper; every round lets each do one step, the order turning by one per round."""
    seconds: dict[str, list[float]] = {stepper.name: [] for stepper in steppers}
    for number in range(-num_warmup, num_rounds):
        turn = number % len(steppers)
        for stepper in (*steppers[turn:], *steppers[:turn]):
            started = clock()
            stepper.step()
            taken = clock() - started
            if number >= 0:
                seconds[stepper.name].append(taken)
    for stepper in steppers:
        stepper.finish()
    return seconds
