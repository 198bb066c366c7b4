"""Which answers a trait's vector is made of: the published filters over judged answers.

A row is a pair: the answer to a question under the positive instruction of a pair of instructions, and the answer with
the same number under the negative one. Scores are compared on a scale from 0 to 100, to which those of a judge with
other bounds (a rule: 0 and 1) are stretched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from trainables.errors import DataError

Keep: TypeAlias = Literal["positive", "paired", "all"]

TRAIT = "trait"
COHERENCE = "coherence"
_NUM_EXAMPLES = 2  # per reason
_SHOWN_CHARACTERS = 100


@dataclass(frozen=True)
class Score:
    """A judgement: ``value`` from 0 to 100, or None with the status that says why."""

    value: float | None
    status: str


@dataclass(frozen=True)
class Answer:
    """An answer with its scores by metric."""

    question: str
    system_prompt: str
    text: str
    scores: Mapping[str, Score]


@dataclass(frozen=True)
class Pair:
    """A row: answers to one question under opposite instructions."""

    positive: Answer
    negative: Answer


@dataclass(frozen=True)
class Filter:
    """A rule for rows.

    ``positive`` (sections 2.3 and C.2 of arXiv 2604.16423): the trait score of the positive answer is ABOVE
    ``keep_above``. ``paired`` (the persona vectors' mask): that of the positive answer is at least ``keep_above``, that
    of the negative one below it. ``all``: no score is looked at. With ``min_coherence`` both answers must reach it.
    An answer without text has no tokens to read and is always removed.
    """

    keep: Keep
    keep_above: float
    min_coherence: float | None

    def reason_of(self, positive: Answer, negative: Answer) -> str | None:
        """``reason`` of the row of these two."""
        return self.reason(Pair(positive, negative))

    def reason(self, pair: Pair) -> str | None:
        """Why the row is removed, in a few words; None: it is kept."""
        for side, answer in (("positive", pair.positive), ("negative", pair.negative)):
            if not answer.text.strip():
                return f"{side} answer is empty"
        if self.keep == "all":
            return None
        wanted = [("positive", pair.positive)] + ([("negative", pair.negative)] if self.keep == "paired" else [])
        for side, answer in wanted:
            score = answer.scores[TRAIT]
            if score.value is None:
                return f"{side} answer has no trait score ({score.status})"
            if side == "positive" and self.keep == "positive" and not score.value > self.keep_above:
                return f"positive answer scores {self.keep_above:g} or less"
            if side == "positive" and self.keep == "paired" and not score.value >= self.keep_above:
                return f"positive answer scores less than {self.keep_above:g}"
            if side == "negative" and not score.value < self.keep_above:
                return f"negative answer scores {self.keep_above:g} or more"
        if self.min_coherence is not None:
            for side, answer in (("positive", pair.positive), ("negative", pair.negative)):
                coherence = answer.scores[COHERENCE]
                if coherence.value is None:
                    return f"{side} answer has no coherence score ({coherence.status})"
                if not coherence.value >= self.min_coherence:
                    return f"{side} answer's coherence is less than {self.min_coherence:g}"
        return None


@dataclass
class Filtered:
    """Rows that are kept, and how many were removed for which reason, with examples."""

    kept: list[Pair] = field(default_factory=list)
    removed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Pair]] = field(default_factory=dict)

    def describe(self) -> str:
        """``12 of 60 rows are left; removed: 40 (positive answer scores 50 or less), 8 (...)``."""
        total = len(self.kept) + self.removed.total()
        reasons = [f"{count} ({reason})" for reason, count in self.removed.most_common()]
        return f"{len(self.kept)} of {total} rows are left" + (f"; removed: {', '.join(reasons)}" if reasons else "")

    def must_not_be_empty(self) -> None:
        """Raise DataError with all counts and some examples if no row is left."""
        if not self.kept:
            shown = [_example(reason, pair) for reason, pairs in self.examples.items() for pair in pairs]
            raise DataError(f"no vector can be made: {self.describe()}. For example:\n" + "\n".join(shown))


def filtered(pairs: Sequence[Pair], rule: Filter) -> Filtered:
    """Apply a filter to rows; each row is removed for the first reason that holds."""
    result = Filtered()
    for pair in pairs:
        reason = rule.reason(pair)
        if reason is None:
            result.kept.append(pair)
            continue
        result.removed[reason] += 1
        examples = result.examples.setdefault(reason, [])
        if len(examples) < _NUM_EXAMPLES:
            examples.append(pair)
    return result


def _example(reason: str, pair: Pair) -> str:
    answer = pair.negative if reason.startswith("negative") else pair.positive
    scores = ", ".join(
        f"{name} {score.status if score.value is None else format(score.value, '.1f')}"
        for name, score in answer.scores.items()
    )
    return f"  - {reason}: {_cut(answer.question)!r} -> {_cut(answer.text)!r} ({scores})"


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 4] + " ..."
