"""What a defense changes about the gradient, taken apart over all rows: equations 9 to 12 of arXiv 2604.16423."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field

from analysis.components import GradientDifferences, component_rows, component_score_rows
from analysis.conditions import NOTHING
from analysis.gradient_pairs import gradient_differences
from analysis.measurements.base import Made, Part, Shard
from analysis.measurements.conditions import (
    ConditionConfig,
    condition_key,
    condition_of,
)
from analysis.measurements.under_conditions import VectorMeasurement
from analysis.rows import NO_CONDITION
from trainables.config import VectorNames
from trainables.errors import DataError
from trainables.shapes import ModelShape


class ComponentMeasurement(VectorMeasurement):
    """Uncentred PCA of the change of the mean gradient that each condition makes, and the cosine of its directions with
    vectors. Shards hand over their rows' changes; the merge step takes them apart together."""

    merged_tables = ("components", "component_scores")
    has_tensors = True

    kind: Literal["components"] = "components"
    vectors: VectorNames
    """What the directions are compared with; their signs are such that none is below 0 with the first of these."""
    conditions: tuple[ConditionConfig, ...] = Field(min_length=1)
    """Each is taken apart for itself, as the change from nothing present; ``{grid: [...]}`` in place of a value makes a
    condition of each."""
    layers: tuple[int, ...] = Field(min_length=1)
    """Where gradients are read."""

    def forwards_per_row(self, model: ModelShape) -> int:
        del model
        return 2 * len(self.conditions)

    def measure(self, shard: Shard) -> Made:
        tensors: dict[str, torch.Tensor] = {}
        for number, config in enumerate(self.conditions):

            def progress(done: int, total: int, number: int = number) -> None:
                shard.progress(number * total + done, len(self.conditions) * total)

            found = {layer: GradientDifferences(_hidden_size(shard)) for layer in self.layers}
            for rows, differences in gradient_differences(
                shard.base,
                shard.model,
                list(shard.rows.values()),
                condition_of(config, shard.vectors),
                NOTHING,
                list(self.layers),
                max_length=shard.max_length,
                row_numbers=list(shard.rows),
                progress=progress,
            ):
                for layer in self.layers:
                    found[layer].add(rows, differences[layer])
            for layer, collected in found.items():
                head = _head(config, layer)
                tensors |= {f"{head}/{name}": tensor for name, tensor in collected.to_tensors().items()}
        return Made({}, tensors)

    def merge(self, measure_id: str, parts: Sequence[Part], vectors: Mapping[str, torch.Tensor]) -> Made:
        made: dict[str, list[object]] = {"components": [], "component_scores": []}
        compared = {name: vectors[name] for name in self.vectors}
        axis = vectors[self.vectors[0]]
        for config in self.conditions:
            name = condition_key(config)
            for layer in self.layers:
                together = GradientDifferences(axis.shape[1])
                for part in parts:
                    together.merge(GradientDifferences.from_tensors(_of(part.tensors, _head(config, layer))))
                try:
                    found = together.decompose(axis[layer])
                except ValueError as error:
                    raise DataError(f"layer {layer}: {error}") from error
                made["components"] += component_rows(
                    found, compared, layer, measure_id=measure_id, condition=name, reference=NO_CONDITION
                )
                if found.scores_nk is not None:
                    made["component_scores"] += component_score_rows(
                        found.rows,
                        found.scores_nk,
                        layer,
                        measure_id=measure_id,
                        condition=name,
                        reference=NO_CONDITION,
                    )
        return Made(made)


def _hidden_size(shard: Shard) -> int:
    return next(iter(shard.vectors.values())).shape[1]


def _head(config: ConditionConfig, layer: int) -> str:
    return f"{condition_key(config)}/{layer}"


def _of(tensors: Mapping[str, torch.Tensor], head: str) -> dict[str, torch.Tensor]:
    return {name.rpartition("/")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{head}/")}
