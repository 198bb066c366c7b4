"""Learning rate over steps."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

Schedule: TypeAlias = Literal["linear", "cosine", "constant"]


def num_warmup_steps(warmup_ratio: float, num_steps: int) -> int:
    """floor(ratio * steps): 3 % of 441 steps is 13, of 147 is 4, as in app. E.4 of arXiv 2604.16423."""
    return math.floor(warmup_ratio * num_steps + 1e-9)  # 0.07 * 100 is 7.000000000000001, 0.29 * 100 is 28.999...


def learning_rate_factor(schedule: Schedule, steps_done: int, num_steps: int, warmup_steps: int) -> float:
    """Factor on the peak learning rate for the step after ``steps_done`` steps, in [0, 1].

    Warmup rises linearly from 0, so the very first of w warmup steps has factor 0. Then, with p the share of the
    remaining steps that is done: linear 1 - p, cosine (1 + cos(pi p)) / 2, constant 1.
    """
    if steps_done < warmup_steps:
        return steps_done / warmup_steps
    progress = (steps_done - warmup_steps) / max(1, num_steps - warmup_steps)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return max(0.0, 1.0 - progress)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
