"""``steering``: a vector is added while the model answers, such as an attack that pushes it towards a trait."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch

from trainables.config import Path, VectorName
from trainables.interventions.base import InterventionConfig, Projections
from trainables.residual_stream import Add, ValueIntervention
from trainables.shapes import Layers, ModelShape, VectorShape, chosen_layers, layers_faults, layers_label


class InferenceSteering(InterventionConfig):
    """Add ``coefficient`` times a vector's rows to the outputs of layers, at every token."""

    kind: Literal["steering"] = "steering"
    vector: VectorName
    """Name of one of the sweep's ``vectors``, which is used at its raw norm."""
    layers: Layers
    """Where it is added, at every layer its own row: a list, ``all`` or ``all_but_last``."""
    coefficient: float
    """How much of it. Below 0 it is taken away."""

    def label(self) -> str:
        return f"steer {self.vector} {layers_label(self.layers)} x{self.coefficient:g}"

    def faults(self, model: ModelShape, vectors: Mapping[str, VectorShape]) -> Iterable[tuple[Path, str]]:
        for message in layers_faults(self.layers, model, [vectors.get(self.vector)]):
            yield ("layers",), message
        if self.coefficient == 0:
            yield ("coefficient",), "0 adds nothing; leave the item out"

    def at_work(self, vectors: Mapping[str, torch.Tensor], projections: Projections) -> list[ValueIntervention]:
        del projections
        vector = vectors[self.vector]
        layers = chosen_layers(self.layers, len(vector) - 1)
        return [Add(layer=layer, vector=self.coefficient * vector[layer]) for layer in layers]
