"""The hybrid judge: text patterns decide where they can, a judge model decides the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from analysis.judges.base import AskerKind, BaseMetric, Item, Judge, Judgement, Reply, Request
from analysis.judges.local import LocalMetric
from analysis.judges.openai import OpenaiMetric
from analysis.judges.rule import Patterns, PatternSource
from analysis.traits import Trait
from trainables.base_model import BaseConfig, ResolvedBase
from trainables.errors import ConfigError, Fault

ModelMetric: TypeAlias = Annotated[OpenaiMetric | LocalMetric, Field(discriminator="judge")]

_OTHERWISE = "otherwise"


class HybridRule(PatternSource):
    """What text patterns decide. They are given, or those of a trait."""

    found: float | None = 100.0
    """Value of an answer in which a pattern is found. null: the model decides."""
    absent: float | None = None
    """Value of an answer in which none is found. null: the model decides."""


class HybridMetric(BaseMetric):
    """Text patterns where they decide, a judge model otherwise. Values are on the model's scale."""

    judge: Literal["hybrid"] = "hybrid"
    """Patterns first, then a model."""
    rule: HybridRule
    """What the patterns decide."""
    otherwise: ModelMetric
    """The model that judges the rest."""

    @model_validator(mode="after")
    def _both_have_a_say(self) -> Self:
        values = {"found": self.rule.found, "absent": self.rule.absent}
        given = {name: value for name, value in values.items() if value is not None}
        low, high = self.bounds
        outside = [f"rule.{name} is {value:g}" for name, value in given.items() if not low <= value <= high]
        if outside:
            raise ValueError(f"{' and '.join(outside)}; the scale of otherwise goes from {low:g} to {high:g}")
        if not given:
            raise ValueError("rule.found and rule.absent are both null, so the rule would decide nothing")
        if len(given) == len(values):
            raise ValueError(
                "rule.found and rule.absent both have a value, so the model would never be asked; leave one null, "
                "or use {judge: rule}"
            )
        return self

    @property
    def asking(self) -> BaseMetric:
        return self.otherwise

    @property
    def asker(self) -> AskerKind:
        return self.otherwise.asker

    @property
    def bounds(self) -> tuple[float, float]:
        return self.otherwise.bounds

    @property
    def max_requests(self) -> int:
        return self.otherwise.max_requests

    def bases(self) -> dict[str, BaseConfig]:
        inner = self.otherwise.bases()
        return {_OTHERWISE: inner[""]} if inner else {}

    def resolved(self, traits: Mapping[str, Trait], bases: Mapping[str, ResolvedBase] | None = None) -> Self:
        faults: list[Fault] = []
        rule, otherwise = self.rule, self.otherwise
        try:
            rule = self.rule.with_patterns(traits)
        except ConfigError as error:
            faults += [Fault(f"rule.{fault.key}", fault.message) for fault in error.faults]
        try:
            inner = {"": bases[_OTHERWISE]} if bases and _OTHERWISE in bases else None
            otherwise = self.otherwise.resolved(traits, inner)
        except ConfigError as error:
            faults += [Fault(f"{_OTHERWISE}.{fault.key}", fault.message) for fault in error.faults]
        if faults:
            raise ConfigError(faults)
        return self.model_copy(update={"rule": rule, "otherwise": otherwise})

    def identity(self) -> dict[str, Any]:
        assert self.rule.patterns is not None, "resolve the metric first"
        rule = {"patterns": sorted(set(self.rule.patterns)), "found": self.rule.found, "absent": self.rule.absent}
        head = {"judge": self.judge, "semantics": self.semantics, "rule": rule}
        return head | {_OTHERWISE: self.otherwise.identity()}

    def make(self) -> HybridJudge:
        return HybridJudge(self.rule.found_by(), self.rule.found, self.rule.absent, self.otherwise.make())


class HybridJudge:
    """Asks the model only about items that the patterns leave open. A judgement names who made it."""

    name = "hybrid"

    def __init__(self, patterns: Patterns, found: float | None, absent: float | None, otherwise: Judge) -> None:
        self._patterns = patterns
        self._found = found
        self._absent = absent
        self._otherwise = otherwise

    def requests(self, item: Item) -> Sequence[Request]:
        return () if self._decided(item) is not None else self._otherwise.requests(item)

    def read(self, item: Item, replies: Sequence[Reply]) -> Judgement:
        value = self._decided(item)
        if value is not None:
            return Judgement(value, "ok", judge="rule")
        return replace(self._otherwise.read(item, replies), judge=self._otherwise.name)

    def _decided(self, item: Item) -> float | None:
        return self._found if self._patterns.found(item.answer) else self._absent
