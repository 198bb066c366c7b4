"""Kinds of measurements that read layers with nothing present and under conditions, and compare with vectors there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Literal

from analysis.conditions import Condition
from analysis.measurements.base import BaseMeasurement, Shard
from analysis.measurements.conditions import ConditionConfig, all_conditions, condition_faults, condition_names
from trainables.config import Path, VectorNames
from trainables.model_parts import decoder_layers
from trainables.shapes import ModelShape, VectorShape


class ConditionMeasurement(BaseMeasurement):
    """Base class of kinds that read layers under conditions. ``passes``: forward passes per row and condition."""

    passes: ClassVar[int] = 1

    layers: tuple[int, ...] | Literal["all"] = "all"
    """Where gradients or activations are read: 0 is the embedding output, l the output of block l - 1. ``all``: 1 to
    the last."""
    conditions: tuple[ConditionConfig, ...] = ()
    """What is there besides nothing, each written as a defense of a run; ``{grid: [...]}`` in place of a value makes a
    condition of each."""

    def compared_with(self) -> tuple[str, ...]:
        """The names of ``vectors``, where a kind has them."""
        return ()

    def faults(self, model: ModelShape, vectors: Mapping[str, VectorShape]) -> Iterable[tuple[Path, str]]:
        yield from readout_faults(self.layers, self.compared_with(), model, vectors)
        for path, message in condition_faults(self.conditions, model, vectors):
            yield ("conditions", *path), message

    def forwards_per_row(self, model: ModelShape) -> int:
        del model
        return self.passes * (1 + len(self.conditions))

    def names(self, vectors: Mapping[str, str], banks: Mapping[tuple[str, ...], str]) -> dict[str, str]:
        return dict(vectors) | condition_names(self.conditions, vectors, banks)

    def layers_of(self, shard: Shard) -> list[int]:
        """The layers that are read, as numbers."""
        return read_layers(self.layers, len(decoder_layers(shard.base.model)))

    def conditions_of(self, shard: Shard) -> list[Condition]:
        """Nothing, and every condition at work."""
        return all_conditions(self.conditions, shard.vectors)


class VectorMeasurement(ConditionMeasurement):
    """Base class of kinds that also compare what they read with vectors, row l at layer l."""

    vectors: VectorNames
    """Vectors that what is read is compared with, row l at layer l, at length 1."""

    def compared_with(self) -> tuple[str, ...]:
        return self.vectors


def read_layers(layers: Sequence[int] | Literal["all"], num_layers: int) -> list[int]:
    """The layers that are meant."""
    return list(range(1, num_layers + 1)) if layers == "all" else [int(layer) for layer in layers]


def readout_faults(
    layers: Sequence[int] | Literal["all"],
    names: Sequence[str],
    model: ModelShape,
    vectors: Mapping[str, VectorShape],
    *,
    field: str = "vectors",
) -> Iterable[tuple[Path, str]]:
    """Layers that cannot be read, and vectors, which ``field`` lists, that have no row there."""
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
                (field, index),
                f"the last row of {name!r} is {shape.final_row.replace('_', '-')}, so nothing can be compared with it "
                f"at layer {model.num_layers}; list layers without it",
            )
        elif name in names[:index]:
            yield (field, index), f"{name!r} is listed twice"
