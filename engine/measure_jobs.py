"""Jobs of measurements: shards of rows that a model reads, shards of studies, and merge steps.

Plain data that pickles, as in engine/tasks.py, which knows these as jobs of the one graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analysis.manifest import tensors_key
from analysis.measurements import MeasurementConfig, ModelMeasurement, SyntheticAxes
from analysis.tables import table_key
from engine.jobs import StoredJob
from trainables.base_model import ResolvedBase

STUDY = "synthetic"
"""What a study is of, where a measurement names a model."""


class MeasureJob(StoredJob):
    """Measures one shard: some rows of a data file, read by one model."""

    id: str
    label: str
    base: ResolvedBase
    run_id: str
    is_base: bool
    measurement: ModelMeasurement  # names vectors by task id and holds prompts as texts
    content: str  # sha256 of the rows of the data
    rows: tuple[int, ...]  # their indices in it
    max_length: int
    vector_ids: tuple[str, ...]
    name: str  # the measurement's in the sweep
    run: str  # label
    merged: tuple[str, ...] = ()  # as in the run's job

    @staticmethod
    def identity(
        run_id: str, measurement: ModelMeasurement, content: str, rows: Sequence[int], max_length: int
    ) -> dict[str, Any]:
        """The measurement must be resolved."""
        read = {"run": run_id, "data": content, "rows": list(rows), "max_length": max_length}
        return {"kind": f"measure/{measurement.kind}", "measurement": measurement.identity()} | read

    @property
    def parents(self) -> tuple[str, ...]:
        return (*(() if self.is_base else (self.run_id,)), *self.vector_ids)

    def tasks(self) -> tuple[tuple[str, str], ...]:
        """The shard, once for each key that it makes."""
        keys = [table_key(table, self.id) for table in self.measurement.tables]
        return tuple((self.id, key) for key in [*keys, *([tensors_key(self.id)] * self.measurement.has_tensors)])


class StudyJob(StoredJob):
    """Computes one shard of a study: some of its cells. No model is read."""

    id: str
    label: str
    measurement: SyntheticAxes
    cells: tuple[int, ...]
    name: str
    run: str = STUDY

    @staticmethod
    def identity(measurement: SyntheticAxes, cells: Sequence[int]) -> dict[str, Any]:
        return {
            "kind": f"study/{measurement.kind}",
            "measurement": measurement.identity(),
            "cells": list(cells),
        }

    @property
    def parents(self) -> tuple[str, ...]:
        return ()

    def tasks(self) -> tuple[tuple[str, str], ...]:
        """The shard, once for each key that it makes."""
        return tuple((self.id, table_key(table, self.id)) for table in self.measurement.tables)


class MergeJob(StoredJob):
    """Makes something of all shards of one measurement of one model."""

    id: str
    label: str
    measurement: MeasurementConfig  # as in the shards
    shard_ids: tuple[str, ...]
    vector_ids: tuple[str, ...]
    name: str
    run: str

    @staticmethod
    def identity(measurement: MeasurementConfig, shard_ids: Sequence[str]) -> dict[str, Any]:
        return {
            "kind": f"measure/{measurement.kind}/merge",
            "measurement": measurement.identity(),
            "shards": list(shard_ids),
        }

    @property
    def parents(self) -> tuple[str, ...]:
        return (*self.shard_ids, *self.vector_ids)

    def tasks(self) -> tuple[tuple[str, str], ...]:
        return tuple((self.id, table_key(table, self.id)) for table in self.measurement.merged_tables)
