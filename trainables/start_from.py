"""Starting a training from another one's adapter: going on with it, or merging it into the base and adding a new one.

Merging (W + scaling B A, as PEFT does it) gives a base of its own. The base that a process holds is never written to:
the weights that change are new tensors, all others are shared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from trainables.base_model import LoadedBase
from trainables.config import Config
from trainables.errors import TrainingError
from trainables.lora import adapter_parameters, load_adapter


class StartFrom(Config):
    """The run whose model a training starts from, in place of the base alone."""

    run: str = Field(min_length=1)
    """What that run is called: the ``label`` of its block, or without one what its defense is called. Of several runs
    of that name it is the one with the same values on all axes that both have. A whole label such as ``pre seed=0``
    means just that run."""
    adapter: Literal["continue", "merge"]
    """``continue``: go on with that run's adapter, which must have the shape of this run's; the optimizer and its
    schedule begin anew. ``merge``: merge it into the base, for good, and begin a new adapter. It has no default,
    because the two learn differently."""


def merged_base(base: LoadedBase, adapters: Sequence[Path]) -> LoadedBase:
    """``base`` with these saved adapters merged into its weights one after the other, in the dtype of the base.

    Nothing of ``base`` changes. Takes the memory of the weights that have an adapter once more. In bfloat16 the merged
    weights are rounded, so there the model is not to the bit that of base and adapter.
    """
    from peft.tuners.lora import LoraLayer  # PEFT is slow to import

    if not adapters:
        return base
    own = {id(parameter) for parameter in base.model.parameters()}
    model: Any = base.fresh()
    for folder in adapters:
        adapted = load_adapter(model, folder, "merged")
        for module in adapted.modules():
            if isinstance(module, LoraLayer) and id(module.base_layer.weight) in own:  # shared with the base
                copied = module.base_layer.weight.detach().clone()
                module.base_layer.weight = nn.Parameter(copied, requires_grad=False)
        model = adapted.merge_and_unload()
    new = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in own}
    merged = base.fresh()  # modules on which nothing has been
    for name, parameter in new.items():
        module_name, _, last = name.rpartition(".")
        setattr(merged.get_submodule(module_name), last, parameter.requires_grad_(False))
    return dataclasses.replace(base, model=merged)


def begin_with(model: nn.Module, name: str, weights: Mapping[str, torch.Tensor]) -> None:
    """Give the adapter ``name`` of ``model`` the values of a saved one, by the names that PEFT saves them under.

    Raises TrainingError if they are not those of an adapter of the same shape on the same modules.
    """
    parameters = {full.replace(f".{name}.", "."): one for full, one in adapter_parameters(model, name).items()}
    ours = {key: tuple(one.shape) for key, one in parameters.items()}
    theirs = {key: tuple(one.shape) for key, one in weights.items()}
    if ours != theirs:
        odd = next(key for key in [*ours, *theirs] if ours.get(key) != theirs.get(key))
        raise TrainingError(
            f"run {name} cannot go on with the adapter that it starts from: {odd} is {theirs.get(odd, 'absent')} there "
            f"and {ours.get(odd, 'absent')} here"
        )
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(weights[key])
