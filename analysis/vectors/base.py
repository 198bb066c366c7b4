"""What a kind of vector is: what the user writes, what it needs, its identity, and how it is made.

A kind is one config class with one required field, whose name tells it from the others. What it needs is said by marks
on its fields (anywhere inside of it), so that engine/ finds and replaces names without knowing the kind:

| annotation | the user writes | a resolved config holds |
|---|---|---|
| ``ChatFile`` | a chat JSONL file | the hash of its rows, for ``Making.rows`` |
| ``AnyFile`` | any other file | the hash of its content, for ``Making.file`` |
| ``VectorName`` | another vector of the sweep, which is made first | its task id, for ``Making.vector`` |
| ``PromptBank`` | a trait, or texts | the texts |
| ``Annotated[str, NamesTrait()]`` | a trait | the name; ``with_traits`` is given the trait |
| ``MetricConfig`` | a judge | the same, resolved |

A kind that is made of answers of the base says by ``asked`` what is asked and who judges: sampling and judging are
tasks of their own, and the vector is made when they are done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, ClassVar, Protocol, Self

import torch

from analysis.judges import BaseMetric
from analysis.manifest import Scalar
from analysis.traits import Trait
from analysis.vectors.filtering import Answer
from analysis.vectors.vector import Vector
from trainables.base_model import LoadedBase, ResolvedBase
from trainables.config import Config, Path
from trainables.defenses import Message
from trainables.errors import Fault
from trainables.sample import Question, SamplingConfig
from trainables.shapes import ModelShape, VectorShape


@dataclass(frozen=True)
class Asking:
    """Answers of the base that a vector is made of: questions, how they are asked, and who judges the answers.

    Metrics by name. The vector waits for ``metrics`` and rests on them; ``compared`` are for people alone.
    """

    about: str  # which of the kind's askings it is, in a word or two
    questions: tuple[Question, ...]
    sampling: SamplingConfig
    metrics: Mapping[str, BaseMetric]
    compared: Mapping[str, BaseMetric] = field(default_factory=dict)
    rule: Mapping[str, Scalar] = field(default_factory=dict)  # how answers are chosen, for reports


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

    def answers(self, index: int) -> Sequence[Answer]:
        """The judged answers to ``asked()[index]``, in the order of questions and samples."""

    def vector_of(self, values: torch.Tensor) -> Vector:
        """``values`` [num_layers + 1, hidden], read from ``base`` before the final norm, as a vector of that base."""

    def progress(self, done: int, total: int) -> None:
        """Say how far it is."""

    def log(self, message: str) -> None:
        """Keep a line for people who look at the vector."""


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

    def chat_faults(self, rows: Mapping[Path, Sequence[Sequence[Message]]]) -> Iterable[Fault]:
        """What is wrong with chat files beside each other, ``rows`` by the field that names them. Keys are dotted
        fields."""
        del rows
        return ()

    def with_traits(self, traits: Mapping[Path, Trait]) -> Self:
        """This config with the traits that it names, by the field that names them. Raises ConfigError, with dotted
        fields as keys, where one lacks what is needed."""
        del traits
        return self

    def smoke(self) -> Self:
        """The same with as little sampling as shows that it works; the config must be resolved."""
        return self

    def asked(self) -> tuple[Asking, ...]:
        """What the base is asked before the vector can be made. The config must be resolved."""
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
        """Everything that can change the vector, as JSON data, but its kind, its semantics and what is asked, which are
        added to it. The config must be resolved. ``name``: what the sweep calls it, which is no part of it as a
        rule."""
        raise NotImplementedError

    def make(self, making: Making) -> Vector:
        """Make it. The config must be resolved."""
        raise NotImplementedError
