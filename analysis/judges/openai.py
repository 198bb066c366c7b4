"""The openai judge: a model behind an OpenAI-compatible endpoint says a number, or YES or NO.

``mode: logprobs`` reads the probabilities of ONE generated token, as published (``analysis.judges.scoring``). An
endpoint that gives none needs ``mode: text``: the reply must be the answer and nothing else, drawn ``samples`` times.
There is no falling back from one to the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from analysis.judges import scoring
from analysis.judges.base import AskerKind, BaseMetric, Item, Judgement, Reply, Request
from analysis.judges.prompted import MIN_MASS, MinMass, PromptSource
from analysis.traits import Trait
from trainables.base_model import ResolvedBase

MAX_TEXT_TOKENS = 8
"""Tokens that a reply in words may take: enough for a number with white space, too few for an essay."""


class OpenaiMetric(PromptSource, BaseMetric):
    """A score by a model behind an OpenAI-compatible endpoint. The prompt is given, or that of a trait."""

    judge: Literal["openai"] = "openai"
    """A model behind an endpoint."""
    model: str = Field(default="gpt-4.1-mini", min_length=1)
    """The model as the endpoint names it."""
    endpoint: str = Field(default="openai", min_length=1)
    """Which of the sweep's ``endpoints``. It is in no identity: the same model at another address is the same judge."""
    scale: scoring.Scale = "0-100"
    """What the prompt asks for: a whole number from 0 to 100, or YES or NO (a value from 0 to 1)."""
    mode: Literal["logprobs", "text"] = "logprobs"
    """``logprobs``: the probabilities of one generated token, as published. ``text``: what the model writes, which must
    be the answer and nothing else; for endpoints without log-probabilities."""
    min_probability_mass: MinMass = MIN_MASS
    """Least probability of all tokens that are answers; below it there is no score (status ``low_mass``). For
    ``mode: logprobs``."""
    top_logprobs: int = Field(default=20, ge=1, le=20)
    """How many of the likeliest tokens are asked for. For ``mode: logprobs``."""
    samples: int = Field(default=1, ge=1, le=100)
    """How often it is asked; the score is the mean of what could be read. One is drawn at temperature 0, several at 1.
    For ``mode: text``."""

    @model_validator(mode="after")
    def _nothing_without_a_say(self) -> Self:
        other = ("samples",) if self.mode == "logprobs" else ("min_probability_mass", "top_logprobs")
        idle = [name for name in other if getattr(self, name) != type(self).model_fields[name].default]
        if idle:
            needed = "text" if self.mode == "logprobs" else "logprobs"
            raise ValueError(
                f"{' and '.join(idle)} would do nothing with mode: {self.mode}; leave out, or set mode: {needed}"
            )
        return self

    @property
    def asker(self) -> AskerKind:
        return "openai"

    @property
    def asking(self) -> OpenaiMetric:
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        return scoring.bounds(self.scale)

    @property
    def max_requests(self) -> int:
        return self.samples

    def resolved(self, traits: Mapping[str, Trait], bases: Mapping[str, ResolvedBase] | None = None) -> Self:
        del bases
        return self.with_template(traits)

    def identity(self) -> dict[str, Any]:
        """Without the endpoint: the same model behind another address is the same judge."""
        head = {"judge": self.judge, "semantics": self.semantics, "scoring": scoring.SEMANTICS, "model": self.model}
        head |= {"prompt": self.template, "scale": self.scale, "mode": self.mode}
        if self.mode == "text":
            return head | {"samples": self.samples}
        return head | {"min_probability_mass": self.min_probability_mass, "top_logprobs": self.top_logprobs}

    def make(self) -> OpenaiJudge:
        return OpenaiJudge(self)


class OpenaiJudge:
    """Asks for one token with its alternatives, or for ``samples`` replies in words."""

    def __init__(self, metric: OpenaiMetric) -> None:
        assert metric.prompt is not None, "resolve the metric first"
        self.metric = metric
        self.name = f"openai:{metric.model}"

    def requests(self, item: Item) -> Sequence[Request]:
        metric, messages = self.metric, self.metric.messages(item)
        if metric.mode == "logprobs":
            return (Request(metric.model, messages, 1, 0.0, metric.top_logprobs, seed=0),)
        temperature = 0.0 if metric.samples == 1 else 1.0
        # The seed differs from draw to draw: with one seed, a server that honours it would give one reply n times.
        return tuple(
            Request(metric.model, messages, MAX_TEXT_TOKENS, temperature, None, seed=draw, draw=draw)
            for draw in range(metric.samples)
        )

    def read(self, item: Item, replies: Sequence[Reply]) -> Judgement:
        del item  # the model has seen it
        if self.metric.mode == "text":
            return read_draws(replies, self.metric.scale)
        (reply,) = replies
        return read_logprobs(reply, self.metric.scale, self.metric.min_probability_mass)


def read_logprobs(reply: Reply, scale: scoring.Scale, min_mass: float) -> Judgement:
    """The judgement by the log-probabilities of one reply, which is kept whole."""
    kept = reply.to_json(timing=False)
    if reply.status != "ok":
        return Judgement(None, reply.status, kept)
    value, status = scoring.score(reply.top_logprobs, scale, min_mass)
    return Judgement(value, status, kept)


def read_draws(replies: Sequence[Reply], scale: scoring.Scale) -> Judgement:
    """The mean over the draws that can be read; for YES and NO the share of YES. All replies are kept, with the number
    of those that entered the mean.

    While a draw has no answer yet there is no value: it would change when the draw is made. ``refused``: every draw is.
    """
    values, statuses = [], []
    for reply in replies:
        value, status = scoring.read_text(reply.text, scale) if reply.status == "ok" else (None, reply.status)
        statuses.append(status)
        if value is not None:
            values.append(value)
    said = ",".join(reply.to_json(timing=False) for reply in replies)
    kept = f'{{"num_parsed":{len(values)},"replies":[{said}]}}'
    for open_status in ("budget_exhausted", "api_error"):
        if open_status in statuses:
            return Judgement(None, open_status, kept)
    if values:
        return Judgement(math.fsum(values) / len(values), "ok", kept)
    return Judgement(None, "refused" if set(statuses) == {"refused"} else "unparsable", kept)


def kept_replies(text: str) -> tuple[Reply, ...]:
    """The replies behind a judgement, from its ``reply`` column. Raises ValueError if no judge wrote it."""
    raw = json.loads(text)
    replies = raw["replies"] if isinstance(raw, dict) and "replies" in raw else [raw]
    return tuple(Reply.from_json(json.dumps(reply)) for reply in replies)
