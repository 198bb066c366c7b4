"""Base class of every config model, and the marks that say which fields refer to something by name.

A sweep file says ``vector: bridge``; a training gets a tensor. Fields that hold such a name are annotated with
``VectorName`` or ``PromptBank``, so that engine/ can find and resolve them in ANY config without knowing its kind.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, Field


class Config(BaseModel):
    """Frozen, strict about unknown keys, validated whole. Plain data: it pickles and serialises to JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class NamesVector:
    """Marks a field that names a vector of the sweep; engine/ replaces the name by the vector's task id."""


class NamesPrompts:
    """Marks a field that names a trait's inoculation prompts or lists texts; engine/ replaces a name by the texts."""


VectorName: TypeAlias = Annotated[str, NamesVector(), Field(min_length=1)]
PromptBank: TypeAlias = Annotated[str | tuple[str, ...], NamesPrompts()]


def referenced(config: Config, mark: type) -> dict[str, object]:
    """Fields of ``config`` that carry ``mark`` in their annotation, with their values."""
    return {
        name: getattr(config, name)
        for name, field in type(config).model_fields.items()
        if any(isinstance(item, mark) for item in field.metadata)
    }
