"""Conditions as a user writes them: like a defense of a run, or vectors at several layers at once.

What is there in the forward pass of a measurement is then what a defense would put there in training, and both have one
label, so that a measurement and the run that it foretells can be laid side by side.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field, TypeAdapter

from analysis.conditions import NOTHING, Condition
from analysis.conditions import Steering as Shift
from trainables.config import Config, NamesPrompts, NamesVector, Path, VectorName, marked, recipe_of, replaced
from trainables.defenses import Item
from trainables.interventions import InterventionItem
from trainables.shapes import ModelShape, VectorShape, layer_fault


class Steering(Config):
    """Add ``coefficient`` times a vector at several layers at once, at every layer its own row."""

    kind: Literal["steering"] = "steering"
    vector: VectorName
    """Name of one of the sweep's ``vectors``."""
    layers: tuple[int, ...] | Literal["all"] = "all"
    """Where it is added. ``all``: layers 1 to the last but one."""
    coefficient: float
    """How much of the vector, which is used at its raw norm."""

    def label(self) -> str:
        where = "all layers" if self.layers == "all" else f"L{'+'.join(str(layer) for layer in self.layers)}"
        return f"{self.vector} {where} x{self.coefficient:g}"

    def faults(self, model: ModelShape, vectors: Mapping[str, VectorShape]) -> Iterable[tuple[str, str]]:
        if self.layers == ():
            yield "layers", "must not be empty; got []"
        for layer in self.layers if self.layers != "all" else ():
            fault = layer_fault(int(layer), model, vectors.get(self.vector))
            if fault is not None:
                yield "layers", fault
        if self.layers != "all" and len(set(self.layers)) < len(self.layers):
            yield "layers", "a layer is listed twice"

    def condition(self, name: str, vectors: Mapping[str, torch.Tensor]) -> Condition:
        values = vectors[self.vector]
        layers = range(1, len(values) - 1) if self.layers == "all" else [int(layer) for layer in self.layers]
        return Condition(name, (Shift(values, layers, self.coefficient),))


ConditionConfig: TypeAlias = Annotated[Item | Steering, Field(discriminator="kind")]


AnyCondition: TypeAlias = ConditionConfig | InterventionItem
"""Also what is there while a model answers, which only some measurements read under."""

_ANY: TypeAdapter[ConditionConfig] = TypeAdapter(ConditionConfig)


def condition_label(plain: Mapping[str, object]) -> str:
    """What a condition is called that is given as plain data, with the sweep's names."""
    return _ANY.validate_python(plain).label()


def condition_key(config: AnyCondition) -> str:
    """What stored tables call a condition whose names are resolved: its kind and a hash of all that it is."""
    semantics = getattr(config, "semantics", 1)
    text = json.dumps(recipe_of(config) | {"semantics": semantics}, sort_keys=True, separators=(",", ":"))
    return f"{config.kind} {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def condition_of(config: ConditionConfig, vectors: Mapping[str, torch.Tensor]) -> Condition:
    """The condition at work. ``vectors`` are tensors by the ids that ``config`` holds."""
    name = condition_key(config)
    if isinstance(config, Steering):
        return config.condition(name, vectors)
    return Condition(name, mechanisms=(config.mechanism(vectors),))


def all_conditions(configs: Sequence[ConditionConfig], vectors: Mapping[str, torch.Tensor]) -> list[Condition]:
    """Nothing, which everything is compared with, and then ``configs``."""
    return [NOTHING, *(condition_of(config, vectors) for config in configs)]


def named_condition(
    config: AnyCondition, vectors: Mapping[str, str], banks: Mapping[tuple[str, ...], str]
) -> AnyCondition:
    """A resolved condition with the sweep's names back in it; ``vectors`` is id -> name."""
    values: dict[Path, object] = {path: vectors[str(vector)] for path, vector in marked(config, NamesVector).items()}
    for field in type(config).model_fields:
        value = getattr(config, field)
        if isinstance(value, tuple) and value in banks and _is_bank(config, field):
            values[(field,)] = banks[value]
    return replaced(config, values)


def condition_names(
    conditions: Sequence[AnyCondition], vectors: Mapping[str, str], banks: Mapping[tuple[str, ...], str]
) -> dict[str, str]:
    """What stored tables call the resolved conditions -> their labels."""
    return {condition_key(config): named_condition(config, vectors, banks).label() for config in conditions}


def condition_faults(
    configs: Sequence[ConditionConfig], model: ModelShape, vectors: Mapping[str, VectorShape]
) -> Iterable[tuple[Path, str]]:
    """Every fault of the conditions, alone and beside each other; paths begin at the list."""
    for index, config in enumerate(configs):
        for field, message in config.faults(model, vectors):
            yield (index, field), message
    for index in repeated(configs):
        yield (index,), "the same condition stands twice in the list"


def repeated(configs: Sequence[Config]) -> list[int]:
    """Places of a list at which stands what stood there before."""
    texts = [config.model_dump_json() for config in configs]
    return [index for index, text in enumerate(texts) if text in texts[:index]]


def _is_bank(config: Config, field: str) -> bool:
    return any(isinstance(mark, NamesPrompts) for mark in type(config).model_fields[field].metadata)
