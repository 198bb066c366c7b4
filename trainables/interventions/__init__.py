"""What may be present while a model answers. To add a kind, write its file and list its class in ``Intervention``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, TypeAlias

from pydantic import Field

from trainables.config import Path
from trainables.interventions.base import Bound, InterventionConfig, Reference
from trainables.interventions.capping import Capping
from trainables.interventions.steering import InferenceSteering
from trainables.shapes import ModelShape, VectorShape

NONE = "none"

InterventionItem: TypeAlias = Annotated[InferenceSteering | Capping, Field(discriminator="kind")]


Interventions: TypeAlias = tuple[InterventionItem, ...]

__all__ = [
    "NONE",
    "Bound",
    "Capping",
    "InferenceSteering",
    "InterventionConfig",
    "InterventionItem",
    "Interventions",
    "Reference",
    "interventions_faults",
    "interventions_label",
]


def interventions_label(items: Sequence[InterventionConfig]) -> str:
    """``none`` for the empty list, else the items' labels joined by `` + ``."""
    return " + ".join(item.label() for item in items) or NONE


def interventions_faults(
    items: Sequence[InterventionConfig], model: ModelShape, vectors: Mapping[str, VectorShape]
) -> Iterable[tuple[Path, str]]:
    """``(path, message)`` for every fault of the items; paths begin with the item's number."""
    for index, item in enumerate(items):
        for path, message in item.faults(model, vectors):
            yield (index, *path), message
