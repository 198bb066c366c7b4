"""A penalty on the projection of activations on a vector: strength times the mean of <h, a>^2, a the unit vector.

The auxiliary loss of the training-time methods that activation capping is compared with.
"""

from __future__ import annotations

from typing import Literal

import torch

from trainables.config import VectorName
from trainables.defenses.penalty import PenaltyConfig


class ProjectionPenalty(PenaltyConfig):
    """Add ``strength`` times the mean of <h, a>^2 to the loss, a the direction of the vector's row of the layer."""

    kind: Literal["projection_penalty"] = "projection_penalty"
    vector: VectorName
    """Name of one of the sweep's ``vectors``; its length has no say."""

    def vector_name(self) -> str:
        return self.vector

    def value(self, read_ntd: torch.Tensor, row_d: torch.Tensor) -> torch.Tensor:
        return (read_ntd @ row_d).square()
