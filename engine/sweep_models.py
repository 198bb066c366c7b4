"""What may stand in a sweep file, as frozen data."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from analysis.judges import MetricConfig
from engine.grid import GRID
from trainables.base_model import BaseConfig
from trainables.chat_data import DataConfig
from trainables.config import Config
from trainables.deepspeed_driver import ZeroStage
from trainables.defenses import Item
from trainables.sample import SamplingConfig
from trainables.train import TrainingConfig


def _name(text: str) -> str:
    """A name that is also a folder of the store."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text) or text == GRID:
        raise ValueError(
            f"a name has letters, digits, '-', '_' and '.', begins with a letter or digit and is not {GRID!r}; "
            f"got {text!r}"
        )
    return text


def _identifier(text: str) -> str:
    """A name that is also a part of a column's name."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text) or text == GRID:
        raise ValueError(
            f"a metric's name has letters, digits and '_', does not begin with a digit and is not {GRID!r}; "
            f"got {text!r}"
        )
    return text


def _label(text: str) -> str:
    if text != " ".join(text.split()) or not text:
        raise ValueError(f"a label is one line of text without spaces around it; got {text!r}")
    return text


def _whole_above_one(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(f"above 1 a trial takes whole GPUs; got {gpus:g}")
    return gpus


def _no_bool(value: object) -> object:
    """A Literal of numbers would take ``true`` for 1."""
    if isinstance(value, bool):
        raise ValueError(f"must be a whole number; got {str(value).lower()}")
    return value


Name: TypeAlias = Annotated[str, AfterValidator(_name)]
MetricName: TypeAlias = Annotated[str, AfterValidator(_identifier)]
Seed: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]
NonEmpty: TypeAlias = Annotated[str, Field(min_length=1)]


class Difference(Config):
    """Two chat JSONL files: the vector is the mean activation of ``positive`` minus that of ``negative``."""

    positive: NonEmpty
    negative: NonEmpty
    max_length: int = Field(default=2048, ge=8)  # tokens of a row that are read


class DifferenceVector(Config):
    """A vector made from data, see ``Difference``."""

    difference: Difference


class RandomVector(Config):
    """A Gaussian vector with, at every layer, the norm of the vector named ``random_like``."""

    random_like: NonEmpty
    seed: Seed = 0


class FileVector(Config):
    """A vector that lies in a file."""

    file: NonEmpty


_VECTOR_KINDS: dict[str, type[Config]] = {
    "difference": DifferenceVector,
    "random_like": RandomVector,
    "file": FileVector,
}


def _vector_kind(value: object) -> str | None:
    """The class whose key is present, if exactly one is."""
    if isinstance(value, Config):
        return type(value).__name__
    present = [name for name in _VECTOR_KINDS if isinstance(value, dict) and name in value]
    return _VECTOR_KINDS[present[0]].__name__ if len(present) == 1 else None


VectorConfig: TypeAlias = Annotated[
    Annotated[DifferenceVector, Tag("DifferenceVector")]
    | Annotated[RandomVector, Tag("RandomVector")]
    | Annotated[FileVector, Tag("FileVector")],
    Discriminator(
        _vector_kind,
        custom_error_type="vector_kind",
        custom_error_message="needs exactly one of the keys difference, random_like, file",
    ),
]


class EvaluationConfig(SamplingConfig):
    """What is asked of every run, how its answers are sampled, and how they are scored.

    ``questions``: a trait's name, or a path to a trait's file or folder. ``plain_answers``: a chat JSONL file of good
    answers whose loss is measured; None: the trait's.
    """

    questions: NonEmpty
    plain_answers: NonEmpty | None = None
    metrics: dict[MetricName, MetricConfig] = Field(min_length=1)


class ExecutionConfig(Config):
    """How the work is placed. Nothing here changes what is computed or is part of any identity.

    ``trials``: at most how many trials run side by side; auto: as many as the machine holds. ``gpus_per_trial``
    auto: one where there is a GPU. ``memory_gb_per_trial`` in 10^9 bytes; None: not counted. A training is checkpointed
    after every ``checkpoint_every_steps`` optimizer steps and every ``checkpoint_every_minutes``; None: not by that.
    """

    trials: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    cpus_per_trial: int = Field(default=1, ge=1)  # threads of a trial
    gpus_per_trial: Literal["auto"] | Annotated[float, Field(ge=0), AfterValidator(_whole_above_one)] = "auto"
    memory_gb_per_trial: float | None = Field(default=None, gt=0)
    zero_stage: Annotated[ZeroStage, BeforeValidator(_no_bool)] = 0
    gradient_checkpointing: bool = False
    max_retries: int = Field(default=1, ge=0)
    checkpoint_every_steps: int | None = Field(default=None, ge=1)
    checkpoint_every_minutes: float | None = Field(default=5.0, gt=0)


class Cell(Config):
    """One cell of the grid: everything that one run and its evaluation are made of."""

    base: BaseConfig
    data: DataConfig
    defense: tuple[Item, ...]  # the file's `none` is (), a single item is a tuple of one
    training: TrainingConfig
    evaluation: EvaluationConfig
    seed: Seed = 0
    label: Annotated[str, AfterValidator(_label)]  # unique in the sweep


class SweepFile(Config):
    """The top level of the file. Sections of a cell are checked after merging, where a block may complete them."""

    name: Name
    results: NonEmpty = "results"  # the store: a folder or a URL
    base: dict[str, Any] = Field(default={})
    data: dict[str, Any] = Field(default={})
    vectors: dict[Name, VectorConfig] = Field(default={})
    training: dict[str, Any] = Field(default={})
    runs: tuple[dict[str, Any], ...] = Field(min_length=1)
    axes: dict[str, Any] = Field(default={})
    evaluation: dict[str, Any] = Field(default={})
    execution: ExecutionConfig = ExecutionConfig()


class OneVector(Config):
    """A vector for itself, to be checked while others are faulty."""

    vector: VectorConfig


class OneDefense(Config):
    """One item of a defense for itself, to be checked while other parts of its cell are faulty."""

    item: Item
