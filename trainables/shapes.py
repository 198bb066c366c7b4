"""Shapes that are known before anything is loaded: of a model and of a vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

FinalRow: TypeAlias = Literal["pre_norm", "post_norm", "absent"]
Layers: TypeAlias = tuple[int, ...] | Literal["all", "all_but_last"]


@dataclass(frozen=True)
class ModelShape:
    """What a model's config says about its residual stream."""

    num_layers: int
    hidden_size: int
    vocab_size: int


@dataclass(frozen=True)
class VectorShape:
    """What a vector's file says about it without reading the numbers.

    ``final_row``: row ``num_layers`` was read before the final norm (``pre_norm``: the space that steering at the last
    layer acts in), after it (``post_norm``: another space), or does not exist (``absent``). ``empty_rows``: layers
    for which another project's file has no row.
    """

    num_layers: int
    hidden_size: int
    final_row: FinalRow
    empty_rows: tuple[int, ...] = ()


def layer_fault(layer: int, model: ModelShape, vector: VectorShape | None) -> str | None:
    """Why nothing can be added at ``layer`` of ``model`` (with rows of ``vector``), or None if it can.

    Layers are embedding-inclusive: layer l >= 1 is the output of decoder block l - 1.
    """
    if layer == 0:
        return f"layer 0 is the embedding output; steering is allowed at layers 1 to {model.num_layers}"
    if not 1 <= layer <= model.num_layers:
        return f"layer {layer} does not exist; the model has layers 1 to {model.num_layers}"
    if vector is not None and layer == model.num_layers and vector.final_row != "pre_norm":
        return (
            f"layer {layer} is the last one and this vector's last row is {vector.final_row.replace('_', '-')}; "
            "only a row read before the final norm lies in the space of that layer"
        )
    if vector is not None and layer in vector.empty_rows:
        return f"the vector has no row for layer {layer} (it is all zero), so it would add nothing there"
    return None


def chosen_layers(layers: Layers, num_layers: int) -> tuple[int, ...]:
    """The layers that are meant of a model with ``num_layers`` decoder blocks, in the order given."""
    if layers == "all":
        return tuple(range(1, num_layers + 1))
    if layers == "all_but_last":
        return tuple(range(1, num_layers))
    assert not isinstance(layers, str)
    return layers


def layers_faults(layers: Layers, model: ModelShape, vectors: Sequence[VectorShape | None]) -> list[str]:
    """Everything that ``layer_fault`` says about the layers that are meant, and whether they are some, each once."""
    chosen = chosen_layers(layers, model.num_layers)
    if not chosen:
        return ["no layer is listed; give at least one, or leave it out"]
    faults = [layer_fault(layer, model, vector) for layer in dict.fromkeys(chosen) for vector in vectors or [None]]
    repeated = sorted({layer for layer in chosen if chosen.count(layer) > 1})
    if repeated:
        faults.append(f"layer {repeated[0]} is listed twice")
    return list(dict.fromkeys(fault for fault in faults if fault is not None))


def layers_label(layers: Layers) -> str:
    """``L1-3,20`` for the layers 1, 2, 3 and 20; ``all layers`` and ``all layers but the last`` as they are written."""
    if isinstance(layers, str):
        return {"all": "all layers", "all_but_last": "all layers but the last"}[layers]
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return "L" + ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)
