"""What a judge is: it asks a model what it needs to know, and gives every answer a number or says why it has none.

A judge is two pure functions. ``requests`` says what a judge model has to be asked about one item; ``read`` makes a
judgement of the item and the replies. Who asks (an endpoint's client, a model in this process) is an ``Asker``, and
replies are kept, so a rule can be applied to them again offline.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Protocol, Self, TypeAlias, get_args

from analysis.traits import Trait
from trainables.base_model import BaseConfig, ResolvedBase
from trainables.config import Config, recipe_of, referenced

Status: TypeAlias = Literal["ok", "refused", "unparsable", "low_mass", "api_error", "budget_exhausted"]
"""What a judge of ours gives; scores of another project's may be ``unrecorded`` or ``filtered`` (analysis/rows.py)."""
ReplyStatus: TypeAlias = Literal["ok", "refused", "api_error", "budget_exhausted"]
AskerKind: TypeAlias = Literal["openai", "local"]

_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}  # JSON has no numbers for these


@dataclass(frozen=True)
class Item:
    """What is judged."""

    question: str
    answer: str


@dataclass(frozen=True)
class Request:
    """One question to a judge model: everything that can change the reply, and nothing else.

    ``model`` is as the endpoint names it; of a local one it is name, revision and dtype. ``top_logprobs`` None: none
    are wanted. ``draw`` is the number of the draw where the same thing is asked several times.
    """

    model: str
    messages: tuple[tuple[str, str], ...]  # (role, content)
    max_tokens: int
    temperature: float
    top_logprobs: int | None
    seed: int | None
    draw: int = 0

    @property
    def id(self) -> str:
        """First 24 hex digits of sha256 over canonical JSON of all fields."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Reply:
    """What came back for one request.

    ``ok``: the model answered, whatever it said. ``refused``: it or its server declined for good (a content filter, a
    prompt that is too long for it), so that asking again would give the same; ``error`` says why. ``api_error`` and
    ``budget_exhausted``: there is no answer yet, and asking again may give one.

    ``top_logprobs`` are (token, natural log of its probability) of the FIRST generated token as they were given:
    duplicates, order and values that are not finite are kept. A local judge gives (number, log P(number)) instead.
    """

    status: ReplyStatus
    text: str | None = None
    top_logprobs: tuple[tuple[str, float], ...] | None = None
    error: str | None = None
    num_prompt_tokens: int | None = None
    num_completion_tokens: int | None = None
    seconds: float | None = None  # wall time of the request, the retries before it not counted
    finish_reason: str | None = None  # of an answer of a run: stop or length

    @property
    def is_final(self) -> bool:
        """Whether this is an answer to keep; else a later invocation asks again."""
        return self.status in ("ok", "refused")

    def to_json(self, *, timing: bool = True) -> str:
        """One line of ASCII JSON without the fields that are None; ``timing`` False: without ``seconds`` too."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        given["seconds"] = self.seconds if timing else None
        if self.top_logprobs is not None:
            given["top_logprobs"] = [[token, _to_number(value)] for token, value in self.top_logprobs]
        kept = {name: value for name, value in given.items() if value is not None}
        return json.dumps(kept, separators=(",", ":"), ensure_ascii=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The reply that ``to_json`` wrote. Raises ValueError for anything that it would not have written."""
        raw = json.loads(text, parse_constant=_no_constant)
        if not isinstance(raw, dict):
            raise ValueError(f"a reply is a JSON object, not {type(raw).__name__}")
        unknown = set(raw) - set(_REPLY_TYPES)
        if unknown:
            raise ValueError(f"a reply has no {', '.join(sorted(unknown))}")
        for name, value in raw.items():
            allowed = _REPLY_TYPES[name]
            if isinstance(value, bool) or not isinstance(value, allowed):
                raise ValueError(f"{name} of a reply cannot be {value!r}")
        if raw.get("status") not in get_args(ReplyStatus):
            raise ValueError(f"status of a reply cannot be {raw.get('status')!r}")
        if "top_logprobs" in raw:
            raw["top_logprobs"] = tuple(_from_pair(pair) for pair in raw["top_logprobs"])
        return cls(**raw)


_REPLY_TYPES: dict[str, Any] = {
    "status": str,
    "text": str,
    "top_logprobs": list,
    "error": str,
    "num_prompt_tokens": int,
    "num_completion_tokens": int,
    "seconds": int | float,
    "finish_reason": str,
}


def _to_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _from_pair(pair: object) -> tuple[str, float]:
    match pair:
        case [str() as token, str() as word] if word in _NOT_FINITE:
            return token, _NOT_FINITE[word]
        case [str() as token, int() | float() as value] if not isinstance(value, bool):
            return token, float(value)
    raise ValueError(f"{pair!r} is not a token with its log-probability")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


@dataclass(frozen=True)
class Judgement:
    """A judge's word on one item. There is a value exactly if the status is ok; no two failures share a status.

    ``reply`` is what the judge model said, whatever the status; None where no model was asked. ``judge``: who judged,
    where a judge leaves some items to another; None: the judge itself.
    """

    value: float | None
    status: Status
    reply: str | None = None
    judge: str | None = None

    def __post_init__(self) -> None:
        assert (self.value is not None) == (self.status == "ok"), f"value {self.value} with status {self.status}"


class Judge(Protocol):
    """A judge at work. ``name`` says who judged, in tables. Both functions are pure."""

    name: str

    def requests(self, item: Item) -> Sequence[Request]:
        """What a model has to be asked about ``item``; empty where none is needed."""

    def read(self, item: Item, replies: Sequence[Reply]) -> Judgement:
        """The judgement, given one reply per request, in order. A bad reply gives a status and never raises."""


class AsksNobody:
    """A judge that needs no model."""

    def requests(self, item: Item) -> Sequence[Request]:
        del item
        return ()


class Asker(Protocol):
    """Who answers requests: a client of an endpoint, or a model in this process."""

    async def ask(self, request: Request) -> Reply:
        """The model's reply; what goes wrong is a status of it."""


class NamesTrait:
    """Marks a field that names a trait; engine/ replaces the name by what the metric needs of it (``resolved``)."""


class BaseMetric(Config):
    """Base class of the metrics that a sweep file may name, one subclass per kind of judge.

    Plain data: clients, models and compiled patterns belong to the judge that ``make`` returns. ``semantics`` is
    raised when a fix changes what the same config gives: it is part of the identity of every judgement.
    """

    semantics: ClassVar[int] = 1

    judge: str
    """Which kind of judge."""

    @property
    def asker(self) -> AskerKind | None:
        """Who answers the requests of this metric's judge; None: it makes none."""
        return None if self.asking is None else self.asking.asker

    @property
    def asking(self) -> BaseMetric | None:
        """The metric whose model is asked: this one, one inside it, or None. It says which endpoint or base."""
        return None

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest value that there can be: (0, 1) is a rate, (0, 100) a score."""
        return (0.0, 1.0)

    @property
    def max_requests(self) -> int:
        """The most requests that one item can take."""
        return 0

    def trait_names(self) -> dict[str, str]:
        """Traits that this metric names: dotted field -> name."""
        return dict(_trait_names(self, ""))

    def bases(self) -> dict[str, BaseConfig]:
        """Models that this metric wants in a worker's memory: dotted field (empty: this metric) -> which."""
        return {}

    def resolved(self, traits: Mapping[str, Trait], bases: Mapping[str, ResolvedBase] | None = None) -> Self:
        """This metric with what it names replaced by contents. Doing it twice changes nothing.

        ``traits`` are by name, ``bases`` by the keys of ``bases()``. Raises ConfigError with the dotted field as key
        where one is not there or lacks what the metric needs.
        """
        del traits, bases
        return self

    def identity(self) -> dict[str, Any]:
        """Everything that can change a judgement, as plain JSON: contents, never names, paths or endpoints.

        The metric must be resolved."""
        return {**recipe_of(self), "semantics": self.semantics}

    def make(self) -> Judge:
        """The judge at work. The metric must be resolved."""
        raise NotImplementedError


def _trait_names(config: Config, prefix: str) -> Iterator[tuple[str, str]]:
    for field, name in referenced(config, NamesTrait).items():
        if isinstance(name, str):
            yield f"{prefix}{field}", name
    for field in type(config).model_fields:
        value = getattr(config, field)
        if isinstance(value, Config):
            yield from _trait_names(value, f"{prefix}{field}.")
