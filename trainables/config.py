"""Base class of every config model, the marks on fields that refer to something by name, and what enters an identity.

A sweep file says ``vector: bridge``; a training gets a tensor. Fields that hold such a name are annotated with
``VectorName`` or ``PromptBank``, so that engine/ can find and resolve them in ANY config without knowing its kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo


class Config(BaseModel):
    """Frozen, strict about unknown keys, validated whole. Plain data: it pickles and serialises to JSON.

    The text under a field is what it means; the reference of sweep files is made of these texts (engine/reference.py).
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )


class NamesVector:
    """Marks a field that names a vector of the sweep, or several; engine/ replaces names by the vectors' task ids."""


class NamesPrompts:
    """Marks a field that names a bank of prompts or lists texts; engine/ replaces a name by the texts."""


class NamesChatFile:
    """Marks a field that names a chat JSONL file; engine/ replaces the name by the hash of its rows."""


class NamesFile:
    """Marks a field that names a file of any other kind; engine/ replaces the name by the hash of its content."""


class AddedLater:
    """Marks a field that came after identities were in use: at its default it is left out of every recipe.

    So runs that are in a store keep their ids when a new field is added, provided that its default means what was done
    before there was the field: ``new: Annotated[float, AddedLater()] = 0.0``.
    """


VectorName: TypeAlias = Annotated[str, NamesVector(), Field(min_length=1)]
VectorNames: TypeAlias = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], NamesVector(), Field(min_length=1)]
PromptBank: TypeAlias = Annotated[str | tuple[str, ...], NamesPrompts()]
ChatFile: TypeAlias = Annotated[str, NamesChatFile(), Field(min_length=1)]
AnyFile: TypeAlias = Annotated[str, NamesFile(), Field(min_length=1)]

Path: TypeAlias = tuple[str | int, ...]
"""Where something stands inside a config: names of fields and numbers of list items."""

AnyConfig = TypeVar("AnyConfig", bound="Config")


def referenced(config: Config, mark: type) -> dict[str, object]:
    """Fields of ``config`` that carry ``mark`` in their annotation, with their values."""
    return {
        name: getattr(config, name)
        for name, field in type(config).model_fields.items()
        if any(isinstance(item, mark) for item in field.metadata)
    }


def inner_configs(config: Config, *, within: type[Config] | None = None) -> Iterator[tuple[Path, Config]]:
    """``config`` and every config inside of it (in fields, lists and mappings), each with where it stands.

    What is inside of a config of the class ``within`` is left out, but that config itself is not.
    """

    def search(value: object, path: Path) -> Iterator[tuple[Path, Config]]:
        if isinstance(value, Config):
            yield path, value
            if within is None or not isinstance(value, within):
                for name in type(value).model_fields:
                    yield from search(getattr(value, name), (*path, name))
        elif isinstance(value, tuple | list):
            for index, item in enumerate(value):
                yield from search(item, (*path, index))
        elif isinstance(value, dict):
            for name, item in value.items():
                yield from search(item, (*path, name))

    yield from search(config, ())


def marked(config: Config, mark: type, *, within: type[Config] | None = None) -> dict[Path, object]:
    """Fields anywhere inside ``config`` that carry ``mark``, with their values; None is no value. Configs of the class
    ``within`` are not looked into."""
    return {
        (*path, field): value
        for path, inner in inner_configs(config, within=within)
        if within is None or not isinstance(inner, within)
        for field, value in referenced(inner, mark).items()
        if value is not None
    }


def replaced(config: AnyConfig, values: Mapping[Path, object]) -> AnyConfig:
    """``config`` with other values at these places. They are not validated: a hash may stand for a file."""
    result: AnyConfig = _replaced(config, (), values)
    return result


def _replaced(value: Any, path: Path, values: Mapping[Path, object]) -> Any:
    if path in values:
        return values[path]
    if not any(place[: len(path)] == path for place in values):
        return value
    if isinstance(value, Config):
        fields = {name: _replaced(getattr(value, name), (*path, name), values) for name in type(value).model_fields}
        return value.model_copy(update=fields)
    if isinstance(value, tuple | list):
        return tuple(_replaced(item, (*path, index), values) for index, item in enumerate(value))
    assert isinstance(value, dict), f"nothing is at {path}"
    return {name: _replaced(item, (*path, name), values) for name, item in value.items()}


def names_in(value: object) -> tuple[str, ...]:
    """The names that a field marked ``NamesVector`` holds: one, several, or none where it is not set."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(str(name) for name in value)  # type: ignore[attr-defined]


def recipe_of(config: Config) -> dict[str, Any]:
    """``config`` as JSON data for an identity: every field with its value, less those ``AddedLater`` at their default.

    Configs inside of it are treated alike.
    """
    plain: dict[str, Any] = _plain(config, config.model_dump(mode="json"))
    return plain


def _plain(value: object, dumped: Any) -> Any:
    """``dumped``, which is ``value`` as JSON data, as it enters an identity."""
    if isinstance(value, Config):
        fields = type(value).model_fields
        return {
            name: _plain(getattr(value, name), item)
            for name, item in dumped.items()
            if not _is_left_out(fields[name], getattr(value, name))
        }
    if isinstance(value, tuple | list):
        return [_plain(*pair) for pair in zip(value, dumped, strict=True)]
    if isinstance(value, dict):
        return {name: _plain(item, dumped[name]) for name, item in value.items()}
    return dumped


def _is_left_out(field: FieldInfo, value: object) -> bool:
    added_later = any(isinstance(mark, AddedLater) for mark in field.metadata)
    return added_later and value == field.get_default(call_default_factory=True)
