"""The local judge: a Hugging Face model says a number, read from the exact distribution over 0..100.

The distribution is that of ``analysis.judges.number_paths``: over all ways to write a number in tokens, with the
probability that no further digit follows. So it is another measure than the one-token rule of an endpoint, and has
another name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, PrivateAttr

from analysis.judges import scoring
from analysis.judges.base import AskerKind, BaseMetric, Item, Judgement, Reply, Request
from analysis.judges.openai import read_logprobs
from analysis.judges.prompted import MIN_MASS, MinMass, PromptSource
from analysis.traits import Trait
from trainables.base_model import BaseConfig, ResolvedBase

NUMBER_SEMANTICS = 1
"""Raised when a fix changes the distribution that ``LocalAsker`` computes: it is in the name of the asked model."""

FOLDER = "folder"
"""What ``resolve_base`` calls every local folder; its revision, a hash of its content, tells them apart."""

_NUM_NUMBERS = 101
_MAX_DIGITS = 3


class LocalMetric(PromptSource, BaseMetric):
    """A score from 0 to 100 by a model in a worker's memory: the mean of its exact distribution over the numbers. The
    prompt is given, or that of a trait."""

    judge: Literal["local"] = "local"
    """A model in memory."""
    model: str = Field(min_length=1)
    """As in ``base``: ``embedded:smollm2-135m-instruct``, a local folder, or a Hugging Face id."""
    revision: str | None = None
    """As in ``base``."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """As in ``base``. It is part of the identity of the judgements."""
    min_probability_mass: MinMass = MIN_MASS
    """Least probability of all numbers together; below it there is no score (status ``low_mass``)."""

    _base: ResolvedBase | None = PrivateAttr(default=None)

    @property
    def asker(self) -> AskerKind:
        return "local"

    @property
    def asking(self) -> LocalMetric:
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        return scoring.bounds("0-100")

    @property
    def max_requests(self) -> int:
        return 1

    @property
    def base(self) -> ResolvedBase:
        """The model to load; the metric must be resolved."""
        assert self._base is not None, "resolve the metric first"
        return self._base

    def bases(self) -> dict[str, BaseConfig]:
        return {"": BaseConfig(model=self.model, revision=self.revision, dtype=self.dtype)}

    def resolved(self, traits: Mapping[str, Trait], bases: Mapping[str, ResolvedBase] | None = None) -> Self:
        metric = self.with_template(traits)
        base = (bases or {}).get("", self._base)
        assert base is not None, "a local judge is resolved with its base"
        metric = metric.model_copy(update={"revision": base.revision, "dtype": base.dtype})
        metric._base = base
        return metric

    def identity(self) -> dict[str, Any]:
        return {
            "judge": self.judge,
            "semantics": self.semantics,
            "scoring": scoring.SEMANTICS,
            "numbers": NUMBER_SEMANTICS,
            "base": self.base.identity(),
            "prompt": self.template,
            "min_probability_mass": self.min_probability_mass,
        }

    def make(self) -> LocalJudge:
        return LocalJudge(self)


class LocalJudge:
    """Asks for the distribution over all numbers and takes its mean."""

    def __init__(self, metric: LocalMetric) -> None:
        self.metric = metric
        base = metric.base
        self.name = f"local:{base.model}" + (f"@{base.revision[:12]}" if base.model == FOLDER else "")
        self.model = asked_model(base)

    def requests(self, item: Item) -> Sequence[Request]:
        return (Request(self.model, self.metric.messages(item), _MAX_DIGITS, 0.0, _NUM_NUMBERS, seed=None),)

    def read(self, item: Item, replies: Sequence[Reply]) -> Judgement:
        del item  # the model has seen it
        (reply,) = replies
        return read_logprobs(reply, "0-100", self.metric.min_probability_mass)


def asked_model(base: ResolvedBase) -> str:
    """How requests name the model: all that can change its distribution."""
    return f"local:{base.model}@{base.revision},{base.dtype},numbers={NUMBER_SEMANTICS}"
