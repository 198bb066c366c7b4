"""A penalty on the distance of activations to a fixed mean: strength times the mean of |h - mu|^2.

The activation regularisation of the training-time methods that activation capping is compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from trainables.config import VectorName
from trainables.defenses.penalty import PenaltyConfig


class ActivationPenalty(PenaltyConfig):
    """Add ``strength`` times the mean of |h - mu|^2 to the loss, mu the vector's row of the layer."""

    kind: Literal["activation_penalty"] = "activation_penalty"
    mean: VectorName
    """Name of one of the sweep's ``vectors``, of kind ``mean`` as a rule: where activations are held."""

    def vector_name(self) -> str:
        return self.mean

    def row(self, vectors: Mapping[str, torch.Tensor], layer: int) -> torch.Tensor:
        return vectors[self.mean][layer]

    def value(self, read_ntd: torch.Tensor, row_d: torch.Tensor) -> torch.Tensor:
        return (read_ntd - row_d).square().sum(-1)
