"""The kinds of defense. To add one, write its file and list its class in ``Item``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, TypeAlias

from pydantic import Field

from trainables.defenses.ablation import Ablation
from trainables.defenses.activation_penalty import ActivationPenalty
from trainables.defenses.base import DefenseConfig, Mechanism, Message, RunRows, SampleKey
from trainables.defenses.gradient_edit import GradientEdit
from trainables.defenses.gradient_penalty import GradientPenalty
from trainables.defenses.inoculation import Inoculation
from trainables.defenses.pps import Pps
from trainables.defenses.projection_penalty import ProjectionPenalty
from trainables.shapes import ModelShape, VectorShape

Item: TypeAlias = Annotated[
    Pps | Inoculation | GradientEdit | Ablation | ProjectionPenalty | ActivationPenalty | GradientPenalty,
    Field(discriminator="kind"),
]

__all__ = [
    "Ablation",
    "ActivationPenalty",
    "DefenseConfig",
    "GradientEdit",
    "GradientPenalty",
    "Inoculation",
    "Item",
    "Mechanism",
    "Message",
    "Pps",
    "ProjectionPenalty",
    "RunRows",
    "SampleKey",
    "defense_faults",
    "defense_label",
]


def defense_label(items: Sequence[DefenseConfig]) -> str:
    """``none`` for the empty list, else the items' labels joined by `` + ``."""
    return " + ".join(item.label() for item in items) or "none"


def defense_faults(
    items: Sequence[DefenseConfig], model: ModelShape, vectors: Mapping[str, VectorShape]
) -> Iterable[tuple[int, str, str]]:
    """``(index, field, message)`` for every fault of the items, alone and beside each other."""
    for index, item in enumerate(items):
        for name, message in item.faults(model, vectors):
            yield index, name, message
        for earlier in items[:index]:
            if earlier.kind in item.excludes or item.kind in earlier.excludes:
                yield index, "kind", f"{item.kind} cannot stand beside {earlier.kind} in one defense"
