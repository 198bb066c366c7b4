"""The degeneration metric: which answers are broken text, by the rules of ``analysis.degeneration``.

It stands beside every trait rate, so that a broken model does not look defended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from analysis.degeneration import SEMANTICS, degeneration
from analysis.judges.base import AsksNobody, BaseMetric, Item, Judgement, Reply


class DegenerationMetric(BaseMetric):
    """1 for an answer that is broken text, else 0."""

    semantics: ClassVar[int] = SEMANTICS

    judge: Literal["degeneration"] = "degeneration"
    """Rules for broken text."""

    def make(self) -> DegenerationJudge:
        return DegenerationJudge()


class DegenerationJudge(AsksNobody):
    """Applies the rules to the answer alone; the status is always ok."""

    name = "degeneration"

    def read(self, item: Item, replies: Sequence[Reply]) -> Judgement:
        del replies
        return Judgement(float(degeneration(item.answer)), "ok")
