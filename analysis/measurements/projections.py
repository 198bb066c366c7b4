"""Where activations stand along vectors, of the base and of trained models."""

from __future__ import annotations

from typing import Literal

from analysis.measurements.base import Made, Shard
from analysis.measurements.under_conditions import VectorMeasurement
from analysis.projections import projection_rows


class ProjectionMeasurement(VectorMeasurement):
    """Mean projection of response activations on vectors, per row, condition and layer. With ``on: both`` the report
    shows how far trainings have moved activations from those of the base."""

    tables = ("projections",)

    kind: Literal["projections"] = "projections"

    def measure(self, shard: Shard) -> Made:
        rows = projection_rows(
            shard.base,
            shard.model,
            list(shard.rows.values()),
            {name: shard.vectors[name] for name in self.vectors},
            self.layers_of(shard),
            measure_id=shard.measure_id,
            max_length=shard.max_length,
            conditions=self.conditions_of(shard),
            row_numbers=list(shard.rows),
            progress=shard.progress,
        )
        return Made({"projections": list(rows)})
