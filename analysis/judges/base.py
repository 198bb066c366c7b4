"""What a judge is: something that gives every answer a number, or says why it has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self, TypeAlias

from analysis.traits import Trait
from trainables.config import Config

Status: TypeAlias = Literal["ok", "refused", "unparsable", "low_mass", "api_error", "budget_exhausted"]


@dataclass(frozen=True)
class Item:
    """What is judged."""

    question: str
    answer: str


@dataclass(frozen=True)
class Judgement:
    """A judge's word on one item. There is a value exactly if the status is ok; no two failures share a status.

    ``reply`` is the judge's raw reply where it gave one, whatever the status.
    """

    value: float | None
    status: Status
    reply: str | None = None

    def __post_init__(self) -> None:
        assert (self.value is not None) == (self.status == "ok"), f"value {self.value} with status {self.status}"


class Judge(Protocol):
    """A judge at work. ``name`` says who judged, in tables."""

    name: str

    async def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """One judgement per item, in order. An item that cannot be judged has its status; nothing is left out."""


class NamesTrait:
    """Marks a field that names a trait; engine/ replaces the name by what the metric needs of it (``resolved``)."""


class BaseMetric(Config):
    """Base class of the metrics that a sweep file may name, one subclass per kind of judge.

    Plain data: clients, models and compiled patterns belong to the judge that ``make`` returns. ``semantics`` is
    raised when a fix changes what the same config gives: it is part of the identity of every judgement.
    """

    semantics: ClassVar[int] = 1

    judge: str

    def resolved(self, traits: Mapping[str, Trait]) -> Self:
        """This metric with the named traits replaced by their contents. Raises ConfigError with the field as key
        where a trait is not among ``traits`` or lacks what the metric needs. Doing it twice changes nothing."""
        del traits
        return self

    def identity(self) -> dict[str, Any]:
        """Everything that can change a judgement, as plain JSON: contents, never names or paths.

        The metric must be resolved."""
        return {**self.model_dump(mode="json"), "semantics": self.semantics}

    def make(self) -> Judge:
        """The judge at work. The metric must be resolved."""
        raise NotImplementedError
