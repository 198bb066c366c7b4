"""What a kind of vector is: what the user writes, what it needs, its identity, and how it is made.

A kind is one config class with one required field, whose name tells it from the others. What it needs is said by marks
on its fields (anywhere inside of it), so that engine/ finds and replaces names without knowing the kind:

| annotation | the user writes | a resolved config holds |
|---|---|---|
| ``ChatFile`` | a chat JSONL file | the hash of its rows, for ``Making.rows`` |
| ``AnyFile`` | any other file | the hash of its content, for ``Making.file`` |
| ``VectorName`` | another vector of the sweep, which is made first | its task id, for ``Making.vector`` |
| ``PromptBank`` | a trait, or texts | the texts |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, ClassVar, Protocol

import torch

from analysis.vectors.vector import Vector
from trainables.base_model import LoadedBase, ResolvedBase
from trainables.config import Config, Path
from trainables.defenses import Message
from trainables.errors import Fault
from trainables.shapes import ModelShape, VectorShape


class Making(Protocol):
    """What a kind is given to make its vector: a worker's access to what the resolved config names."""

    @property
    def name(self) -> str:
        """The vector's name in the sweep."""

    @property
    def base(self) -> LoadedBase:
        """The base with its weights; they are loaded when first asked for."""

    def rows(self, content: str) -> Sequence[Sequence[Message]]:
        """The chat rows with this hash."""

    def file(self, content: str) -> FilePath:
        """Where the worker's copy of the file with this hash lies; it was compared with the hash."""

    def vector(self, task_id: str) -> Vector:
        """Another vector of the sweep."""

    def vector_of(self, values: torch.Tensor) -> Vector:
        """``values`` [num_layers + 1, hidden], read from ``base`` before the final norm, as a vector of that base."""

    def progress(self, done: int, total: int) -> None:
        """Say how far it is."""


class VectorKind(Config):
    """Base class of the kinds of vectors. ``semantics`` is raised when a fix changes what the same config gives."""

    semantics: ClassVar[int] = 1

    @classmethod
    def key(cls) -> str:
        """The key by which this kind is told from the others: its one required field."""
        (key,) = (name for name, field in cls.model_fields.items() if field.is_required())
        return key

    @property
    def max_length(self) -> int:
        """Tokens of a row of a chat file that are read."""
        return 2048

    def content(self, file: FilePath) -> bytes:
        """What workers get of a file of the user's, by whose hash the vector is known. Raises ConfigError."""
        return file.read_bytes()

    def file_faults(self, files: Mapping[Path, FilePath]) -> Iterable[Fault]:
        """What is wrong with files of the user, ``files`` by the field that names them. Keys are dotted fields."""
        del files
        return ()

    def shape(
        self,
        base: ResolvedBase,
        model: ModelShape,
        vectors: Mapping[Path, VectorShape],
        files: Mapping[Path, FilePath],
    ) -> VectorShape:
        """The shape of the vector for a base. ``vectors``: those of the vectors that this one names, by field.

        Raises ConfigError, with dotted fields as keys, where it cannot be had for this base.
        """
        del base, vectors, files
        return VectorShape(model.num_layers, model.hidden_size, "pre_norm")

    def identity(self, base: ResolvedBase, name: str) -> dict[str, Any]:
        """Everything that can change the vector but the kind and its semantics, as JSON data. The config must be
        resolved. ``name``: what the sweep calls it, which is no part of it as a rule."""
        raise NotImplementedError

    def make(self, making: Making) -> Vector:
        """Make it. The config must be resolved."""
        raise NotImplementedError
