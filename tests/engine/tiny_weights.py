"""The tiny sweep with steering in weight space."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from tests.engine.tiny_prepare import TinySweep

STEERING: dict[str, Any] = {
    "finetuned": "tuned",
    "piles": {"with": {"trait": True}, "without": {"trait": False}},
    "gradient": {"answers_per_shard": 3},
    "directions": {
        "plain": {"of": "with", "minus": "without"},
        "weighed": {"of": "with", "minus": "without", "weigh_by_delta": 97, "keep_norm": True},
        "small": {"of": "with", "minus": "without", "rank": 1, "modules": ["q_proj", "down_proj"]},
    },
    "edits": [
        {"directions": ["plain"], "alphas": [-0.5, 0.5], "on": ["finetuned", "base"]},
        {"directions": ["weighed", "small"], "alphas": [0.5]},
    ],
}


def steered(folder: Path, model: Path) -> TinySweep:
    """The tiny sweep with two runs and the section, without measurements or vectors."""
    sweep = TinySweep(folder, model)
    sweep.raw["runs"] = [{"label": "tuned", "defense": "none"}, {"label": "other", "defense": "none", "seed": 1}]
    sweep.raw["weight_steering"] = copy.deepcopy(STEERING)
    sweep.replace("traits/topic/trait.yaml", "[aeiou]", "e")
    return sweep
