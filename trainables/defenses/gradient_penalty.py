"""A penalty on gradients that would move activations along a vector: strength times the mean of max(0, -<g, v>)^2.

g = dL/dh is the gradient of the summed next-token loss, v the unit vector. Descent moves h by -g, so a negative
<g, v> is pressure to raise the projection. A parameter sees the derivative of this, which is of second order. To change
the gradient itself is another thing, see ``gradient_edit`` with ``mode: block``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from pydantic import Field

from trainables.config import VectorName
from trainables.defenses.base import DefenseConfig, Mechanism, Positions, RunRows, direction_at
from trainables.penalties import Penalty
from trainables.shapes import Layers, ModelShape, VectorShape, chosen_layers, layers_faults, layers_label


class GradientPenalty(DefenseConfig):
    """Add ``strength`` times the mean of max(0, -<g, v>)^2 to the loss: the contrastive gradient penalty, of second
    order. It takes several times the time and memory of a usual step: attention is eager, and no operation of
    shiftgrad's own is used."""

    excludes = frozenset({"gradient_edit"})
    is_second_order = True

    kind: Literal["gradient_penalty"] = "gradient_penalty"
    vector: VectorName
    """Name of one of the sweep's ``vectors``: the direction that descent should not move along. Its length has no
    say."""
    strength: float = Field(gt=0)
    """What the mean squared pressure is multiplied with, in nats; g is of the summed loss, in nats per unit of h."""
    layers: Layers = "all_but_last"
    """Where: a list, ``all`` or ``all_but_last``; the mean is over them too."""
    positions: Positions = "response"
    """Over which tokens: ``all``, those of the ``prompt`` or those of the ``response``."""

    def label(self) -> str:
        where = "" if self.layers == "all_but_last" else f" {layers_label(self.layers)}"
        return f"gradient penalty {self.vector}{where} x{self.strength:g}"

    def faults(self, model: ModelShape, vectors: Mapping[str, VectorShape]) -> Iterable[tuple[str, str]]:
        for fault in layers_faults(self.layers, model, [vectors.get(self.vector)]):
            yield "layers", fault

    def mechanism(self, vectors: Mapping[str, torch.Tensor]) -> Mechanism:
        layers = chosen_layers(self.layers, vectors[self.vector].shape[0] - 1)
        return _Penalising(self, {layer: direction_at(vectors, self.vector, layer) for layer in layers})


class _Penalising(Mechanism):
    def __init__(self, config: GradientPenalty, directions: Mapping[int, torch.Tensor]) -> None:
        self.config = config
        self.directions = directions

    @property
    def is_second_order(self) -> bool:
        return True

    def penalties(self, batch: RunRows) -> Iterable[Penalty]:
        mask = batch.mask(self.config.positions)
        layers = tuple(self.directions)
        yield Penalty(self.config.label(), layers, self.config.strength, mask, self._pressure, of_gradient=True)

    def _pressure(self, layer: int, gradient_ntd: torch.Tensor) -> torch.Tensor:
        precise = torch.promote_types(gradient_ntd.dtype, torch.float32)
        direction_d = self.directions[layer].to(device=gradient_ntd.device, dtype=precise)
        return (gradient_ntd.to(precise) @ direction_d).clamp(max=0.0).square()
