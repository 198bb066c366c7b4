"""What ONE gradient step on a row does to that row's activations: equations 4 to 8 of arXiv 2604.16423."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from analysis.activation_changes import DECREASE, activation_change_rows
from analysis.measurements.base import Made, Shard
from analysis.measurements.under_conditions import VectorMeasurement


class ActivationChangeMeasurement(VectorMeasurement):
    """Change of activations by one step of gradient descent on a row, against the gradient before it. The condition is
    there in the step and absent when activations are read; the model is the same afterwards. Slow: two forward passes
    and a backward pass through all weights per row and condition."""

    tables = ("activation_changes",)
    passes = 3

    kind: Literal["activation_changes"] = "activation_changes"
    moved: Literal["full", "lora"] = "full"
    """What the step moves: all parameters, or a fresh adapter."""
    decrease: float = Field(default=DECREASE, gt=0, lt=1)
    """How large the step is: by how much of the loss it lowers it, to first order."""

    def measure(self, shard: Shard) -> Made:
        rows = activation_change_rows(
            shard.base,
            shard.model,
            list(shard.rows.values()),
            self.conditions_of(shard),
            {name: shard.vectors[name] for name in self.vectors},
            self.layers_of(shard),
            measure_id=shard.measure_id,
            max_length=shard.max_length,
            moved=self.moved,
            decrease=self.decrease,
            row_numbers=list(shard.rows),
            progress=shard.progress,
        )
        return Made({"activation_changes": list(rows)})
