"""Edits of the activation gradient along a vector, in the backward pass (app. E.2 of arXiv 2604.16423).

With g = dL/dh at a token, v the vector's direction, s = <g, v> and p = s v: attenuate g - p + |s| v, amplify
g - p - |s| v, neutralize g - p. Descent subtracts the gradient, so a negative s is pressure to raise <h, v>.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch

from trainables.config import VectorName
from trainables.defenses.base import DefenseConfig, Mechanism, Positions, RunRows, direction_at
from trainables.residual_stream import EditGradient, GradientMode, Intervention
from trainables.shapes import Layers, ModelShape, VectorShape, chosen_layers, layers_faults, layers_label


class GradientEdit(DefenseConfig):
    """Change the gradient along a vector, per token, at the outputs of layers; what is left flows on to the layers
    below. Values of the forward pass stay as they are."""

    kind: Literal["gradient_edit"] = "gradient_edit"
    vector: VectorName
    """Name of one of the sweep's ``vectors``. At every layer its own row gives the direction; lengths have no say."""
    mode: GradientMode
    """``attenuate``: turn what would raise the projection on the vector into what lowers it; ``amplify``: the
    opposite; ``neutralize``: take the component along the vector out; ``block``: take it out only where it would raise
    the projection (the first-order form of a contrastive gradient penalty). Tokens on the right side keep their
    gradient to the bit."""
    layers: Layers = "all_but_last"
    """Where: a list, ``all`` or ``all_but_last``."""
    positions: Positions = "all"
    """At which tokens: ``all``, those of the ``prompt`` or those of the ``response``."""

    def label(self) -> str:
        where = "" if self.layers == "all_but_last" else f" {layers_label(self.layers)}"
        tokens = "" if self.positions == "all" else f" {self.positions}"
        return f"{self.mode} {self.vector}{where}{tokens}"

    def faults(self, model: ModelShape, vectors: Mapping[str, VectorShape]) -> Iterable[tuple[str, str]]:
        for fault in layers_faults(self.layers, model, [vectors.get(self.vector)]):
            yield "layers", fault

    def mechanism(self, vectors: Mapping[str, torch.Tensor]) -> Mechanism:
        num_layers = vectors[self.vector].shape[0] - 1
        layers = chosen_layers(self.layers, num_layers)
        directions = {layer: direction_at(vectors, self.vector, layer) for layer in layers}
        return _Editing(self.mode, directions, self.positions)


class _Editing(Mechanism):
    def __init__(self, mode: GradientMode, directions: Mapping[int, torch.Tensor], positions: Positions) -> None:
        self.mode = mode
        self.directions = directions
        self.positions = positions

    def interventions(self, batch: RunRows) -> Iterable[Intervention]:
        mask = None if self.positions == "all" else batch.mask(self.positions)
        for layer, direction_d in self.directions.items():
            yield EditGradient(layer, direction_d, self.mode, rows=batch.rows, token_mask=mask)
