"""Learning rates against transformers' own schedulers, step by step."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from trainables.schedule import Schedule, learning_rate_factor, num_warmup_steps

NAMES_THERE: dict[Schedule, str] = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant_with_warmup",
}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("num_steps", "warmup_steps"), [(1, 0), (10, 0), (10, 3), (7, 6), (100, 3)])
def test_factor_equals_transformers(schedule: Schedule, num_steps: int, warmup_steps: int) -> None:
    """1e-15: two orders of the same few float64 operations."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(NAMES_THERE[schedule], optimizer, warmup_steps, num_steps)
    for step in range(num_steps):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate_factor(schedule, step, num_steps, warmup_steps) == pytest.approx(expected, abs=1e-15)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    ("ratio", "num_steps", "expected"),
    [(0.03, 441, 13), (0.03, 147, 4), (0.0, 10, 0), (0.29, 100, 29), (0.07, 100, 7), (0.1, 9, 0), (0.5, 3, 1)],
)
def test_warmup_steps_are_rounded_down(ratio: float, num_steps: int, expected: int) -> None:
    assert num_warmup_steps(ratio, num_steps) == expected


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_factor_stays_between_0_and_1_even_after_the_end(schedule: Schedule) -> None:
    factors = [learning_rate_factor(schedule, step, 10, 2) for step in range(20)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert max(factors) == 1
    assert factors[0] == 0
