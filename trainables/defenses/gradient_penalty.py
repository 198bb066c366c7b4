"""A penalty on gradients that would move activations along a vector: strength times the mean of max(0, -<g, v>)^2.

g = dL/dh is the gradient of the summed next-token loss, v the unit vector. Descent moves h by -g, so a negative
<g, v> is pressure to raise the projection. A parameter sees the derivative of this, which is of second order. To change
the gradient itself is another thing, see ``gradient_edit`` with ``mode: block``.
"""

from __future__ import annotations

from typing import Literal

import torch

from trainables.config import VectorName
from trainables.defenses.penalty import PenaltyConfig


class GradientPenalty(PenaltyConfig):
    """Add ``strength`` times the mean of max(0, -<g, v>)^2 to the loss: the contrastive gradient penalty, of second
    order; g is of the summed loss, in nats per unit of h. It takes several times the time and memory of a usual step:
    attention is eager, and no operation of shiftgrad's own is used."""

    excludes = frozenset({"gradient_edit"})
    is_second_order = True

    kind: Literal["gradient_penalty"] = "gradient_penalty"
    vector: VectorName
    """Name of one of the sweep's ``vectors``: the direction that descent should not move along. Its length has no
    say."""

    def vector_name(self) -> str:
        return self.vector

    def value(self, read_ntd: torch.Tensor, row_d: torch.Tensor) -> torch.Tensor:
        return (read_ntd @ row_d).clamp(max=0.0).square()
