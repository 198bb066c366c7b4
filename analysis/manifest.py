"""What a sweep is made of, as engine/ writes it to the store and analysis/ reads it, with the keys of these files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from analysis.remote import Location
from trainables.config import Config
from trainables.errors import StoreError

FORMAT = 1
DEGENERATION = "degeneration"
"""The metric that every evaluation has: a broken model must not look defended."""

TaskId: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
Scalar: TypeAlias = str | int | float | bool | None


def sweep_key(name: str, file: str) -> str:
    """The store's key of a file in a sweep's folder."""
    return f"sweeps/{name}/{file}"


def manifest_key(name: str) -> str:
    """Key of the sweep's Manifest."""
    return sweep_key(name, "manifest.json")


def failures_key(name: str) -> str:
    """Key of the sweep's failures, ``{task id: Failure}``; the file may be absent."""
    return sweep_key(name, "failures.json")


def run_key(run_id: str) -> str:
    """Key of a training's RunRecord; it exists when the training is done."""
    return f"runs/{run_id}/run.json"


def adapter_key(run_id: str) -> str:
    """Key of a training's adapter, a directory in PEFT's format."""
    return f"runs/{run_id}/adapter"


def vector_key(vector_id: str) -> str:
    """Key of a vector."""
    return f"vectors/{vector_id}.safetensors"


def tensors_key(shard_id: str) -> str:
    """Key of the tensors that a shard of a measurement hands to the merge step."""
    return f"measurements/{shard_id}.safetensors"


def pile_key(shard_id: str) -> str:
    """Key of the sum of gradients over a shard of a pile."""
    return f"piles/{shard_id}.safetensors"


def log_key(run_id: str) -> str:
    """Key of the log of a run or base."""
    return f"runs/{run_id}/log.txt"


class EditEntry(Config):
    """How an edited model is made: theta + alpha V, V the direction between two piles of a finetuned run's answers."""

    finetuned: str = Field(min_length=1)  # label of the run whose answers the piles hold
    finetuned_id: TaskId
    target: str = Field(min_length=1)  # label of the model that is moved: the finetuned run, or its base
    on_base: bool
    alpha: float
    name: str  # of the direction
    direction: dict[str, Any]  # its DirectionConfig
    of_ids: tuple[TaskId, ...]  # shards of the pile that the direction points away from
    minus_ids: tuple[TaskId, ...]


class RunEntry(Config):
    """One row of the sweep: a run, a base that runs start from (which has no training), a model whose weights were
    moved, or imported answers."""

    label: str = Field(min_length=1)
    kind: Literal["run", "base", "edited", "imported"]
    run_id: TaskId
    sample_id: TaskId
    judge_ids: dict[str, TaskId]  # metric name -> judging task
    plain_loss_id: TaskId | None
    config: dict[str, Scalar]  # flattened: training.learning_rate, defense, seed, ...
    parent: TaskId | None = None  # the run that it starts from; None: the base
    merged: tuple[TaskId, ...] = ()  # trainings whose adapters are merged into the base that this run's is on, in order
    scales: dict[str, tuple[float, float]] = Field(default_factory=dict)  # metric name -> least and greatest value
    edit: EditEntry | None = None  # of an edited model

    def is_over(self, base: RunEntry) -> bool:
        """Whether the model is made of this base."""
        fields = {name: value for name, value in base.config.items() if name.startswith("base.")}
        return self.kind != "base" and all(self.config.get(name) == value for name, value in fields.items())


class MeasureEntry(Config):
    """One measurement of one run or base.

    Its stored tables are those of its shards, and for ``merged_tables`` that of its merge step. They hold ids where a
    reader wants names, because a name is in no identity: ``names`` says which is which.
    """

    name: str = Field(min_length=1)  # in the sweep
    kind: str
    run: str = Field(min_length=1)  # label
    run_id: TaskId
    shard_ids: tuple[TaskId, ...]
    tables: tuple[str, ...]  # of every shard
    has_tensors: bool = False  # whether every shard has tensors too
    merge_id: TaskId | None = None
    merged_tables: tuple[str, ...] = ()
    names: dict[str, str] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)  # as the sweep file has it, defaults included

    def sources(self, table: str) -> tuple[TaskId, ...]:
        """The tasks that make rows of ``table``."""
        merged = (self.merge_id,) if table in self.merged_tables and self.merge_id is not None else ()
        return (*(self.shard_ids if table in self.tables else ()), *merged)


class AskedEntry(Config):
    """Judged answers of the base that a vector is made of. ``counted``: the metrics that have a say in
    it, the judge of the trait first."""

    vector: str  # as in ``Manifest.vectors``
    about: str  # which of the vector's answers: positive 1, negative 1, ...
    sample_id: TaskId
    judge_ids: dict[str, TaskId]
    counted: tuple[str, ...]
    scales: dict[str, tuple[float, float]]
    rule: dict[str, Scalar]  # how answers are chosen


class PileEntry(Config):
    """A pile of a finetuned run's answers, and the tasks that sum gradients over its shards."""

    run: str = Field(min_length=1)  # label
    name: str
    shard_ids: tuple[TaskId, ...]
    sample_id: TaskId
    judge_ids: dict[str, TaskId]
    where: dict[str, bool]  # what metrics must say of an answer


class Manifest(Config):
    """A sweep: its rows in order, its vectors (name -> task id), what these are made of, its measurements, and its
    piles."""

    format: int = FORMAT
    name: str = Field(min_length=1)
    runs: tuple[RunEntry, ...]
    vectors: dict[str, TaskId]
    measurements: tuple[MeasureEntry, ...] = ()
    asked: tuple[AskedEntry, ...] = ()
    piles: tuple[PileEntry, ...] = ()

    @model_validator(mode="after")
    def _labels_are_unique(self) -> Manifest:
        labels = [entry.label for entry in self.runs]
        repeated = sorted({label for label in labels if labels.count(label) > 1})
        if repeated:
            raise ValueError(f"labels must be unique; repeated: {', '.join(repeated)}")
        return self


def metrics_of(entries: Iterable[RunEntry]) -> list[str]:
    """The metrics of rows of a sweep in its order, degeneration last: after what it qualifies."""
    metrics = dict.fromkeys(metric for entry in entries for metric in entry.judge_ids)
    return sorted(metrics, key=lambda metric: metric == DEGENERATION)


class Failure(Config):
    """Why a task did not do its work in the last invocation; kind ``skipped``: something it needs failed."""

    kind: str
    reason: str
    log_tail: tuple[str, ...] = ()


class RunRecord(BaseModel):
    """What is read from a run's run.json; it may hold more."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    status: str
    seconds_training: float
    num_steps: int
    num_tokens: int
    train_loss_last_epoch: float
    started_utc: str
    finished_utc: str
    pack_size: int | None = None  # of a training from before there were packs: not known
    packing: str | None = None
    pack_note: str | None = None


_Value = TypeVar("_Value")


def read_manifest(path: Location) -> Manifest:
    """The manifest in this file. Raises StoreError that names the file if it is not one of this version."""
    content = _json(path)
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise StoreError(
            f"{path}: a manifest of format {found!r}; this version of shiftgrad reads format {FORMAT}; "
            "read it with the version that wrote it, or run the sweep again"
        )
    return _validated(Manifest, content, path)


def read_failures(path: Location) -> dict[str, Failure]:
    """The failures in this file by task id; none if there is no such file."""
    if not path.exists():
        return {}
    return _validated(dict[str, Failure], _json(path), path)


def read_run_record(path: Location) -> RunRecord | None:
    """The record of a training, or None if there is none yet."""
    if not path.exists():
        return None
    return _validated(RunRecord, _json(path), path)


def _json(path: Location) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StoreError(f"{path}: not a JSON file ({error}); run the sweep again to write it anew") from error
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror})") from error


def _validated(model: type[_Value], content: Any, path: Location) -> _Value:
    try:
        return TypeAdapter(model).validate_python(content)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()
        )
        raise StoreError(f"{path}: not as shiftgrad writes it: {faults}") from error
