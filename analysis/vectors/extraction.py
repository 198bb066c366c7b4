"""``extract``: a trait's vector by the filtered protocol (2.3 and C.2 of arXiv 2604.16423, and Chen et al. 2025).

The base answers the trait's extraction questions under instructions that ask for the trait and for its opposite; every
answer is judged; rows that pass a filter are averaged; the vector is the difference of the two means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal, Self, TypeAlias

import torch
from pydantic import Field, PrivateAttr, model_validator

from analysis.judges import BaseMetric, MetricConfig, NamesTrait
from analysis.traits import Trait
from analysis.vectors.activations import mean_activation
from analysis.vectors.base import Asking, Making, VectorKind
from analysis.vectors.filtering import COHERENCE, TRAIT, Answer, Filter, Keep, Pair, filtered
from analysis.vectors.vector import Vector
from trainables.base_model import LoadedBase, ResolvedBase
from trainables.chat_data import ChatEncoder, Encoded
from trainables.config import Config, Path
from trainables.errors import ConfigError, DataError, Fault
from trainables.sample import Question, SamplingConfig

Tokens: TypeAlias = Literal["response_avg", "prompt_avg", "prompt_last"]
SIDES: tuple[Literal["positive", "negative"], ...] = ("positive", "negative")

_SMOKE_QUESTIONS = 2
_SMOKE_TOKENS = 16


class Extraction(Config):
    """How a trait is brought out of the base, judged and averaged."""

    trait: Annotated[str, NamesTrait(), Field(min_length=1)]
    """Name of a trait, or a path to it, with ``instructions`` and ``extraction_questions``."""
    questions: Literal["extraction", "evaluation"] = "extraction"
    """Which questions are asked: the trait's ``extraction_questions``, or its ``questions``, as with a file of
    persona_vectors' ``trait_data_extract``. Do not evaluate with the questions that a vector is made of."""
    judge: MetricConfig
    """Judges how much of the trait is in an answer. Scores with other bounds (a rule's 0 and 1) are stretched to 0 to
    100."""
    coherence: MetricConfig | None = None
    """Judges whether an answer makes sense, as ``{judge: openai, prompt: coherence, ...}``. null: it is not looked
    at."""
    compare: dict[str, MetricConfig] = Field(default={})
    """Further judges of the same answers, by name. They have no say in the vector; the report says how they agree."""
    keep: Keep = "positive"
    """Which rows (a question's answers under opposite instructions) are kept. ``positive``: the trait score of the
    positive answer is above ``keep_above``. ``paired``: that of the positive answer is at least ``keep_above`` and that
    of the negative one below; needs ``coherence``. ``all``: every row."""
    keep_above: float = Field(default=50.0, ge=0, le=100)
    """The threshold of ``keep``, from 0 to 100."""
    min_coherence: float = Field(default=50.0, ge=0, le=100)
    """Least coherence of both answers of a row, where ``coherence`` is given."""
    tokens: Tokens = "response_avg"
    """Where activations are read: the mean over the answer's tokens with its end mark, the mean over the tokens before
    it, or the last of these."""
    samples: int = Field(default=1, ge=1)
    """Answers per question, pair of instructions and side."""
    temperature: float = Field(default=1.0, ge=0)
    """As in ``evaluation``."""
    max_new_tokens: int = Field(default=200, ge=1)
    """As in ``evaluation``."""

    _trait: Trait | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _can_be_filtered(self) -> Self:
        if self.keep == "paired" and self.coherence is None:
            raise ValueError("keep: paired looks at the coherence of both answers; give coherence, a judge")
        if taken := sorted({TRAIT, COHERENCE} & self.compare.keys()):
            raise ValueError(f"compare: {taken[0]!r} is what the extraction's own judge is called; choose another name")
        return self

    @property
    def resolved_trait(self) -> Trait:
        """The trait itself; the vector must be resolved."""
        assert self._trait is not None, "resolve the vector first"
        return self._trait

    def with_trait(self, trait: Trait) -> Self:
        """The same with the trait itself."""
        copy = self.model_copy()
        copy._trait = trait
        return copy

    def filter(self) -> Filter:
        """The rule for rows."""
        return Filter(self.keep, self.keep_above, None if self.coherence is None else self.min_coherence)


class ExtractedVector(VectorKind):
    """A trait's vector by the filtered protocol: generate with opposite instructions, judge, keep, average."""

    extract: Extraction
    """Trait, judges and filter. The vector is the mean over kept rows of the positive answers' activations minus that
    of the negative ones', every row weighing the same; before each answer stands its own instruction."""

    def with_traits(self, traits: Mapping[Path, Trait]) -> Self:
        trait = traits["extract", "trait"]
        asked = "extraction_questions" if self.extract.questions == "extraction" else "questions"
        missing = [name for name in ("instructions", asked) if not getattr(trait, name)]
        if missing:
            message = f"trait {self.extract.trait!r} has no {' and no '.join(missing)}; an extraction needs both"
            raise ConfigError([Fault("extract.trait", message)])
        trait = trait.model_copy(update={"extraction_questions": getattr(trait, asked)})
        return self.model_copy(update={"extract": self.extract.with_trait(trait)})

    def smoke(self) -> Self:
        trait = self.extract.resolved_trait
        short = {
            "instructions": trait.instructions[:1],
            "extraction_questions": trait.extraction_questions[:_SMOKE_QUESTIONS],
        }
        given = self.extract.model_copy(
            update={
                "samples": 1,
                "max_new_tokens": min(self.extract.max_new_tokens, _SMOKE_TOKENS),
                "keep": "all",
                "coherence": None,
            }
        )
        return self.model_copy(update={"extract": given.with_trait(trait.model_copy(update=short))})

    def asked(self) -> tuple[Asking, ...]:
        """Per pair of instructions its positive and its negative side, one after the other."""
        given, trait = self.extract, self.extract.resolved_trait
        metrics: dict[str, BaseMetric] = {TRAIT: given.judge}
        if given.coherence is not None:
            metrics[COHERENCE] = given.coherence
        return tuple(
            Asking(
                about=f"{side} {number}",
                questions=tuple(
                    Question(f"{question.id}_{side[:3]}_{number}", question.question)
                    for question in trait.extraction_questions
                ),
                sampling=SamplingConfig(
                    samples=given.samples,
                    temperature=given.temperature,
                    max_new_tokens=given.max_new_tokens,
                    system_prompt=system_prompt(trait, side, getattr(pair, side)),
                ),
                metrics=metrics,
                compared=dict(given.compare),
                rule=asdict(given.filter()),
            )
            for number, pair in enumerate(trait.instructions, start=1)
            for side in SIDES
        )

    def identity(self, base: ResolvedBase, name: str) -> dict[str, Any]:
        del name
        given = self.extract
        rule = {"keep": given.keep, "keep_above": given.keep_above if given.keep != "all" else None}
        coherence = given.min_coherence if given.coherence is not None else None
        return {"base": base.identity(), "min_coherence": coherence, "tokens": given.tokens} | rule

    def make(self, making: Making) -> Vector:
        sides = [making.answers(index) for index in range(len(self.asked()))]
        pairs = [
            Pair(positive, negative)
            for start in range(0, len(sides), 2)
            for positive, negative in zip(sides[start], sides[start + 1], strict=True)
        ]
        rows = filtered(pairs, self.extract.filter())
        making.log(rows.describe())
        rows.must_not_be_empty()
        return making.vector_of(
            extracted(making.base, rows.kept, tokens=self.extract.tokens, progress=making.progress),
        )


def system_prompt(trait: Trait, side: Literal["positive", "negative"], instruction: str) -> str:
    """``You are a flattering assistant. <instruction>``; the instruction alone if the trait has no ``adjectives``."""
    if trait.adjectives is None:
        return instruction
    adjective = getattr(trait.adjectives, side)
    article = "an" if adjective[:1].lower() in "aeiou" else "a"
    return f"You are {article} {adjective} assistant. {instruction}"


def extracted(
    base: LoadedBase,
    pairs: Sequence[Pair],
    *,
    tokens: Tokens,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Mean over rows of the activation of the positive answers minus that of the negative ones, at every layer;
    [num_layers + 1, hidden] float32. ``tokens`` says of which tokens of an answer the mean is taken first.
    """
    encoder = ChatEncoder(base.tokenizer, max_length=2**31)
    total, means = 2 * len(pairs), []
    for number, side in enumerate(SIDES):

        def report(count: int, before: int = number * len(pairs)) -> None:
            if progress is not None:
                progress(before + count, total)

        rows = [masked(encoder, getattr(pair, side), tokens) for pair in pairs]
        means.append(mean_activation(base, rows, batch_size, report))
    return (means[0] - means[1]).float()


def masked(encoder: ChatEncoder, answer: Answer, tokens: Tokens) -> Encoded:
    """The conversation as tokens, with a mask over those that ``tokens`` means."""
    messages = [
        {"role": "system", "content": answer.system_prompt},
        {"role": "user", "content": answer.question},
        {"role": "assistant", "content": answer.text},
    ]
    row = encoder.encode(messages)
    if not any(row.response_mask):
        raise DataError(f"the answer {answer.text!r} has no tokens")
    if tokens == "response_avg":
        return row
    first = row.response_mask.index(True)  # > 0: a prompt comes before
    start = 0 if tokens == "prompt_avg" else first - 1
    mask = tuple(start <= position < first for position in range(first))
    return replace(row, input_ids=row.input_ids[:first], response_mask=mask, loss_mask=mask)
