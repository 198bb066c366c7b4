"""How far models have drifted from a place, with and without what may be present while they answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from analysis.drift import drift_rows, response_sums
from analysis.measurements.base import BaseMeasurement, Made, Part, Shard
from analysis.measurements.conditions import condition_key, repeated
from analysis.measurements.under_conditions import readout_faults
from analysis.rows import NO_CONDITION
from trainables.config import NamesVector, Path, VectorNames, marked, replaced
from trainables.interventions import InterventionItem, Interventions, interventions_faults
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
        del banks
        named: dict[str, str] = {}
        for item in self.interventions:
            values = {path: vectors[str(vector)] for path, vector in marked(item, NamesVector).items()}
            label = replaced(item, values).label()
            alike = sum(known.partition(" #")[0] == label for known in named.values())  # two files to calibrate on
            named[condition_key(item)] = f"{label} #{alike + 1}" if alike else label
        return dict(vectors) | named

    def measure(self, shard: Shard) -> Made:
        rows, tensors = list(shard.rows.values()), dict[str, torch.Tensor]()
        conditions: dict[str, Interventions] = {NO_CONDITION: ()}
        conditions |= {condition_key(item): (item,) for item in self.interventions}
        for done, (name, items) in enumerate(conditions.items(), start=1):
            sums = response_sums(
                shard.base,
                shard.model,
                rows,
                self.layers,
                max_length=shard.max_length,
                interventions=shard.at_work(items),
            )
            shard.progress(done, len(conditions))
            for layer, sums_re in sums.items():
                for number, row_e in zip(shard.rows, sums_re, strict=True):
                    tensors[f"{name}/{layer}/{number}"] = row_e
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
