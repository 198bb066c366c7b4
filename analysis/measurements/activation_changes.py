"""What ONE gradient step on a row does to that row's activations: equations 4 to 8 of arXiv 2604.16423."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import Field

from analysis.activation_changes import DECREASE, activation_change_rows
from analysis.measurements.base import BaseMeasurement, Made, Shard
from analysis.measurements.conditions import ConditionConfig, all_conditions, condition_faults, condition_names
from analysis.measurements.gradients import VectorNames, read_layers, readout_faults
from trainables.config import Path
from trainables.model_parts import decoder_layers
from trainables.shapes import ModelShape, VectorShape


class ActivationChangeMeasurement(BaseMeasurement):
    """Change of activations by one step of gradient descent on a row, against the gradient before it. The condition is
    there in the step and absent when activations are read; the model is the same afterwards. Slow: two forward passes
    and a backward pass through all weights per row and condition."""

    tables = ("activation_changes",)

    kind: Literal["activation_changes"] = "activation_changes"
    vectors: VectorNames
    """Vectors that changes and gradients are compared with."""
    layers: tuple[int, ...] | Literal["all"] = "all"
    """Where activations are read. ``all``: 1 to the last."""
    conditions: tuple[ConditionConfig, ...] = ()
    """What is there in the step besides nothing; ``{grid: [...]}`` makes a condition of each."""
    moved: Literal["full", "lora"] = "full"
    """What the step moves: all parameters, or a fresh adapter."""
    decrease: float = Field(default=DECREASE, gt=0, lt=1)
    """How large the step is: by how much of the loss it lowers it, to first order."""

    def faults(self, model: ModelShape, vectors: Mapping[str, VectorShape]) -> Iterable[tuple[Path, str]]:
        yield from readout_faults(self.layers, self.vectors, model, vectors)
        for path, message in condition_faults(self.conditions, model, vectors):
            yield ("conditions", *path), message

    def forwards_per_row(self, model: ModelShape) -> int:
        del model
        return 3 * (1 + len(self.conditions))

    def names(self, vectors: Mapping[str, str], banks: Mapping[tuple[str, ...], str]) -> dict[str, str]:
        return dict(vectors) | condition_names(self.conditions, vectors, banks)

    def measure(self, shard: Shard) -> Made:
        rows = activation_change_rows(
            shard.base,
            shard.model,
            list(shard.rows.values()),
            all_conditions(self.conditions, shard.vectors),
            {name: shard.vectors[name] for name in self.vectors},
            read_layers(self.layers, len(decoder_layers(shard.base.model))),
            measure_id=shard.measure_id,
            max_length=shard.max_length,
            moved=self.moved,
            decrease=self.decrease,
            row_numbers=list(shard.rows),
            progress=shard.progress,
        )
        return Made({"activation_changes": list(rows)})
