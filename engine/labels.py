"""What the runs of a sweep are called in tables and legends: the defense and what else tells them apart."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from analysis.names import numbered

_MAX_VALUE_CHARACTERS = 60
_FILE = re.compile(r"\S+\.[A-Za-z]\w{1,7}")  # ends like a file's name: rows.jsonl, but not Qwen2.5-7B
_QUESTIONS, _INTERVENTIONS = "evaluation.questions", "evaluation.interventions"
_LONG_CHARACTERS = 24  # such as a path: left out where something shorter tells the same cells apart

Flat = dict[str, object]


def unique_labels(heads: Sequence[str], cells: Sequence[Mapping[str, object]]) -> list[str]:
    """One label per cell, no two equal: its head, then `` name=value`` for all that differs among cells of one head.

    ``heads[i]`` is the label of the defense of cell i (or the user's own), ``cells[i]`` its plain data without
    ``label``. A long value is left out if a shorter one differs among just the same cells, and so are settings of an
    evaluation that change with its questions; files are called without their folder and ending where that tells them
    apart. Where defense labels hide a difference (they round numbers and count prompts), short values of the defense
    are added too; cells that are still called the same get `` #2``, `` #3``.
    """
    flat = [_flatten(cell) for cell in cells]
    labels = list(heads)
    for head in dict.fromkeys(heads):
        group = [index for index, other in enumerate(heads) if other == head]
        outside = [{k: v for k, v in flat[index].items() if not _in_defense(k)} for index in group]
        differing = _without_twins(outside, _differing(outside))
        for index, one in zip(group, _with_short_paths(outside, differing), strict=True):
            labels[index] += _parts(one, differing)
    for label, count in Counter(labels).items():
        if count > 1:
            same = [index for index, other in enumerate(labels) if other == label]
            hidden = [name for name in _differing([flat[index] for index in same]) if _in_defense(name)]
            for index in same:
                labels[index] += _parts(flat[index], hidden, only_short=True)
    return numbered(labels)


def _in_defense(name: str) -> bool:
    return name == "defense" or name.startswith("defense.")


def _is_setting(name: str) -> bool:
    """Of how answers are asked for; what is present meanwhile is none, it is what is tried."""
    return name.startswith("evaluation.") and name not in (_QUESTIONS, _INTERVENTIONS)


def _flatten(value: object, prefix: str = "") -> Flat:
    """Dotted name -> scalar; an empty mapping or list is a value of its own."""
    if isinstance(value, Mapping) and value:
        pairs = [(str(name), item) for name, item in value.items()]
    elif isinstance(value, list | tuple) and value:
        pairs = [(str(index), item) for index, item in enumerate(value)]
    else:
        return {prefix: value}
    flat: Flat = {}
    for name, item in pairs:
        flat |= _flatten(item, f"{prefix}.{name}" if prefix else name)
    return flat


def _differing(flat: Sequence[Flat]) -> list[str]:
    """Names whose value is not the same everywhere, in order of appearance; a name can be absent somewhere."""
    names = dict.fromkeys(name for one in flat for name in one)
    return [name for name in names if len({repr(one[name]) if name in one else None for one in flat}) > 1]


def _with_short_paths(flat: Sequence[Flat], names: Sequence[str]) -> list[Flat]:
    """``flat`` with the stems of files in place of their paths, for those of ``names`` whose values are all files with
    stems of their own."""
    short: dict[str, dict[object, str]] = {}
    for name in names:
        values = [one[name] for one in flat if name in one]
        files = {value for value in values if isinstance(value, str) and _FILE.fullmatch(value)}
        stems: dict[object, str] = {file: PurePath(file).stem for file in files}
        if all(isinstance(value, str) and value in files for value in values) and len(set(stems.values())) == len(
            files
        ):
            short[name] = stems
    return [{name: short[name][value] if name in short else value for name, value in one.items()} for one in flat]


def _without_twins(flat: Sequence[Flat], names: Sequence[str]) -> list[str]:
    """``names`` less those that always differ together with one that says more: those with a long value beside one with
    short values alone, and settings of an evaluation beside its questions."""

    def classes(name: str) -> tuple[int, ...]:
        values = [repr(one[name]) if name in one else None for one in flat]
        return tuple(values.index(value) for value in values)

    long = {name for name in names if any(len(_text(one[name])) > _LONG_CHARACTERS for one in flat if name in one)}
    told = {classes(name) for name in names if name not in long}
    kept = [name for name in names if name not in long or classes(name) not in told]
    asked = {classes(name) for name in kept if name == _QUESTIONS}
    return [name for name in kept if not (_is_setting(name) and classes(name) in asked)]


def _parts(one: Flat, names: Sequence[str], only_short: bool = False) -> str:
    texts = {name: _text(one[name]) for name in names if name in one}
    if only_short:
        texts = {name: text for name, text in texts.items() if len(text) <= _MAX_VALUE_CHARACTERS}
    return "".join(f" {_short(name, names)}={text}" for name, text in texts.items())


def _short(name: str, names: Sequence[str]) -> str:
    """The shortest end of ``name`` that no other of ``names`` has; a number alone says nothing."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        end = parts[-length:]
        if not end[0].isdecimal() and not any(other != name and other.split(".")[-length:] == end for other in names):
            return ".".join(end)
    return name


def _text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else " ".join(str(value).split())
