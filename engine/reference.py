"""The reference of what a user may write, made from the models that check it.

Every key of a sweep file and of a trait file, with what may stand there, its default and its meaning. The models are
the only place where these are said: the meaning of a key is the text under its field, that of a section its model's
docstring. So a new field, defense, judge or kind of vector is in the reference without being listed anywhere.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from analysis.traits import Trait
from engine.cells import SECTIONS
from engine.config_faults import nearest
from engine.sweep_models import Cell, SweepFile
from trainables.config import Config
from trainables.errors import ConfigError, Fault

REQUIRED = "required"
_MEASURE = "measure"

_SCALARS: Mapping[object, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    types.NoneType: "null",
}
_BOUNDS = (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most"))

# A block of `runs` is checked after merging with the sections: it needs less than the cell that comes out.
_BLOCK_VALUES = {"defense": "`none`, a mapping or a list of mappings", **dict.fromkeys(SECTIONS, "mapping")}
_BLOCK_DEFAULTS = {"label": "made from the defense", **dict.fromkeys(SECTIONS, "as above")}


@dataclass(frozen=True)
class Key:
    """One key: what may stand there, what holds without it (``REQUIRED``: nothing), and what it means.

    ``sections`` are the titles of the sections that say what is inside it.
    """

    name: str
    value: str
    default: str
    meaning: str
    sections: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """A mapping that a user may write: ``path`` is where it stands, ``kind`` which one of several it is (or empty)."""

    path: str
    kind: str
    meaning: str
    keys: tuple[Key, ...]

    @property
    def title(self) -> str:
        return f"{self.path}: {self.kind}" if self.kind else self.path


def sweep_sections() -> tuple[Section, ...]:
    """The sections of a sweep file, each before what is inside it; the top level, first, has the path ``""``."""
    return tuple(_sections("", "", SweepFile, {}))


def trait_sections() -> tuple[Section, ...]:
    """The sections of a ``trait.yaml``, in the same order."""
    return tuple(_sections("", "", Trait, {}))


def find_sections(word: str) -> list[Section]:
    """The sections of a sweep file that ``word`` may mean: a path (``training``) with what is inside it, a kind
    (``pps``), or a key (``epochs``, ``training.epochs``), of which the sections hold nothing else then.

    Raises ConfigError if it is none of these.
    """
    sections = sweep_sections()
    found = [
        one
        for one in sections
        if word in (one.path, one.kind, one.path.rpartition(".")[2]) or one.path.startswith(f"{word}.")
    ]
    if not found:
        alone = [
            replace(one, keys=tuple(key for key in one.keys if word in (key.name, f"{one.path}.{key.name}")))
            for one in sections
        ]
        found = [one for one in alone if one.keys]
    if not found:
        known = dict.fromkeys(name for one in sections for name in (one.kind, *(key.name for key in one.keys)) if name)
        raise ConfigError(
            [Fault(word, f"no section, kind or key of a sweep file; {nearest(word, known)}")], "nothing was read"
        )
    return found


def _sections(path: str, kind: str, model: type[Config], described: dict[type[Config], str]) -> Iterator[Section]:
    """``described``: the models that have a section already, with its title. What measurements share with runs, or
    among themselves, is not said again."""
    title = Section(path, kind, "", ()).title
    described.setdefault(model, title)
    keys: list[Key] = []
    inner: list[Section] = []
    for name, field in model.model_fields.items():
        found = list(_models(f"{path}.{name}".removeprefix("."), _annotation(model, name, field)))
        titles = []
        for place, one in found:
            if place.startswith(f"{_MEASURE}.") and one in described:
                titles.append(described[one])
                continue
            below = list(_sections(place, _kind(one, several=len(found) > 1), one, described))
            titles.append(below[0].title)
            inner += below
        keys.append(_key(model, name, field, tuple(titles)))
    yield Section(path, kind, _one_line(model.__doc__), tuple(keys))
    yield from inner


def _annotation(model: type[Config], name: str, field: FieldInfo) -> Any:
    """What stands at a key, where the model of the file leaves it open because it is checked in every cell."""
    if model is SweepFile and name == "runs":
        return Cell
    if model is SweepFile and name in SECTIONS:
        return Cell.model_fields[name].annotation
    if model is Cell and name in SECTIONS:
        return None  # described with the file's section of that name
    return field.annotation


def _models(path: str, annotation: Any) -> Iterator[tuple[str, type[Config]]]:
    """(place, model) of every config that may stand at ``path``; ``<name>`` stands for names that the user gives."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield path, annotation
    elif origin is dict:
        yield from _models(f"{path}.<name>", arguments[1])
    elif origin is Annotated:
        yield from _models(path, arguments[0])
    elif origin in (tuple, Union, types.UnionType):
        for argument in arguments:
            yield from _models(path, argument)


def _kind(model: type[Config], *, several: bool) -> str:
    """What tells ``model`` from the others at its place: the one value of its tag, or else the key it must have."""
    for field in model.model_fields.values():
        if _is_tag(field):
            return str(field.default)
    required = [name for name, field in model.model_fields.items() if field.is_required()]
    return required[0] if several else ""


def _is_tag(field: FieldInfo) -> bool:
    """Whether the field is there to say which of several models is meant, such as ``kind: pps``."""
    return get_origin(field.annotation) is Literal and get_args(field.annotation) == (field.default,)


def _key(model: type[Config], name: str, field: FieldInfo, sections: tuple[str, ...]) -> Key:
    value = _value(field.annotation, field.metadata)
    default = REQUIRED if field.is_required() or _is_tag(field) else _default(field.default)
    if (
        model is SweepFile
        and name in SECTIONS
        and any(
            inner.is_required()
            for _, one in _models("", _annotation(model, name, field))
            for inner in one.model_fields.values()
        )
    ):
        default = "required, here or in every block"
    if model is Cell:
        value = _BLOCK_VALUES.get(name, value)
        default = _BLOCK_DEFAULTS.get(name, default)
    meaning = _one_line(field.description) or ("Which kind it is." if _is_tag(field) else "")
    return Key(name, value, default, meaning, sections)


def _value(annotation: Any, metadata: Sequence[object] = ()) -> str:
    """What may stand there, in words. Raises TypeError for a kind of annotation that has none yet."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _value(arguments[0], [*metadata, *arguments[1:]])
    if origin in (Union, types.UnionType):
        options = list(dict.fromkeys(_value(argument, metadata) for argument in arguments))
        return _joined(options)
    if origin is Literal:
        return _joined([f"`{_written(value)}`" for value in arguments])
    if annotation in _SCALARS:
        is_number = annotation in (int, float)
        return ", ".join([_SCALARS[annotation], *(_bounds(metadata) if is_number else ())])
    if origin is tuple:
        return f"list of {_value(arguments[0])}s"
    if origin is dict or (isinstance(annotation, type) and issubclass(annotation, Config)):
        return "mapping"
    raise TypeError(f"the reference has no words for {annotation!r}")


def _bounds(metadata: Sequence[object]) -> Iterator[str]:
    """Bounds of a number, also from a ``Field`` inside an annotation."""
    flat = [inner for item in metadata for inner in (item.metadata if isinstance(item, FieldInfo) else [item])]
    for item in flat:
        for name, words in _BOUNDS:
            bound = getattr(item, name, None)
            if isinstance(item, annotated_types.BaseMetadata) and bound is not None:
                yield f"{words} {'2^63' if bound == 2**63 else bound}"


def _joined(options: Sequence[str]) -> str:
    if len(options) == 1:
        return options[0]
    return f"{', '.join(options[:-1])}{',' if ',' in options[-2] else ''} or {options[-1]}"


def _default(value: object) -> str:
    if isinstance(value, Config):
        return "its defaults"
    return "empty" if value in ((), {}) else f"`{_written(value)}`"


def _written(value: object) -> str:
    """A value as it would stand in the file."""
    return value if isinstance(value, str) else json.dumps(value).removesuffix(".0")


def _one_line(text: str | None) -> str:
    """A docstring as one line, in the backticks of Markdown."""
    return " ".join((text or "").replace("``", "`").split())
