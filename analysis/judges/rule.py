"""The rule judge: an answer scores 1 if any of a trait's text patterns is found in it, else 0."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from analysis.judges.base import BaseMetric, Item, Judgement, NamesTrait
from analysis.traits import Pattern, Trait
from trainables.errors import ConfigError, Fault


class RuleMetric(BaseMetric):
    """Patterns, or a trait whose rule has them: exactly one of the two."""

    judge: Literal["rule"] = "rule"
    trait: Annotated[str | None, NamesTrait()] = None
    patterns: tuple[Pattern, ...] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.trait is None) == (self.patterns is None):
            given = "neither" if self.trait is None else "both"
            raise ValueError(f"give exactly one of trait and patterns; {given} given")
        return self

    def resolved(self, traits: Mapping[str, Trait]) -> Self:
        if self.trait is None:
            return self
        trait = traits.get(self.trait)
        if trait is None:
            known = ", ".join(sorted(traits)) or "none"
            raise ConfigError([Fault("trait", f"no trait {self.trait!r}; known: {known}")])
        if trait.rule is None:
            raise ConfigError([Fault("trait", f"trait {self.trait!r} has no rule; give patterns instead")])
        return type(self)(patterns=trait.rule.patterns)

    def identity(self) -> dict[str, Any]:
        assert self.patterns is not None, "resolve the metric first"
        return {"judge": self.judge, "semantics": self.semantics, "patterns": sorted(set(self.patterns))}

    def make(self) -> RuleJudge:
        assert self.patterns is not None, "resolve the metric first"
        return RuleJudge(self.patterns)


class RuleJudge:
    """Looks for the patterns, whatever the case, in the answer alone; the status is always ok."""

    name = "rule"

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = tuple(re.compile(pattern, re.IGNORECASE) for pattern in patterns)

    async def judge(self, items: Sequence[Item]) -> list[Judgement]:
        return [Judgement(float(self._found(item.answer)), "ok") for item in items]

    def _found(self, answer: str) -> bool:
        return any(pattern.search(answer) for pattern in self._patterns)
