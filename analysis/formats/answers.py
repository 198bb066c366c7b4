"""What the tables of other projects share: answers numbered per question, scores from a cell, names of metrics."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from analysis.formats.base import Foreign, ImportedScore
from trainables.errors import Fault
from trainables.rows import GenerationRow

SCORE: tuple[float, float] = (0.0, 100.0)
UNKNOWN = "unknown"


class Numbering:
    """Numbers of answers to a question, in the order in which they come."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def next(self, question_id: str) -> int:
        self._counts[question_id] += 1
        return self._counts[question_id] - 1


def answer_row(
    question_id: str, sample_index: int, question: str, answer: str, system_prompt: str | None = None
) -> GenerationRow:
    """An answer of a table that says neither how many tokens it has nor why it ended."""
    return GenerationRow(
        sample_id="",
        question_id=question_id,
        sample_index=sample_index,
        question=question,
        system_prompt=system_prompt,
        answer=answer,
        num_tokens=None,
        finish_reason=UNKNOWN,
    )


def metric_name(text: str) -> str:
    """A column's or judge's name as a metric of ours: letters, digits and underscores."""
    name = re.sub(r"[^A-Za-z0-9_]+", "_", text).strip("_")
    return f"_{name}" if not name or name[0].isdigit() else name


def cell_score(
    file: Foreign, line: int, column: str, cell: str, answer: GenerationRow, scale: tuple[float, float] | None
) -> ImportedScore | Fault:
    """The score in a cell of a table. An empty cell is a refusal or a failure: which one is not recorded."""
    text = cell.strip()
    value = None
    if text and text.lower() not in ("nan", "none"):
        try:
            value = float(text)
        except ValueError:
            return file.fault(f"{column} must be a number or empty; got {cell!r}", str(line))
        if not math.isfinite(value) or (scale is not None and not scale[0] <= value <= scale[1]):
            allowed = f"from {scale[0]:g} to {scale[1]:g}" if scale is not None else "finite"
            return file.fault(f"{column} must be {allowed}; got {cell!r}", str(line))
    status = "ok" if value is not None else "unrecorded"
    return ImportedScore(answer.question_id, answer.sample_index, value, status, f"{file.path.name}:{column}")


def repeated(file: Foreign, names: Sequence[str]) -> list[Fault]:
    """Columns that are there twice, also once they are names of metrics."""
    return [file.fault(f"two columns are called {name!r}") for name, count in Counter(names).items() if count > 1]
