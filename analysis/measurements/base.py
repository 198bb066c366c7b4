"""What a kind of measurement is: what a user may say of it, how it is cut into shards, and how one shard is measured.

A measurement reads a model on rows of chat data. Its rows are cut into shards; engine/ has each shard measured by a
process that holds the model, and keeps what comes out. A kind with a merge step makes something of all its shards.
Everything here is plain functions of one process: what a config names (vectors, prompts, data, runs) has been replaced
by ids, texts and tensors when ``measure`` is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

import pandas as pd
import torch
from pydantic import Field

from trainables.base_model import LoadedBase
from trainables.chat_data import HubDataset, Message
from trainables.config import Config, recipe_of
from trainables.interventions import Interventions
from trainables.residual_stream import ValueIntervention
from trainables.shapes import ModelShape, VectorShape

PLACING = ("kind", "on", "data", "part", "samples", "seed", "rows_per_shard", "max_length", "cells_per_shard")
"""Fields that say which rows of which model are read, and how they are dealt out. The recipe of a shard holds what
comes of them."""


class NamesData:
    """Marks a field that names a file or dataset of chat rows; engine/ replaces it by the hash of the rows."""


RunLabel: TypeAlias = Annotated[str, Field(min_length=1)]


def _none_at_work(items: Interventions) -> list[ValueIntervention]:
    """What no interventions do."""
    assert not items, "the shard was given nothing that calibrates them"
    return []


@dataclass(frozen=True, eq=False)
class Shard:
    """What one shard is measured on.

    ``rows`` are the chosen rows of the data, by their index in it. ``vectors`` are tensors [num_layers + 1, hidden]
    float32 by the ids that the config holds. ``at_work`` gives what interventions of the config do to the residual
    stream, calibrated. ``progress(done, total)`` may be called at any time.
    """

    measure_id: str
    base: LoadedBase
    model: Any  # base.model, or a trained model over the same base
    rows: Mapping[int, Sequence[Message]]
    max_length: int
    vectors: Mapping[str, torch.Tensor]
    progress: Callable[[int, int], None]
    at_work: Callable[[Interventions], list[ValueIntervention]] = _none_at_work


@dataclass(frozen=True, eq=False)
class Made:
    """What comes of a shard, or of a merge step: rows of stored tables, and tensors for the merge step."""

    tables: Mapping[str, Sequence[object]]
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Part:
    """One shard as the merge step sees it: its tables, read back from the store, and its tensors."""

    tables: Mapping[str, pd.DataFrame]
    tensors: Mapping[str, torch.Tensor]


class AnyMeasurement(Config):
    """What all kinds share. ``semantics`` is raised when a fix changes what the same config gives. ``tables``: what
    every shard makes; ``merged_tables``: what the merge step makes of all shards, if there is one. ``has_tensors``:
    whether shards hand tensors to the merge step.
    """

    semantics: ClassVar[int] = 1
    tables: ClassVar[tuple[str, ...]] = ()
    merged_tables: ClassVar[tuple[str, ...]] = ()
    has_tensors: ClassVar[bool] = False

    kind: str
    """Which kind of measurement."""

    def identity(self) -> dict[str, Any]:
        """Everything of the config that can change the numbers of a shard, with its names resolved."""
        recipe = {name: value for name, value in recipe_of(self).items() if name not in PLACING}
        return {"semantics": self.semantics} | recipe

    def names(self, vectors: Mapping[str, str], banks: Mapping[tuple[str, ...], str]) -> dict[str, str]:
        """What stands in stored tables -> what a reader calls it. The config is resolved; ``vectors`` is id -> name in
        the sweep, ``banks`` the texts of a prompt bank -> its name."""
        del banks
        return dict(vectors)

    def merge(self, measure_id: str, parts: Sequence[Part], vectors: Mapping[str, torch.Tensor]) -> Made:
        """Make ``merged_tables`` of all shards, in order."""
        raise NotImplementedError


class Study(AnyMeasurement):
    """Base class of the kinds that read no model: they compute the cells of a grid of their own, numbered from 0, which
    are dealt out in shards like rows of data."""

    cells_per_shard: int = Field(default=10, ge=1)
    """Cells that one process computes at a time; a shard is the least that is lost when a process dies."""

    def num_cells(self) -> int:
        """How many there are."""
        raise NotImplementedError

    def smoke(self) -> Self:
        """The same with as few cells as show that it works."""
        return self

    def compute(self, measure_id: str, cells: Sequence[int], progress: Callable[[int, int], None]) -> Made:
        """Compute one shard. Rows carry ``measure_id``."""
        raise NotImplementedError


class BaseMeasurement(AnyMeasurement):
    """Base class of the measurements that read a model on rows of data, one subclass per kind."""

    on: Literal["base", "runs", "both"] | tuple[RunLabel, ...] = "base"
    """Which models are measured: the untrained ``base``, all ``runs``, ``both``, or a list of labels of runs."""
    data: Annotated[str | HubDataset | None, NamesData()] = None
    """Chat rows that are read: a file or dataset as in ``data.train``. null: the ``data.train`` of the ``data``
    section."""
    part: Literal["first", "second", "all"] = "all"
    """Which half of the rows is read; a vector made of the other half has not seen it. The halves are drawn by
    ``seed`` as in ``prompt_difference``."""
    samples: int | None = Field(default=None, ge=1)
    """How many rows are read, drawn without replacement by ``seed``. null, or more than there are: all."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides which rows are drawn, and which are in which half."""
    max_length: int | None = Field(default=None, ge=8)
    """Tokens of a row that are read. null: ``max_length`` of the ``data`` section."""
    rows_per_shard: int = Field(default=8, ge=1)
    """Rows that one process reads at a time; a shard is the least that is lost when a process dies."""

    def faults(
        self, model: ModelShape, vectors: Mapping[str, VectorShape]
    ) -> Iterable[tuple[tuple[str | int, ...], str]]:
        """``(path of a field, message)`` for every fault that shows beside the model and the vectors (by name)."""
        del model, vectors
        return ()

    def data_faults(self, num_rows: int) -> Iterable[tuple[tuple[str | int, ...], str]]:
        """``(path of a field, message)`` for what does not go with so many rows to read."""
        del num_rows
        return ()

    def smoke(self) -> Self:
        """The same for as few rows as a smoke run reads, where their number matters."""
        return self

    def forwards_per_row(self, model: ModelShape) -> int:
        """Forward passes (most with a backward pass) that one row takes, for ``plan``."""
        del model
        return 1

    def measure(self, shard: Shard) -> Made:
        """Measure one shard. The config is resolved. Rows carry ``shard.measure_id``."""
        raise NotImplementedError
