"""The kinds of metrics and their judges. To add one, write its file and list its class in ``MetricConfig``."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from analysis.judges.base import BaseMetric, Item, Judge, Judgement, NamesTrait, Status
from analysis.judges.degeneration import DegenerationMetric
from analysis.judges.rule import RuleMetric

MetricConfig: TypeAlias = Annotated[RuleMetric | DegenerationMetric, Field(discriminator="judge")]

__all__ = [
    "BaseMetric",
    "DegenerationMetric",
    "Item",
    "Judge",
    "Judgement",
    "MetricConfig",
    "NamesTrait",
    "RuleMetric",
    "Status",
]
