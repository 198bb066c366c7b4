"""``difference``: the mean activation over one data file minus that over another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import Field

from analysis.vectors.activations import mean_response_activation
from analysis.vectors.base import Making, VectorKind
from analysis.vectors.vector import Vector
from trainables.base_model import LoadedBase, ResolvedBase
from trainables.config import ChatFile, Config, recipe_of
from trainables.defenses import Message


class Difference(Config):
    """Two chat JSONL files: the vector is the mean activation of ``positive`` minus that of ``negative``."""

    positive: ChatFile
    """Answers that show what the vector stands for."""
    negative: ChatFile
    """Answers that do not, best to the same questions."""
    max_length: int = Field(default=2048, ge=8)
    """Tokens of a row that are read."""


class DifferenceVector(VectorKind):
    """A vector made from two data files."""

    difference: Difference
    """The two files. The mean is over response tokens within a row, then over rows."""

    @property
    def max_length(self) -> int:
        return self.difference.max_length

    def identity(self, base: ResolvedBase, name: str) -> dict[str, Any]:
        del name
        return {"base": base.identity()} | recipe_of(self.difference)

    def make(self, making: Making) -> Vector:
        given = self.difference
        rows = (making.rows(given.positive), making.rows(given.negative))
        values = difference(making.base, *rows, max_length=given.max_length, progress=making.progress)
        return making.vector_of(values)


def difference(
    base: LoadedBase,
    positive: Sequence[Sequence[Message]],
    negative: Sequence[Sequence[Message]],
    *,
    max_length: int,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Equation 2 of arXiv 2604.16423: mean over on-trait rows of (mean over response tokens of h_l) minus the same
    over the other rows, for every layer; [num_layers + 1, hidden] float32.

    Each row weighs the same however long its response is. Sums are float64. ``progress(done, total)`` counts rows.
    """
    total = len(positive) + len(negative)
    parts, done = [], 0
    for rows in (positive, negative):
        offset = done

        def report(count: int, offset: int = offset) -> None:
            if progress is not None:
                progress(offset + count, total)

        parts.append(mean_response_activation(base, rows, max_length, batch_size, report))
        done += len(rows)
    return (parts[0] - parts[1]).float()
