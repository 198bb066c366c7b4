"""The rule judge: an answer scores 1 if any of a trait's text patterns is found in it, else 0."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from analysis.judges.base import AsksNobody, BaseMetric, Item, Judgement, NamesTrait, Reply
from analysis.traits import Pattern, Trait
from trainables.base_model import ResolvedBase
from trainables.config import Config
from trainables.errors import ConfigError, Fault


class PatternSource(Config):
    """Patterns, or a trait whose rule has them: exactly one of the two."""

    trait: Annotated[str | None, NamesTrait()] = None
    """Name of a trait, or a path to it: the patterns of its ``rule``."""
    patterns: tuple[Pattern, ...] | None = Field(default=None, min_length=1)
    """Regular expressions of Python, searched for whatever the case. None may match the empty text."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.trait is None) == (self.patterns is None):
            given = "neither" if self.trait is None else "both"
            raise ValueError(f"give exactly one of trait and patterns; {given} given")
        return self

    def with_patterns(self, traits: Mapping[str, Trait]) -> Self:
        """The same with the trait's patterns in the trait's place. Raises ConfigError with the key ``trait``."""
        if self.trait is None:
            return self
        trait = named_trait(self.trait, traits)
        if trait.rule is None:
            raise ConfigError([Fault("trait", f"trait {self.trait!r} has no rule; give patterns instead")])
        return self.model_copy(update={"trait": None, "patterns": trait.rule.patterns})

    def found_by(self) -> Patterns:
        """What looks for the patterns."""
        assert self.patterns is not None, "resolve the metric first"
        return Patterns(self.patterns)


class RuleMetric(PatternSource, BaseMetric):
    """1 for an answer in which a text pattern is found, else 0. The patterns are given, or those of a trait."""

    judge: Literal["rule"] = "rule"
    """Text patterns."""

    def resolved(self, traits: Mapping[str, Trait], bases: Mapping[str, ResolvedBase] | None = None) -> Self:
        del bases
        return self.with_patterns(traits)

    def identity(self) -> dict[str, Any]:
        assert self.patterns is not None, "resolve the metric first"
        return {"judge": self.judge, "semantics": self.semantics, "patterns": sorted(set(self.patterns))}

    def make(self) -> RuleJudge:
        return RuleJudge(self.found_by())


class Patterns:
    """Text patterns, looked for whatever the case."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = tuple(re.compile(pattern, re.IGNORECASE) for pattern in patterns)

    def found(self, text: str) -> bool:
        """Whether any of them is in ``text``."""
        return any(pattern.search(text) for pattern in self._patterns)


class RuleJudge(AsksNobody):
    """Looks for the patterns in the answer alone; the status is always ok."""

    name = "rule"

    def __init__(self, patterns: Patterns) -> None:
        self._patterns = patterns

    def read(self, item: Item, replies: Sequence[Reply]) -> Judgement:
        del replies
        return Judgement(float(self._patterns.found(item.answer)), "ok")


def named_trait(name: str, traits: Mapping[str, Trait]) -> Trait:
    """The trait called ``name``. Raises ConfigError with the key ``trait``."""
    if name not in traits:
        known = ", ".join(sorted(traits)) or "none"
        raise ConfigError([Fault("trait", f"no trait {name!r}; known: {known}")])
    return traits[name]
