"""``combine``: arithmetic of named vectors, a weighted sum."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field

from analysis.vectors.base import Making, VectorKind
from analysis.vectors.vector import Vector
from trainables.base_model import ResolvedBase
from trainables.config import Config, Path, VectorName
from trainables.shapes import FinalRow, ModelShape, VectorShape


def _not_zero(weight: float) -> float:
    if weight == 0:
        raise ValueError("a weight of 0 adds nothing; leave the term out")
    return weight


class Term(Config):
    """One vector of a sum."""

    vector: VectorName
    """Name of another vector of the sweep."""
    weight: Annotated[float, AfterValidator(_not_zero)] = 1.0
    """What it is multiplied by; below 0 it is taken away."""


class CombinedVector(VectorKind):
    """A weighted sum of other vectors, row by row at their raw norms."""

    combine: tuple[Term, ...] = Field(min_length=1)
    """The terms: ``[{vector: evil}, {vector: sycophantic, weight: -0.5}]``."""

    def shape(
        self,
        base: ResolvedBase,
        model: ModelShape,
        vectors: Mapping[Path, VectorShape],
        files: Mapping[Path, FilePath],
    ) -> VectorShape:
        del base, files
        return VectorShape(model.num_layers, model.hidden_size, _final_row([one.final_row for one in vectors.values()]))

    def identity(self, base: ResolvedBase, name: str) -> dict[str, Any]:
        del base, name  # the base is that of the terms
        return {"terms": [[vector, weight] for vector, weight in self._weights().items()]}

    def make(self, making: Making) -> Vector:
        weights = self._weights()
        terms = [making.vector(vector) for vector in weights]
        final_row = _final_row([term.final_row for term in terms])
        values = combine([term.values for term in terms], list(weights.values()))
        if final_row == "absent":
            values[-1] = 0
        model, revision = next(((term.model, term.revision) for term in terms if term.model), ("", ""))
        return Vector(values, final_row, model, revision)

    def _weights(self) -> dict[str, float]:
        """Weight by task id, in the order of the ids: the order of the terms has no say."""
        weights: dict[str, float] = {}
        for term in sorted(self.combine, key=lambda term: (term.vector, term.weight)):
            weights[term.vector] = weights.get(term.vector, 0.0) + term.weight
        return weights


def combine(vectors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """sum_i w_i v_i, summed in float64 and rounded once; float32 of the vectors' shape."""
    stacked = torch.stack([vector.double() * weight for vector, weight in zip(vectors, weights, strict=True)])
    return stacked.sum(0).float()


def _final_row(rows: list[FinalRow]) -> FinalRow:
    """That of all terms; where they differ, the last rows are of several spaces and their sum is of none."""
    return rows[0] if len(set(rows)) == 1 else "absent"
