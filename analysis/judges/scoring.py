"""From what a judge model said to a value and a status. Pure functions of replies, to be applied again offline.

The rules are the published ones (persona vectors, Chen et al. 2025): over the log-probabilities of ONE generated token,

- 0-100: score = sum(n p_n) / sum(p_n) over tokens that are whole numbers n from 0 to 100; none if sum(p_n) is below
  ``min_mass``;
- YES/NO: P(YES) / (P(YES) + P(NO)); none if REFUSAL is more probable than YES and than NO, or if P(YES) + P(NO) is
  below ``min_mass``.

Fixed here, where the published rule is silent or a program's habit:

- A token counts after ASCII white space around it is taken away, and only in the one canonical way to write it:
  ``0|[1-9][0-9]?|100``. Python's int() would also take "٥", "+5", "1_0" and "007"; none of these is a number here.
- Probabilities of tokens that then say the same add up.
- A beginning of REFUSAL of three letters or more counts as REFUSAL: many vocabularies have no token for the whole word.
- On the 0-100 scale REFUSAL takes no score away, as published; where there is none, it says why: ``refused`` if it
  outweighs the numbers, else ``low_mass``.
- A log-probability that is NaN or above 0 by more than rounding makes the whole reply ``unparsable``; -inf is
  probability 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from analysis.judges.base import Status

Scale: TypeAlias = Literal["0-100", "yes-no"]
Verdict: TypeAlias = tuple[float | None, Status]

SEMANTICS = 1
"""Raised when a fix changes the value or status of the same replies."""

_NUMBER = re.compile(r"0|[1-9][0-9]?|100")
_SPACE = " \t\n\r\v\f"
_ROUNDING = 0.01  # a server's rounding can put a sure token a little above 0; more is not a log-probability
_REFUSAL = "REFUSAL"
_SHORTEST_REFUSAL = 3


def number(text: str) -> int | None:
    """The whole number from 0 to 100 that ``text`` is, ASCII white space around it aside; else None."""
    text = text.strip(_SPACE)
    return int(text) if _NUMBER.fullmatch(text) else None


def is_refusal(text: str) -> bool:
    """Whether ``text`` is REFUSAL or a beginning of it that cannot be meant otherwise."""
    text = text.strip(_SPACE)
    return len(text) >= _SHORTEST_REFUSAL and _REFUSAL.startswith(text)


def bounds(scale: Scale) -> tuple[float, float]:
    """The least and the greatest value on a scale."""
    return (0.0, 100.0) if scale == "0-100" else (0.0, 1.0)


def score(top_logprobs: Sequence[tuple[str, float]] | None, scale: Scale, min_mass: float) -> Verdict:
    """Value and status by the rule of ``scale``; ``unparsable`` without log-probabilities."""
    if not top_logprobs or any(not value <= _ROUNDING for _, value in top_logprobs):  # NaN fails the comparison too
        return None, "unparsable"
    return _numbers(top_logprobs, min_mass) if scale == "0-100" else _yes_no(top_logprobs, min_mass)


def read_text(text: str | None, scale: Scale) -> Verdict:
    """Value and status of a reply in words, which must be the number (or YES or NO) and nothing else."""
    said = (text or "").strip(_SPACE)
    value = number(said) if scale == "0-100" else {"YES": 1, "NO": 0}.get(said)
    if value is not None:
        return float(value), "ok"
    return None, "refused" if said == _REFUSAL else "unparsable"


def _numbers(top_logprobs: Sequence[tuple[str, float]], min_mass: float) -> Verdict:
    weights = [(n, math.exp(value)) for token, value in top_logprobs if (n := number(token)) is not None]
    mass = math.fsum(p for _, p in weights)
    if mass >= min_mass:
        mean = math.fsum(n * p for n, p in weights) / mass
        return min(max(mean, 0.0), 100.0), "ok"  # rounding can reach beyond 100
    return None, "refused" if _mass(top_logprobs, is_refusal) > mass else "low_mass"


def _yes_no(top_logprobs: Sequence[tuple[str, float]], min_mass: float) -> Verdict:
    yes = _mass(top_logprobs, lambda token: token.strip(_SPACE) == "YES")
    no = _mass(top_logprobs, lambda token: token.strip(_SPACE) == "NO")
    if _mass(top_logprobs, is_refusal) > max(yes, no):
        return None, "refused"
    if yes + no < min_mass:
        return None, "low_mass"
    return yes / (yes + no), "ok"


def _mass(top_logprobs: Sequence[tuple[str, float]], counts: Callable[[str], bool]) -> float:
    return math.fsum(math.exp(value) for token, value in top_logprobs if counts(token))
