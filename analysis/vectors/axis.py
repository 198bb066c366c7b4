"""Axes between two files of answers, estimated otherwise than by the mean difference: see ``analysis.axes``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import Field

from analysis.axes import Estimator, layer_axes
from analysis.vectors.activations import response_activations
from analysis.vectors.base import Making, VectorKind
from analysis.vectors.vector import Vector
from trainables.base_model import ResolvedBase
from trainables.config import ChatFile, Config, Path, recipe_of
from trainables.defenses import Message
from trainables.errors import Fault


class TwoSets(Config):
    """Two chat JSONL files, whose answers are two sets of activations."""

    positive: ChatFile
    """Answers that show what the axis stands for."""
    negative: ChatFile
    """Answers that do not, best to the same questions."""
    max_length: int = Field(default=2048, ge=8)
    """Tokens of a row that are read."""


class AxisVector(VectorKind):
    """Base class of the axes: a row is the mean activation over its response tokens; per layer the estimator finds a
    direction, whose length is the distance of the two sets' means along it."""

    def sets(self) -> TwoSets:
        """The two files."""
        raise NotImplementedError

    def estimator(self) -> Estimator:
        """How the direction is found."""
        raise NotImplementedError

    @property
    def max_length(self) -> int:
        return self.sets().max_length

    def chat_faults(self, rows: Mapping[Path, Sequence[Sequence[Message]]]) -> Iterable[Fault]:
        key = self.key()
        positive, negative = rows[key, "positive"], rows[key, "negative"]
        if sorted(map(repr, positive)) == sorted(map(repr, negative)):
            yield Fault(f"{key}.negative", "holds the same rows as positive; an axis needs two classes of answers")

    def identity(self, base: ResolvedBase, name: str) -> dict[str, Any]:
        del name
        return {"base": base.identity()} | recipe_of(self.sets())

    def make(self, making: Making) -> Vector:
        sets = self.sets()
        both = [making.rows(content) for content in (sets.positive, sets.negative)]
        total, read = sum(map(len, both)), []
        for before, rows in zip((0, len(both[0])), both, strict=True):

            def report(done: int, before: int = before) -> None:
                making.progress(before + done, total)

            read.append(response_activations(making.base, rows, sets.max_length, 8, report))
        return making.vector_of(layer_axes(read[0], read[1], self.estimator()))
