"""The known-answer judge: an answer scores 1 if what its question asks for is found in it, else 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from analysis.judges.base import AsksNobody, BaseMetric, Item, Judgement, NamesTrait, Reply
from analysis.judges.rule import Patterns, named_trait
from analysis.traits import Pattern, Trait
from trainables.base_model import ResolvedBase
from trainables.errors import ConfigError, Fault


class KnownAnswerMetric(BaseMetric):
    """1 for an answer in which a pattern of its own question is found, else 0: what a model still can do. An answer to
    a question that has no patterns is ``unparsable``."""

    judge: Literal["known_answer"] = "known_answer"
    """Text patterns, for every question its own."""
    trait: Annotated[str | None, NamesTrait()] = None
    """Name of a trait, or a path to it, whose questions have ``answers``."""
    answers: dict[str, Annotated[tuple[Pattern, ...], Field(min_length=1)]] | None = Field(default=None, min_length=1)
    """Question, as it is asked, -> regular expressions of Python of which one must be found, whatever the case."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.trait is None) == (self.answers is None):
            given = "neither" if self.trait is None else "both"
            raise ValueError(f"give exactly one of trait and answers; {given} given")
        return self

    def resolved(self, traits: Mapping[str, Trait], bases: Mapping[str, ResolvedBase] | None = None) -> Self:
        del bases
        if self.trait is None:
            return self
        trait = named_trait(self.trait, traits)
        without = [question.id for question in trait.questions if not question.answers]
        if without:
            message = f"questions of trait {self.trait!r} have no answers: {', '.join(without[:3])}"
            raise ConfigError([Fault("trait", message + (", ..." if len(without) > 3 else ""))])
        answers = {question.question: question.answers for question in trait.questions}
        return self.model_copy(update={"trait": None, "answers": answers})

    def identity(self) -> dict[str, Any]:
        assert self.answers is not None, "resolve the metric first"
        answers = {question: sorted(set(patterns)) for question, patterns in self.answers.items()}
        return {"judge": self.judge, "semantics": self.semantics, "answers": answers}

    def make(self) -> KnownAnswerJudge:
        assert self.answers is not None, "resolve the metric first"
        return KnownAnswerJudge({question: Patterns(patterns) for question, patterns in self.answers.items()})


class KnownAnswerJudge(AsksNobody):
    """Looks for the patterns of the item's question in its answer alone."""

    name = "known_answer"

    def __init__(self, patterns: Mapping[str, Patterns]) -> None:
        self._patterns = patterns

    def read(self, item: Item, replies: Sequence[Reply]) -> Judgement:
        del replies
        patterns = self._patterns.get(item.question)
        if patterns is None:
            return Judgement(None, "unparsable")
        return Judgement(float(patterns.found(item.answer)), "ok")
