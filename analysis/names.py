"""Names that a reader tells apart."""

from __future__ import annotations

from collections.abc import Sequence


def numbered(labels: Sequence[str]) -> list[str]:
    """The labels in their order, with `` #2``, `` #3`` after those that were there before; no two are equal."""
    taken: set[str] = set()
    result = []
    for label in labels:
        unique, number = label, 1
        while unique in taken or (number > 1 and unique in labels):
            number += 1
            unique = f"{label} #{number}"
        taken.add(unique)
        result.append(unique)
    return result
