"""Where activations stand along vectors, of the base and of trained models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from analysis.measurements.base import BaseMeasurement, Made, Shard
from analysis.measurements.conditions import ConditionConfig, all_conditions, condition_faults, condition_names
from analysis.measurements.gradients import VectorNames, read_layers, readout_faults
from analysis.projections import projection_rows
from trainables.config import Path
from trainables.model_parts import decoder_layers
from trainables.shapes import ModelShape, VectorShape


class ProjectionMeasurement(BaseMeasurement):
    """Mean projection of response activations on vectors, per row, condition and layer. With ``on: both`` the report
    shows how far trainings have moved activations from those of the base."""

    tables = ("projections",)

    kind: Literal["projections"] = "projections"
    vectors: VectorNames
    """Vectors that activations are projected on, row l at layer l, at length 1."""
    layers: tuple[int, ...] | Literal["all"] = "all"
    """Where activations are read. ``all``: 1 to the last."""
    conditions: tuple[ConditionConfig, ...] = ()
    """What is there in the forward pass besides nothing; ``{grid: [...]}`` makes a condition of each."""

    def faults(self, model: ModelShape, vectors: Mapping[str, VectorShape]) -> Iterable[tuple[Path, str]]:
        yield from readout_faults(self.layers, self.vectors, model, vectors)
        for path, message in condition_faults(self.conditions, model, vectors):
            yield ("conditions", *path), message

    def forwards_per_row(self, model: ModelShape) -> int:
        del model
        return 1 + len(self.conditions)

    def names(self, vectors: Mapping[str, str], banks: Mapping[tuple[str, ...], str]) -> dict[str, str]:
        return dict(vectors) | condition_names(self.conditions, vectors, banks)

    def measure(self, shard: Shard) -> Made:
        rows = projection_rows(
            shard.base,
            shard.model,
            list(shard.rows.values()),
            {name: shard.vectors[name] for name in self.vectors},
            read_layers(self.layers, len(decoder_layers(shard.base.model))),
            measure_id=shard.measure_id,
            max_length=shard.max_length,
            conditions=all_conditions(self.conditions, shard.vectors),
            row_numbers=list(shard.rows),
            progress=shard.progress,
        )
        return Made({"projections": list(rows)})
