"""How far models have drifted from a place, with and without what may be present while they answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from analysis.drift import drift_rows, response_sums
from analysis.measurements.base import BaseMeasurement, Made, Part, Shard
from analysis.measurements.conditions import condition_key, condition_names, repeated
from analysis.measurements.under_conditions import readout_faults
from analysis.names import numbered
from analysis.rows import NO_CONDITION
from trainables.config import Path, VectorNames
from trainables.interventions import InterventionItem, interventions_faults
from trainables.shapes import ModelShape, VectorShape


class DriftMeasurement(BaseMeasurement):
    """Cosine distance of the mean response activation from places, over all rows that are read, with nothing present
    and under each of ``interventions``: what training moved, and what a cap brings back."""

    merged_tables = ("drift",)
    has_tensors = True

    kind: Literal["drift"] = "drift"
    centers: VectorNames
    """Names of vectors that are places, such as those of kind ``mean``."""
    layers: Annotated[tuple[int, ...], Field(min_length=1)]
    """Where activations are read: 0 is the embedding output, l the output of block l - 1."""
    interventions: tuple[InterventionItem, ...] = ()
    """What is there besides nothing, one at a time, as in ``evaluation.interventions``; ``{grid: [...]}`` in place of a
    value makes one of each."""

    def faults(self, model: ModelShape, vectors: Mapping[str, VectorShape]) -> Iterable[tuple[Path, str]]:
        yield from readout_faults(self.layers, self.centers, model, vectors, field="centers")
        for path, message in interventions_faults(self.interventions, model, vectors):
            yield ("interventions", *path), message
        for index in repeated(self.interventions):
            yield ("interventions", index), "the same intervention stands twice in the list"

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"items": [condition_key(item) for item in self.interventions]}

    def forwards_per_row(self, model: ModelShape) -> int:
        del model
        return 1 + len(self.interventions)

    def names(self, vectors: Mapping[str, str], banks: Mapping[tuple[str, ...], str]) -> dict[str, str]:
        named = condition_names(self.interventions, vectors, banks)
        # labels do not say which file a cap is calibrated on
        return dict(vectors) | dict(zip(named, numbered(list(named.values())), strict=True))

    def measure(self, shard: Shard) -> Made:
        sums = response_sums(
            shard.base,
            shard.model,
            list(shard.rows.values()),
            self.layers,
            {NO_CONDITION: [], **{condition_key(item): shard.at_work((item,)) for item in self.interventions}},
            max_length=shard.max_length,
            progress=shard.progress,
        )
        tensors = {
            f"{name}/{layer}/{number}": row_e
            for name, by_layer in sums.items()
            for layer, sums_re in by_layer.items()
            for number, row_e in zip(shard.rows, sums_re, strict=True)
        }
        return Made({}, tensors)

    def merge(self, measure_id: str, parts: Sequence[Part], vectors: Mapping[str, torch.Tensor]) -> Made:
        found: dict[str, dict[int, dict[int, torch.Tensor]]] = {}
        for part in parts:
            for key, row_e in part.tensors.items():
                name, layer, number = key.rsplit("/", 2)
                found.setdefault(name, {}).setdefault(int(layer), {})[int(number)] = row_e
        names = [NO_CONDITION, *(condition_key(item) for item in self.interventions)]
        sums = {  # in the order of the config, whatever that of the tensors
            name: {
                layer: torch.stack([row_e for _, row_e in sorted(found[name][layer].items())]) for layer in self.layers
            }
            for name in names
        }
        centers = {name: vectors[name] for name in self.centers}
        return Made({"drift": list(drift_rows(sums, centers, measure_id=measure_id))})
