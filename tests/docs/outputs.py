"""Comparing what a page shows with what is printed, in what does not depend on the machine or on luck."""

from __future__ import annotations

import re

_ID = re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{12}\b|\b[0-9a-f]{12}(?=…)")
_NUMBER = re.compile(r"(?<![\w.])(?:(?:\d+h)?(?:\d+m)?\d+s\b|[+-]?\d+(?:[.:]\d+)*(?:e[+-]?\d+)?)")  # 1.5, 12:30, 3m04s
_LINE = re.compile(r"[─━═╴╶╸╺_=-]{4,}")
GAP = "…"


def stable(text: str) -> list[str]:
    """Lines without what varies: numbers and ids are #, spaces and drawn lines count for nothing."""
    lines = []
    for line in text.splitlines():
        line = _NUMBER.sub("#", _ID.sub("#", _LINE.sub(" ", line)))
        line = " ".join(line.split())
        if line:
            lines.append(line)
    return lines


def missing(shown: str, printed: str) -> str | None:
    """The first line of ``shown`` that ``printed`` does not have in its place, or None.

    ``…`` stands for any text within a line, and alone in a line for any lines. Without it nothing may be left out.
    """
    lines = stable(printed)
    at = 0
    gap = False
    for line in stable(shown):
        if line == GAP:
            gap = True
            continue
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in line.split(GAP)))
        here = range(at, len(lines)) if gap else range(at, min(at + 1, len(lines)))
        found = next((number for number in here if pattern.fullmatch(lines[number])), None)
        if found is None:
            return line
        at, gap = found + 1, False
    return None if gap or at == len(lines) else f"(nothing, where it prints {lines[at]!r})"
