"""Gradient cosines and losses under conditions: equation 3 of arXiv 2604.16423, see analysis/gradients.py."""

from __future__ import annotations

from typing import Literal

from analysis.gradients import gradient_rows
from analysis.measured_rows import GradientRow
from analysis.measurements.base import Made, Shard
from analysis.measurements.under_conditions import VectorMeasurement
from analysis.rows import LossRow


class GradientMeasurement(VectorMeasurement):
    """Per row, condition, layer and vector the mean cosine of the loss gradient with the vector, and the loss per row
    and condition. Nothing present is always measured too."""

    tables = ("gradients", "losses")

    kind: Literal["gradients"] = "gradients"
    positions: Literal["response", "predicting", "shared"] = "response"
    """Where gradients are read: where the input token is a response token, where the position predicts one, or at every
    token from where on all conditions read the same, so all that follow a prompt."""

    def measure(self, shard: Shard) -> Made:
        made: dict[str, list[object]] = {"gradients": [], "losses": []}
        rows = gradient_rows(
            shard.base,
            shard.model,
            list(shard.rows.values()),
            self.conditions_of(shard),
            {name: shard.vectors[name] for name in self.vectors},
            self.layers_of(shard),
            measure_id=shard.measure_id,
            max_length=shard.max_length,
            positions=self.positions,
            row_numbers=list(shard.rows),
            progress=shard.progress,
        )
        for row in rows:
            made["losses" if isinstance(row, LossRow) else "gradients"].append(row)
        assert all(isinstance(row, GradientRow) for row in made["gradients"])
        return Made(made)
