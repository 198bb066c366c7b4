"""``mean``: the mean activation over one data file, where activations are held by a penalty on their distance."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from analysis.vectors.activations import mean_response_activation
from analysis.vectors.base import Making, VectorKind
from analysis.vectors.vector import Vector
from trainables.base_model import ResolvedBase
from trainables.config import ChatFile, Config, recipe_of


class Mean(Config):
    """A chat JSONL file: the vector is its mean activation, a place and no direction."""

    data: ChatFile
    """Answers whose activations are taken."""
    max_length: int = Field(default=2048, ge=8)
    """Tokens of a row that are read."""


class MeanVector(VectorKind):
    """The mean activation of a data file, for ``kind: activation_penalty``."""

    mean: Mean
    """The file. The mean is over response tokens within a row, then over rows."""

    @property
    def max_length(self) -> int:
        return self.mean.max_length

    def identity(self, base: ResolvedBase, name: str) -> dict[str, Any]:
        del name
        return {"base": base.identity()} | recipe_of(self.mean)

    def make(self, making: Making) -> Vector:
        rows = making.rows(self.mean.data)

        def report(done: int) -> None:
            making.progress(done, len(rows))

        return making.vector_of(mean_response_activation(making.base, rows, self.mean.max_length, 8, report).float())
