"""Base class of every config model, the marks on fields that refer to something by name, and what enters an identity.

A sweep file says ``vector: bridge``; a training gets a tensor. Fields that hold such a name are annotated with
``VectorName`` or ``PromptBank``, so that engine/ can find and resolve them in ANY config without knowing its kind.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

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
    """Marks a field that names a vector of the sweep; engine/ replaces the name by the vector's task id."""


class NamesPrompts:
    """Marks a field that names a trait's inoculation prompts or lists texts; engine/ replaces a name by the texts."""


class AddedLater:
    """Marks a field that came after identities were in use: at its default it is left out of every recipe.

    So runs that are in a store keep their ids when a new field is added, provided that its default means what was done
    before there was the field: ``new: Annotated[float, AddedLater()] = 0.0``.
    """


VectorName: TypeAlias = Annotated[str, NamesVector(), Field(min_length=1)]
PromptBank: TypeAlias = Annotated[str | tuple[str, ...], NamesPrompts()]


def referenced(config: Config, mark: type) -> dict[str, object]:
    """Fields of ``config`` that carry ``mark`` in their annotation, with their values."""
    return {
        name: getattr(config, name)
        for name, field in type(config).model_fields.items()
        if any(isinstance(item, mark) for item in field.metadata)
    }


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
