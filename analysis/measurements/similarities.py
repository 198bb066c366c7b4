"""The signature of a defense: gradients under conditions against the gradient under one of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import Field

from analysis.gradient_pairs import similarity_rows
from analysis.measurements.base import Made, Shard
from analysis.measurements.conditions import ConditionConfig, condition_names, condition_of
from analysis.measurements.under_conditions import ConditionMeasurement
from trainables.config import Path
from trainables.shapes import ModelShape, VectorShape


class SimilarityMeasurement(ConditionMeasurement):
    """Cosine of the gradient under each condition with the gradient under ``reference``, token by token: does steering
    with what a prompt does to activations change gradients as the prompt does?"""

    tables = ("similarities",)

    kind: Literal["similarities"] = "similarities"
    reference: ConditionConfig
    """The condition that the others are compared with, written as a defense of a run."""
    conditions: tuple[ConditionConfig, ...] = Field(min_length=1)
    """What is compared with it; ``{grid: [...]}`` in place of a value makes a condition of each."""

    def faults(self, model: ModelShape, vectors: Mapping[str, VectorShape]) -> Iterable[tuple[Path, str]]:
        yield from super().faults(model, vectors)
        for field, message in self.reference.faults(model, vectors):
            yield ("reference", field), message

    def names(self, vectors: Mapping[str, str], banks: Mapping[tuple[str, ...], str]) -> dict[str, str]:
        return dict(vectors) | condition_names((self.reference, *self.conditions), vectors, banks)

    def measure(self, shard: Shard) -> Made:
        rows = similarity_rows(
            shard.base,
            shard.model,
            list(shard.rows.values()),
            condition_of(self.reference, shard.vectors),
            [condition_of(config, shard.vectors) for config in self.conditions],
            self.layers_of(shard),
            measure_id=shard.measure_id,
            max_length=shard.max_length,
            row_numbers=list(shard.rows),
            progress=shard.progress,
        )
        return Made({"similarities": list(rows)})
