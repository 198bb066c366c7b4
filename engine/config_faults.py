"""What pydantic says about a wrong config, in the words and keys of the person who wrote it.

Configs are validated as strict JSON: a list is a tuple, a whole number is a number, and nothing else is converted, so
``epochs: true`` and ``layer: "20"`` are faults instead of 1.0 and 20.
"""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from trainables.config import Config
from trainables.errors import Fault

Path: TypeAlias = tuple[str | int, ...]
AnyConfig = TypeVar("AnyConfig", bound=Config)

_TYPES = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def validate(
    model: type[AnyConfig], raw: Mapping[str, Any], key: Callable[[Path], str] | None = None
) -> tuple[AnyConfig | None, list[Fault]]:
    """``raw`` as a ``model``, or None and every fault. ``key`` names a path of ``raw`` in the user's file."""
    try:
        return model.model_validate_json(json.dumps(raw), strict=True), []
    except ValidationError as error:
        return None, _faults(error, model, raw, key or format_path)


def format_path(path: Sequence[str | int]) -> str:
    """``("runs", 1, "layer")`` as ``runs[1].layer``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def show(value: object, limit: int = 60) -> str:
    """A value as the user wrote it, on one line, cut to ``limit`` characters."""
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[: limit - 4] + " ..."


def nearest(given: object, allowed: Iterable[str]) -> str:
    """``did you mean X? allowed: X, Y, Z`` (without the question where nothing is near)."""
    names = list(allowed)
    close = difflib.get_close_matches(str(given), names, n=1)
    question = f"did you mean {close[0]}? " if close else ""
    return f"{question}allowed: {', '.join(names) or 'none'}"


def _faults(error: ValidationError, model: type[Config], raw: Any, key: Callable[[Path], str]) -> list[Fault]:
    details = error.errors(include_url=False)
    at: dict[Path, list[Any]] = {}
    for detail in details:
        is_key = detail["type"] in ("missing", "extra_forbidden")
        at.setdefault(_path(_without_tags(model, detail["loc"]), raw, is_key), []).append(detail)
    faults: list[Fault] = []
    for path, group in at.items():
        deeper = any(len(other) > len(path) and other[: len(path)] == path for other in at)
        value = _at(raw, path)
        if deeper and isinstance(value, dict | list):
            # One member of a union (text or mapping) took the value and found faults inside: those count.
            group = [detail for detail in group if not _is_type_fault(detail)]
        faults += _messages(path, value, group, model, key)
    return faults


def _messages(
    path: Path, value: object, group: Sequence[Any], model: type[Config], key: Callable[[Path], str]
) -> Iterable[Fault]:
    types_allowed: list[str] = []
    choices: list[str] = []
    if any(not _is_type_fault(detail) for detail in group):
        # One member of a union took the type and refused the value: what the others wanted is beside the point.
        group = [detail for detail in group if not _is_type_fault(detail)]
    for detail in group:
        kind, context = detail["type"], detail.get("ctx", {})
        if kind in _TYPES:
            types_allowed.append(_TYPES[kind])
        elif kind == "literal_error":
            choices += context["expected"].replace(" or ", ", ").split(", ")
        elif kind in _BOUNDS:
            name, words = _BOUNDS[kind]
            yield Fault(key(path), f"must be {words} {context[name]:g}; got {show(value)}")
        elif kind == "missing":
            yield Fault(key(path), "missing, and it has no default")
        elif kind == "extra_forbidden":
            fields = _fields(model, detail["loc"][:-1])
            yield Fault(key(path), f"unknown key; {nearest(path[-1], fields)}")
        elif kind == "union_tag_invalid":
            tags = [tag.strip().strip("'") for tag in context["expected_tags"].split(",")]
            name = context["discriminator"].strip("'")
            yield Fault(key((*path, name)), f"unknown {name} {show(context['tag'])}; {nearest(context['tag'], tags)}")
        elif kind == "union_tag_not_found":
            name = context["discriminator"].strip("'")
            tags = _tags(model, detail["loc"], name)
            yield Fault(key((*path, name)), f"missing; allowed: {', '.join(tags)}")
        elif kind in ("string_too_short", "too_short"):
            if not value:  # else faulty elements were not counted, and they have faults of their own
                yield Fault(key(path), f"must not be empty; got {show(value)}")
        elif kind in ("value_error", "assertion_error"):
            yield Fault(key(path), detail["msg"].partition(", ")[2])
        elif kind == "vector_kind":
            yield Fault(key(path), f"{detail['msg']}; got {show(value)}{_near_keys(value, detail, model)}")
        else:
            yield Fault(key(path), f"{detail['msg'][:1].lower()}{detail['msg'][1:]}; got {show(value)}")
    allowed = list(dict.fromkeys([*choices, *types_allowed]))
    if allowed:
        close = difflib.get_close_matches(str(value), [choice.strip("'") for choice in choices], n=1)
        question = f"; did you mean {close[0]}?" if close else ""
        yield Fault(key(path), f"must be {' or '.join(allowed)}; got {show(value)}{question}")


def _is_type_fault(detail: Any) -> bool:
    return detail["type"] in _TYPES or detail["type"] == "literal_error"


def _near_keys(value: object, detail: Any, model: type[Config]) -> str:
    """For a mapping that is none of a union's models because its deciding key is misspelt."""
    fields = _fields(model, detail["loc"])
    for given in value if isinstance(value, dict) else ():
        close = difflib.get_close_matches(str(given), fields, n=1)
        if close and given not in fields:
            return f"; did you mean {close[0]}?"
    return ""


def _path(location: Sequence[str | int], raw: Any, is_key: bool) -> Path:
    """The part of pydantic's location that is in ``raw``: without the names of union members.

    ``is_key``: the last element is a key (missing or unknown) even where ``raw`` does not have it.
    """
    path: list[str | int] = []
    for index, part in enumerate(location):
        if isinstance(raw, dict) and part in raw:
            raw = raw[part]
        elif isinstance(raw, list) and isinstance(part, int):
            raw = raw[part] if part < len(raw) else None
        elif not (is_key and index == len(location) - 1):
            continue
        path.append(part)
    return tuple(path)


def _without_tags(model: type[Config], location: Sequence[str | int]) -> Path:
    """The location less the tags of unions: one may have the name of a key (``judge: rule`` and hybrid's ``rule``)."""
    here: list[Any] = [model]
    path: list[str | int] = []
    for part in location:
        if not _tagged(here, part):
            path.append(part)
        here = _below(here, part)
    return tuple(path)


def _at(raw: Any, path: Path) -> Any:
    for part in path:
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            return None
    return raw


def _fields(model: type[Config], location: Sequence[str | int]) -> list[str]:
    """Names of the fields allowed at ``location``."""
    models = [member for member in _members_at(model, location) if _is_model(member)]
    return list(dict.fromkeys(name for member in models for name in member.model_fields))


def _tags(model: type[Config], location: Sequence[str | int], name: str) -> list[str]:
    models = [member for member in _members_at(model, location) if _is_model(member)]
    return [tag for member in models for tag in _literals(member, name)]


def _members_at(annotation: Any, location: Sequence[str | int]) -> list[Any]:
    """The types that pydantic can have meant at ``location``, unions taken apart."""
    here = _members(annotation)
    for part in location:
        here = _below(here, part)
    return here


def _below(here: list[Any], part: str | int) -> list[Any]:
    """The types that can be meant one step further than ``here``."""
    if tagged := _tagged(here, part):
        return tagged
    step: list[Any] = []
    for member in here:
        origin, arguments = get_origin(member), get_args(member)
        if _is_model(member) and part in member.model_fields:
            step += _members(member.model_fields[part].annotation)
        elif origin is dict:
            step += _members(arguments[1])
        elif origin in (tuple, list) and isinstance(part, int):
            step += _members(arguments[0])
    return step or here  # a name that pydantic put in, such as that of a validator, leaves us where we are


def _tagged(here: Sequence[Any], part: str | int) -> list[Any]:
    """The members of a union whose name or tag is ``part``; none where there is no union."""
    models = [member for member in here if _is_model(member)]
    if len(models) < 2:
        return []
    return [member for member in models if part == member.__name__ or _is_tag_of(member, part)]


def _members(annotation: Any) -> list[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [member for argument in get_args(annotation) for member in _members(argument)]
    return [annotation]


def _is_model(member: Any) -> bool:
    return isinstance(member, type) and issubclass(member, BaseModel)


def _literals(model: type[BaseModel], name: str) -> list[str]:
    field = model.model_fields.get(name)
    return list(get_args(field.annotation)) if field and get_origin(field.annotation) is Literal else []


def _is_tag_of(model: type[BaseModel], part: str | int) -> bool:
    return any(part in _literals(model, name) for name in model.model_fields)
