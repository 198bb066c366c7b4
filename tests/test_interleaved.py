"""The timing of the benchmarks: loops that take turns, and what is said of their ratios."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch

from trainables.defenses import DefenseConfig, Pps, defense_faults
from trainables.shapes import ModelShape, VectorShape

ROOT = Path(__file__).resolve().parent.parent

MODEL = ModelShape(4, 8, 100)
SHAPES = {name: VectorShape(4, 8, "pre_norm") for name in ("one", "other")}


class _Unmeasured(DefenseConfig):
    kind: Literal["unmeasured"] = "unmeasured"


@pytest.fixture
def interleaved(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module as the scripts in benchmarks/ import it: from beside them."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("interleaved")


def loop(name: str, seen: list[str], num_steps: int) -> Any:
    def work(pause: Any) -> None:
        seen.append(f"{name} begins")
        pause()
        for step in range(num_steps):
            seen.append(f"{name}{step}")
            pause()
        seen.append(f"{name} ends")

    return work


def test_loops_take_turns_and_the_order_turns(interleaved: Any) -> None:
    seen: list[str] = []
    steppers = [interleaved.Stepper(name, loop(name, seen, 3)) for name in "ab"]
    assert seen == ["a begins", "b begins"]
    ticks = iter(range(100))
    seconds = interleaved.interleave(steppers, 2, lambda: float(next(ticks)), num_warmup=1)
    assert seen[2:] == ["b0", "a0", "a1", "b1", "b2", "a2", "a ends", "b ends"]
    assert seconds == {"a": [1.0, 1.0], "b": [1.0, 1.0]}, "the warm-up is not in it"


def test_what_a_loop_raises_is_raised_where_it_is_waited_for(interleaved: Any) -> None:
    def fails_at_once(_: Any) -> None:
        raise ValueError("at once")

    def fails_later(pause: Any) -> None:
        pause()
        raise ValueError("later")

    with pytest.raises(ValueError, match="at once"):
        interleaved.Stepper("x", fails_at_once)
    stepper = interleaved.Stepper("x", fails_later)
    with pytest.raises(ValueError, match="later"):
        stepper.step()


def test_the_interval_is_that_of_the_order_statistics(interleaved: Any) -> None:
    """Of 20 pairs the 6th smallest and the 6th largest: the median lies between them with 95.9 % probability."""
    ours = [float(number) for number in (7, 3, 20, 1, 14, 9, 2, 18, 11, 5, 16, 4, 13, 8, 19, 6, 12, 10, 17, 15)]
    ratio = interleaved.Ratio.of("x", ours, [2.0] * 20)
    assert (ratio.median, ratio.low, ratio.high, ratio.num_pairs) == (5.25, 3.0, 7.5, 20)
    few = interleaved.Ratio.of("x", [1.0] * 5, [1.0] * 5)
    assert (few.low, few.high) == (0.0, math.inf), "five pairs have no 95 % interval"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.7, 0.8, "goal met"), (0.7, 0.81, "not resolved at n = 20"), (0.81, 0.9, "goal missed")],
)
def test_a_goal_is_met_if_the_interval_says_so(interleaved: Any, low: float, high: float, verdict: str) -> None:
    ratio = interleaved.Ratio("x", (low + high) / 2, low, high, 20)
    assert ratio.verdict(0.8) == verdict
    assert ratio.line(0.8).endswith(f"goal <= 0.8: {verdict}")
    assert "goal" not in ratio.line()


def test_the_clock_of_a_cpu_counts_work_alone(interleaved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = interleaved.Clock(torch.device("cpu"))
    monkeypatch.setattr("time.process_time", lambda: 12.5)
    assert clock() == 12.5
    assert clock.name == "CPU time"


def test_every_kind_of_defense_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    methods = importlib.import_module("methods")
    found = methods.methods(4)
    both = methods.vectors(4, 8)
    assert all(item.mechanism(both) for method in found.values() for item in method.defense)
    assert not [fault for method in found.values() for fault in defense_faults(method.defense, MODEL, SHAPES)]
    monkeypatch.setattr(methods, "Item", Annotated[Pps | _Unmeasured, "as the real one is written"])
    with pytest.raises(RuntimeError, match="of the kinds unmeasured"):
        methods.methods(4)
