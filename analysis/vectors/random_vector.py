"""``random_like``: the control, a random direction of the same norm as another vector."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Annotated, Any

import torch
from pydantic import Field

from analysis.vectors.base import Making, VectorKind
from analysis.vectors.vector import Vector
from trainables.base_model import ResolvedBase
from trainables.config import Path, VectorName
from trainables.randomness import generator
from trainables.shapes import ModelShape, VectorShape


class RandomVector(VectorKind):
    """A Gaussian vector with, at every layer, the norm of the vector named ``random_like``."""

    random_like: VectorName
    """Name of another vector of the sweep."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Another seed is another direction."""

    def shape(
        self,
        base: ResolvedBase,
        model: ModelShape,
        vectors: Mapping[Path, VectorShape],
        files: Mapping[Path, FilePath],
    ) -> VectorShape:
        del base, model, files
        return vectors["random_like",]

    def identity(self, base: ResolvedBase, name: str) -> dict[str, Any]:
        del base  # which is that of the other vector
        return {"like": self.random_like, "name": name, "seed": self.seed}

    def make(self, making: Making) -> Vector:
        like = making.vector(self.random_like)
        return Vector(random_like(like.values, self.seed, making.name), like.final_row, like.model, like.revision)


def random_like(like: torch.Tensor, seed: int, name: str) -> torch.Tensor:
    """Gaussian directions from (seed, name, layer), each scaled to the norm of ``like``'s row; same shape, float32."""
    rows = []
    for layer, row in enumerate(like):
        noise = torch.randn(row.shape[0], generator=generator("random_like", seed, name, layer), dtype=torch.float64)
        rows.append(noise * (row.double().norm() / noise.norm()))
    return torch.stack(rows).float()
