"""Which of a run's own answers make a pile, and the tokens of an answer that a gradient is taken of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from trainables.chat_data import ChatEncoder, Encoded
from trainables.errors import DataError


@dataclass(frozen=True)
class JudgedAnswer:
    """An answer and what every metric said of it: ``shown``, ``absent``, or the status that says why it has no score.

    ``is_cut``: sampling stopped it before it had come to its end.
    """

    question: str
    system_prompt: str | None
    text: str
    is_cut: bool
    verdicts: Mapping[str, str]


SHOWN, ABSENT = "shown", "absent"


def verdict(value: float | None, status: str, bounds: tuple[float, float]) -> str:
    """What a score says: ``shown`` above the middle of the metric's scale, ``absent`` up to it, else its status."""
    if value is None:
        return status
    return SHOWN if value > (bounds[0] + bounds[1]) / 2 else ABSENT


def belongs(answer: JudgedAnswer, where: Mapping[str, bool]) -> bool:
    """Whether every metric of ``where`` says of the answer what is wanted there: that it shows the behaviour, or that
    it does not. An answer that has no score by one of them, or no text, is in no pile."""
    wanted = {metric: SHOWN if shown else ABSENT for metric, shown in where.items()}
    return bool(answer.text.strip()) and all(answer.verdicts[metric] == said for metric, said in wanted.items())


def must_not_be_empty(name: str, answers: Sequence[JudgedAnswer], piles: Mapping[str, Mapping[str, bool]]) -> None:
    """Raise DataError if no answer is in the pile ``name``; it says how many are in every pile and why others are in
    none."""
    counts = {pile: sum(belongs(answer, where) for answer in answers) for pile, where in piles.items()}
    if counts[name]:
        return
    unscored = Counter(
        f"{metric}: {said}"
        for answer in answers
        for metric, said in answer.verdicts.items()
        if said not in (SHOWN, ABSENT)
    )
    without = sum(not answer.text.strip() for answer in answers)
    notes = [f"{count} have no score ({what})" for what, count in sorted(unscored.items())]
    notes += [f"{without} have no text"] if without else []
    held = ", ".join(f"{pile} {count}" for pile, count in counts.items())
    more = f"; {', '.join(notes)}" if notes else ""
    raise DataError(
        f"the pile {name!r} is empty, so it has no mean gradient: of {len(answers)} answers the piles hold {held}"
        f"{more}; sample more answers, or define the pile otherwise"
    )


def encoded_answer(encoder: ChatEncoder, answer: JudgedAnswer) -> Encoded:
    """The conversation as tokens. An answer that was cut ends with its last token: that it should stop there, by its
    end mark, is nothing that the model has said."""
    system = [] if answer.system_prompt is None else [{"role": "system", "content": answer.system_prompt}]
    turn = [{"role": "user", "content": answer.question}, {"role": "assistant", "content": answer.text}]
    row = encoder.encode([*system, *turn])
    marked = [position for position, on in enumerate(row.response_mask) if on]
    if not answer.is_cut or not marked or row.input_ids[marked[-1]] != encoder.end_mark_id:
        return row
    end = marked[-1]
    return replace(
        row, input_ids=row.input_ids[:end], response_mask=row.response_mask[:end], loss_mask=row.loss_mask[:end]
    )
