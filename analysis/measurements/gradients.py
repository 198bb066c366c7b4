"""Gradient cosines and losses under conditions: equation 3 of arXiv 2604.16423, see analysis/gradients.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from analysis.gradients import gradient_rows
from analysis.measured_rows import GradientRow
from analysis.measurements.base import BaseMeasurement, Made, Shard
from analysis.measurements.conditions import (
    ConditionConfig,
    all_conditions,
    condition_faults,
    condition_names,
)
from analysis.rows import LossRow
from trainables.config import NamesVector, Path
from trainables.model_parts import decoder_layers
from trainables.shapes import ModelShape, VectorShape

VectorNames: TypeAlias = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], NamesVector(), Field(min_length=1)]


class GradientMeasurement(BaseMeasurement):
    """Per row, condition, layer and vector the mean cosine of the loss gradient with the vector, and the loss per row
    and condition. Nothing present is always measured too."""

    tables = ("gradients", "losses")

    kind: Literal["gradients"] = "gradients"
    vectors: VectorNames
    """Vectors that the gradient is compared with, row l at layer l."""
    layers: tuple[int, ...] | Literal["all"] = "all"
    """Where the gradient is read: 0 is the embedding output, l the output of block l - 1. ``all``: 1 to the last."""
    conditions: tuple[ConditionConfig, ...] = ()
    """What is there in the forward pass, each written as a defense of a run; ``{grid: [...]}`` in place of a value
    makes a condition of each."""
    positions: Literal["response", "predicting"] = "response"
    """Where gradients are read: where the input token is a response token, or where the position predicts one."""

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
        made: dict[str, list[object]] = {"gradients": [], "losses": []}
        rows = gradient_rows(
            shard.base,
            shard.model,
            list(shard.rows.values()),
            all_conditions(self.conditions, shard.vectors),
            {name: shard.vectors[name] for name in self.vectors},
            read_layers(self.layers, len(decoder_layers(shard.base.model))),
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


def read_layers(layers: Sequence[int] | Literal["all"], num_layers: int) -> list[int]:
    """The layers that are meant."""
    return list(range(1, num_layers + 1)) if layers == "all" else [int(layer) for layer in layers]


def readout_faults(
    layers: Sequence[int] | Literal["all"],
    names: Sequence[str],
    model: ModelShape,
    vectors: Mapping[str, VectorShape],
) -> Iterable[tuple[Path, str]]:
    """Layers that cannot be read, and vectors that have no row there."""
    if layers != "all" and not layers:
        yield ("layers",), "must not be empty; got []"
    for index, layer in enumerate(layers if layers != "all" else ()):
        if not 0 <= int(layer) <= model.num_layers:
            yield ("layers", index), f"layer {layer} does not exist; the model has layers 0 to {model.num_layers}"
        elif layer in layers[:index]:
            yield ("layers", index), f"layer {layer} is listed twice"
    for index, name in enumerate(names):
        shape = vectors.get(name)
        if (
            shape is not None
            and shape.final_row != "pre_norm"
            and model.num_layers in read_layers(layers, model.num_layers)
        ):
            yield (
                ("vectors", index),
                f"the last row of {name!r} is {shape.final_row.replace('_', '-')}, so nothing can be compared with it "
                f"at layer {model.num_layers}; list layers without it",
            )
        elif name in names[:index]:
            yield ("vectors", index), f"{name!r} is listed twice"
