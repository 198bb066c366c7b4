"""One setting of every training method, for the time of a step with it against one without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch

from trainables.defenses import (
    Ablation,
    ActivationPenalty,
    DefenseConfig,
    GradientEdit,
    GradientPenalty,
    Inoculation,
    Item,
    Pps,
    ProjectionPenalty,
)
from trainables.randomness import generator

NONE = "none"
LAYER = 20
EDIT_GOAL, PENALTY_GOAL = 1.03, 1.10


@dataclass(frozen=True)
class Method:
    """``goal``: at most so many times the step without a defense; None: there is none."""

    defense: tuple[DefenseConfig, ...]
    goal: float | None


def methods(num_layers: int) -> Mapping[str, Method]:
    """By name; strengths are small, so that all trainings go on alike and no step is shorter for having diverged.

    Raises RuntimeError if a kind of defense has no setting here.
    """
    edits = {
        mode: Method((GradientEdit(vector="one", mode=mode),), EDIT_GOAL)
        for mode in ("attenuate", "amplify", "neutralize", "block")
    }
    found = {
        "pps": Method((Pps(vector="one", layer=min(LAYER, num_layers), coefficient=0.1),), 1.02),
        "pps_all_layers": Method((Pps(vector="one", layers="all_but_last", coefficient=0.01),), EDIT_GOAL),
        **edits,
        "ablation": Method((Ablation(vectors=("one", "other")),), None),
        "projection_penalty": Method((ProjectionPenalty(vector="one", strength=1e-4),), PENALTY_GOAL),
        "activation_penalty": Method((ActivationPenalty(mean="one", strength=1e-6),), PENALTY_GOAL),
        "gradient_penalty": Method((GradientPenalty(vector="one", strength=1e-3),), PENALTY_GOAL),
        # longer rows, and nothing else: the time is that of the prompt's tokens
        "inoculation": Method((Inoculation(prompts=("Bring up a bridge.", "Mention a bridge.")),), None),
    }
    kinds = {kind.model_fields["kind"].default for kind in get_args(get_args(Item)[0])}
    missing = kinds - {item.kind for method in found.values() for item in method.defense}
    if missing:
        raise RuntimeError(f"no setting to measure of the kinds {', '.join(sorted(missing))}; give them one here")
    return found


def vectors(num_layers: int, hidden: int) -> dict[str, torch.Tensor]:
    """Two random vectors."""
    return {
        name: torch.randn(num_layers + 1, hidden, generator=generator("benchmark", name)) for name in ("one", "other")
    }
