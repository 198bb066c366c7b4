"""The kinds of metrics and their judges. To add one, write its file and list its class in ``MetricConfig``."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from analysis.judges.base import (
    Asker,
    AskerKind,
    BaseMetric,
    Item,
    Judge,
    Judgement,
    NamesTrait,
    Reply,
    ReplyStatus,
    Request,
    Status,
)
from analysis.judges.degeneration import DegenerationMetric
from analysis.judges.hybrid import HybridMetric
from analysis.judges.known_answer import KnownAnswerMetric
from analysis.judges.local import LocalMetric
from analysis.judges.openai import OpenaiMetric
from analysis.judges.rule import RuleMetric

MetricConfig: TypeAlias = Annotated[
    RuleMetric | KnownAnswerMetric | DegenerationMetric | OpenaiMetric | LocalMetric | HybridMetric,
    Field(discriminator="judge"),
]

__all__ = [
    "Asker",
    "AskerKind",
    "BaseMetric",
    "DegenerationMetric",
    "HybridMetric",
    "Item",
    "Judge",
    "Judgement",
    "KnownAnswerMetric",
    "LocalMetric",
    "MetricConfig",
    "NamesTrait",
    "OpenaiMetric",
    "Reply",
    "ReplyStatus",
    "Request",
    "RuleMetric",
    "Status",
]
