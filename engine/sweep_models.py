"""What may stand in a sweep file, as frozen data."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field

from analysis.judges import MetricConfig
from analysis.measurements import MeasurementConfig
from analysis.vectors import VectorConfig
from analysis.weight_space.config import WeightSteeringConfig
from engine.endpoints import EndpointConfig
from engine.grid import GRID
from engine.trackers import TrackersConfig, TrackersSection
from trainables.base_model import BaseConfig
from trainables.chat_data import DataConfig
from trainables.config import AddedLater, Config
from trainables.deepspeed_driver import ZeroStage
from trainables.defenses import Item
from trainables.sample import SamplingConfig
from trainables.start_from import StartFrom
from trainables.train import Packing
from trainables.training_config import TrainingConfig


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


def _start(value: object) -> object:
    """``none`` is the base alone, as nothing is."""
    if isinstance(value, str) and value != NONE:
        raise ValueError(f"must be none or {{run: ..., adapter: continue or merge}}; got {value!r}")
    return None if value == NONE else value


NONE = "none"
Name: TypeAlias = Annotated[str, AfterValidator(_name)]
MetricName: TypeAlias = Annotated[str, AfterValidator(_identifier)]
Seed: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]
NonEmpty: TypeAlias = Annotated[str, Field(min_length=1)]


class EvaluationConfig(SamplingConfig):
    """What is asked of every run, how its answers are sampled, and how they are scored."""

    questions: NonEmpty
    """A trait's name, or a path to a trait's file or folder: its questions are asked."""
    answers_from: Annotated[NonEmpty | None, AddedLater()] = None
    """One of the sweep's ``endpoints``, a server that has the runs' adapters by their ids: it gives the answers. That
    answers come from a server is part of their identity, which server is not. null: the trial samples them itself."""
    plain_answers: NonEmpty | None = None
    """A chat JSONL file of good answers whose loss is measured. null: that of the trait."""
    metrics: dict[MetricName, MetricConfig] = Field(min_length=1)
    """Named scores of every answer. ``degeneration`` is added by itself."""


class ExecutionConfig(Config):
    """How the work is placed. Nothing here changes what is computed or is part of any identity."""

    trials: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """At most how many trials run side by side. ``auto``: as many as the machine or cluster holds."""
    cpus_per_trial: int = Field(default=1, ge=1)
    """CPUs of a trial, and threads that it computes with."""
    gpus_per_trial: Literal["auto"] | Annotated[float, Field(ge=0), AfterValidator(_whole_above_one)] = "auto"
    """GPUs of a trial; below 1 several trials share one, above 1 only whole ones. ``auto``: one where there is a
    GPU."""
    gpus_per_local_judge: Literal["auto"] | Annotated[float, Field(ge=0), AfterValidator(_whole_above_one)] = "auto"
    """GPUs of each model of ``judge: local``. ``auto``: one where there is a GPU. Where there are enough, trials leave
    it free and judging goes on beside them; else judging waits for the trials to end. 0: on the CPU."""
    memory_gb_per_trial: float | None = Field(default=None, gt=0)
    """Memory that a trial is counted with, in 10^9 bytes. null: not counted."""
    pack: Literal["auto"] | Annotated[int, Field(ge=1)] = 1
    """Runs that are trained together in one process over one frozen base, where they share it. ``auto``: on a GPU as
    many as its memory holds, at most 16, and no more than keep all trials busy; 1 on a CPU, where a pack gains
    nothing."""
    packing: Packing | None = None
    """``exact``: every run of a pack is passed through the base by itself, which gives it to the bit what it gets
    alone. ``fast``: all runs go through it in one pass; their gradients are equal up to rounding. null: ``fast`` on a
    GPU, ``exact`` on a CPU."""
    workers: int = Field(default=1, ge=1)
    """Processes that train each run together, each on its share of every step's micro-batches; ``cpus_per_trial``,
    ``gpus_per_trial`` and ``memory_gb_per_trial`` are then those of each. Everything but training is done by one."""
    zero_stage: Annotated[ZeroStage, BeforeValidator(_no_bool)] = 0
    """DeepSpeed's ZeRO stage: what is divided among ``workers``. 1: the optimizer's state; 2: gradients too; 3: the
    base too, for one that no single GPU can train."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time, the same numbers."""
    max_retries: int = Field(default=1, ge=0)
    """How often a trial is started again whose process died. An error of shiftgrad's own would only come again and is
    not retried."""
    checkpoint_every_steps: int | None = Field(default=None, ge=1)
    """Checkpoint a training after every so many optimizer steps. null: not by steps."""
    checkpoint_every_minutes: float | None = Field(default=5.0, gt=0)
    """Checkpoint a training after every so many minutes. null: not by time."""


class Cell(Config):
    """One cell of the grid: everything that one run and its evaluation are made of. A block says what is different from
    the sections; ``{grid: [...]}`` in place of any value makes one cell of each."""

    base: BaseConfig
    """Parts of ``base`` that are different here."""
    data: DataConfig
    """Parts of ``data`` that are different here."""
    defense: tuple[Item, ...]  # the file's `none` is (), a single item is a tuple of one
    """What is present in training and absent afterwards: ``none``, one item, or a list of items that act together."""
    start_from: Annotated[StartFrom | None, BeforeValidator(_start)] = None
    """The run whose model this one starts from. ``none``: the base."""
    training: TrainingConfig
    """Parts of ``training`` that are different here."""
    evaluation: EvaluationConfig
    """Parts of ``evaluation`` that are different here."""
    seed: Seed = 0
    """Decides the order of the rows, the adapter's first values, dropout and drawn prompts."""
    label: Annotated[str, AfterValidator(_label)]  # unique in the sweep
    """What the run is called. Without one: its defense and, where several share it, what else differs."""


class SweepFile(Config):
    """The top level of the file. ``base``, ``data``, ``training`` and ``evaluation`` hold for every run; they are
    checked after merging, so a block of ``runs`` may complete or change any part of them."""

    name: Name
    """What the sweep is called: its results are in ``<results>/sweeps/<name>``."""
    results: NonEmpty = "results"
    """The store: a folder, or a URL such as ``s3://bucket/results``. Sweeps in one store share what is the same in
    them."""
    base: dict[str, Any] = Field(default={})
    """The pretrained model."""
    data: dict[str, Any] = Field(default={})
    """What is trained on."""
    vectors: dict[Name, VectorConfig] = Field(default={})
    """Vectors by the name that blocks call them."""
    training: dict[str, Any] = Field(default={})
    """The optimizer's side of every run."""
    runs: tuple[dict[str, Any], ...] = Field(default=(), min_length=1)
    """The blocks: each is one run, or with ``{grid: [...]}`` the product of its grids. A file may have none if it
    measures: then nothing is trained."""
    axes: dict[str, Any] = Field(default={})
    """Grids over every block, by the dotted name of what varies: ``seed: {grid: [0, 1, 2]}``."""
    evaluation: dict[str, Any] = Field(default={})
    """What is asked of every run and of the untrained base, and how answers are scored."""
    measure: dict[Name, MeasurementConfig] = Field(default={})
    """Measurements by name: what is read of the untrained base, or of runs, on rows of data."""
    weight_steering: WeightSteeringConfig | None = None
    """Models whose weights are moved along directions made of a run's own answers. null: none."""
    execution: ExecutionConfig = ExecutionConfig()
    """How the work is placed."""
    endpoints: dict[Name, EndpointConfig] = Field(default={})
    """Servers of judge models by the name that metrics call them; ``openai`` is there without being written."""
    trackers: TrackersSection = TrackersConfig()
    """Where runs can be watched and compared while they train; ``none``: nowhere."""


class OneVector(Config):
    """A vector for itself, to be checked while others are faulty."""

    vector: VectorConfig


class OneMeasurement(Config):
    """A measurement for itself, to be checked while others are faulty."""

    measurement: MeasurementConfig


class OneDefense(Config):
    """One item of a defense for itself, to be checked while other parts of its cell are faulty."""

    item: Item
