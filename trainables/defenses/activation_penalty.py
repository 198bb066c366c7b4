"""A penalty on the distance of activations to a fixed mean: strength times the mean of |h - mu|^2.

The activation regularisation of the training-time methods that activation capping is compared with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from pydantic import Field

from trainables.config import VectorName
from trainables.defenses.base import DefenseConfig, Mechanism, Positions, RunRows
from trainables.penalties import Penalty
from trainables.shapes import Layers, ModelShape, VectorShape, chosen_layers, layers_faults, layers_label


class ActivationPenalty(DefenseConfig):
    """Add ``strength`` times the mean of |h - mu|^2 to the loss, mu the vector's row of the layer."""

    kind: Literal["activation_penalty"] = "activation_penalty"
    mean: VectorName
    """Name of one of the sweep's ``vectors``, of kind ``mean`` as a rule: where activations are held."""
    strength: float = Field(gt=0)
    """What the mean squared distance is multiplied with, in nats."""
    layers: Layers = "all_but_last"
    """Where: a list, ``all`` or ``all_but_last``; the mean is over them too."""
    positions: Positions = "response"
    """Over which tokens: ``all``, those of the ``prompt`` or those of the ``response``."""

    def label(self) -> str:
        where = "" if self.layers == "all_but_last" else f" {layers_label(self.layers)}"
        return f"activation penalty {self.mean}{where} x{self.strength:g}"

    def faults(self, model: ModelShape, vectors: Mapping[str, VectorShape]) -> Iterable[tuple[str, str]]:
        for fault in layers_faults(self.layers, model, [vectors.get(self.mean)]):
            yield "layers", fault

    def mechanism(self, vectors: Mapping[str, torch.Tensor]) -> Mechanism:
        layers = chosen_layers(self.layers, vectors[self.mean].shape[0] - 1)
        return _Penalising(self, {layer: vectors[self.mean][layer] for layer in layers})


class _Penalising(Mechanism):
    def __init__(self, config: ActivationPenalty, means: Mapping[int, torch.Tensor]) -> None:
        self.config = config
        self.means = means

    def penalties(self, batch: RunRows) -> Iterable[Penalty]:
        mask = batch.mask(self.config.positions)
        yield Penalty(self.config.label(), tuple(self.means), self.config.strength, mask, self._squared)

    def _squared(self, layer: int, hidden_ntd: torch.Tensor) -> torch.Tensor:
        precise = torch.promote_types(hidden_ntd.dtype, torch.float32)
        mean_d = self.means[layer].to(device=hidden_ntd.device, dtype=precise)
        return (hidden_ntd.to(precise) - mean_d).square().sum(-1)
