"""Which parameters of a model are meant: by layer, and by the kind of module that owns them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from trainables.model_parts import causal_lm, decoder_layers


@dataclass(frozen=True)
class Place:
    """Where a parameter stands. ``layer``: 0 the embeddings, l >= 1 decoder block l - 1, the number of blocks plus one
    what comes after them (final norm, head of its own). ``module``: last name of its module, such as ``q_proj``."""

    layer: int
    module: str


def place_of(model: nn.Module) -> dict[str, Place]:
    """The place of every parameter of a model by its name in ``causal_lm(model).named_parameters()``.

    A parameter that two modules share (tied embeddings) is one parameter, and stands where it comes first.
    """
    whole = causal_lm(model)
    blocks = {id(module): index for index, block in enumerate(decoder_layers(model)) for module in block.modules()}
    embedding = whole.get_input_embeddings()
    places = {}
    for name, _ in whole.named_parameters():
        owner_name, _, own = name.rpartition(".")
        owner = whole.get_submodule(owner_name)
        if id(owner) in blocks:
            layer = blocks[id(owner)] + 1
        else:
            layer = 0 if owner is embedding else len(decoder_layers(model)) + 1
        places[name] = Place(layer, owner_name.rpartition(".")[2] or own)
    return places


def chosen_parameters(
    model: nn.Module, layers: Collection[int] | None = None, modules: Collection[str] | None = None
) -> dict[str, nn.Parameter]:
    """Parameters of a plain model (without adapters) by name, in the model's order, those of ``layers`` and
    ``modules`` alone where these are given."""
    places = place_of(model)
    parameters: Any = causal_lm(model).named_parameters()
    return {name: parameter for name, parameter in parameters if is_chosen(places[name], layers, modules)}


def is_chosen(place: Place, layers: Collection[int] | None, modules: Collection[str] | None) -> bool:
    """Whether a parameter at this place is meant; None: whatever."""
    return (layers is None or place.layer in layers) and (modules is None or place.module in modules)


def module_names(places: Iterable[Place]) -> tuple[str, ...]:
    """Last names of the modules that have parameters, sorted."""
    return tuple(sorted({place.module for place in places}))
