"""One grid cell out of a sweep file's sections, a block and the axes, remembering which of them said what.

Mappings merge key by key; anything else replaces what was there. A mapping that says its own kind (``kind``,
``judge``, ``hub``) replaces the earlier one whole: fields of another kind would only be in its way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.config_faults import Path, format_path, show

_ABSENT = object()
_SAYS_ITS_KIND = ("kind", "judge", "hub")


class Merged:
    """A cell's plain data with, for every part, the place in the user's file that it came from.

    ``home`` is where a key belongs that nobody gave: the cell's block.
    """

    def __init__(self, home: str) -> None:
        self._home = home
        self.data: dict[str, Any] = {}
        self._origins: dict[Path, str] = {}

    def add(self, update: Mapping[str, Any], source: str) -> None:
        """Merge ``update`` in; ``source`` is where it stands in the file (empty: the file's top level)."""
        self._merge(self.data, update, (), source)

    def put(self, dotted: str, value: Any, source: str) -> str | None:
        """Merge ``value`` in at a dotted cell path; returns why that is impossible, or None."""
        here: Any = self.data
        path: list[str | int] = []
        *parents, last = dotted.split(".")
        for part in parents:
            index = _index(here, part)
            if index is None:
                return f"{format_path(path) or 'the cell'} is {show(here)}, which has no {part}"
            if isinstance(here, dict) and here.get(part) is None:
                here[part] = {}
                self._origins[(*path, part)] = source
            path.append(index)
            here = here[index]
        index = _index(here, last)
        if index is None:
            return f"{format_path(path)} is {show(here)}, which has no {last}"
        self._set(here, index, value, tuple(path), source)
        return None

    def key(self, path: Path) -> str:
        """``path`` of the cell in the terms of the user's file: ``training.epochs``, ``runs[1].defense.layer``."""
        for length in range(len(path), 0, -1):
            if path[:length] in self._origins:
                return _join(self._origins[path[:length]], path)
        return _join(self._home, path)

    def _merge(self, target: dict[str, Any], update: Mapping[str, Any], path: Path, source: str) -> None:
        for name, value in update.items():
            self._set(target, name, value, path, source)

    def _set(self, target: Any, index: str | int, value: Any, path: Path, source: str) -> None:
        path = (*path, index)
        old = target.get(index) if isinstance(target, dict) else target[index]
        if isinstance(old, dict) and isinstance(value, dict) and not any(name in value for name in _SAYS_ITS_KIND):
            self._merge(old, value, path, source)
            return
        for known in [known for known in self._origins if known[: len(path)] == path]:
            del self._origins[known]
        self._origins[path] = source
        if isinstance(value, dict):
            target[index] = {}
            self._merge(target[index], value, path, source)
        else:
            target[index] = value


def has(block: Any, dotted: str) -> bool:
    """Whether ``block`` says anything at the dotted cell path."""
    return at(block, dotted, _ABSENT) is not _ABSENT


def at(block: Any, dotted: str, default: Any = None) -> Any:
    """What ``block`` says at the dotted cell path, or ``default``."""
    for part in dotted.split("."):
        index = _index(block, part)
        if index is None or (isinstance(block, dict) and index not in block):
            return default
        block = block[index]
    return block


def _index(container: Any, part: str) -> str | int | None:
    if isinstance(container, dict):
        return part
    if isinstance(container, list) and part.isdecimal() and int(part) < len(container):
        return int(part)
    return None


def _join(source: str, path: Sequence[str | int]) -> str:
    return f"{source}.{format_path(path)}" if source else format_path(path)
