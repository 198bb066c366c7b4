"""Reading a sweep, finished or running, into pandas.

``load("results/sweeps/quickstart").summary()`` is the table to look at first. Nothing here writes, and every call reads
the store as it is now.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from analysis.manifest import (
    Failure,
    Manifest,
    RunEntry,
    RunRecord,
    failures_key,
    manifest_key,
    read_failures,
    read_manifest,
    read_run_record,
    run_key,
)
from analysis.rows import RunRow
from analysis.summary import summarize
from analysis.tables import columns_of, read_parquet, schema_of, table_key
from trainables.errors import ConfigError, Fault, StoreError

PLAIN = "plain"
_ANSWER_KEY = ["sample_id", "question_id", "sample_index"]


def load(path: str | Path) -> Results:
    """Open a sweep's folder, ``<store>/sweeps/<name>``. Raises StoreError if it is not there or not a sweep."""
    folder = Path(os.path.abspath(Path(path).expanduser()))
    if not (folder / "manifest.json").is_file() or folder.parent.name != "sweeps":
        raise StoreError(f"{path}: {_why_no_sweep(folder)}")
    root = folder.parent.parent
    return Results(root, read_manifest(root / manifest_key(folder.name)), folder.name)


def _why_no_sweep(folder: Path) -> str:
    for inside in (folder / "sweeps", folder, folder.parent):
        names = sorted(file.parent.name for file in inside.glob("*/manifest.json"))
        if inside.name == "sweeps" and names:
            problem = "not a sweep" if folder.exists() else "there is no such sweep"
            return f"{problem}; in {inside} there are: {', '.join(names)}"
    if not folder.exists():
        return "there is no such folder; give <store>/sweeps/<name>, such as results/sweeps/quickstart"
    return "not a sweep's folder (no manifest.json in <store>/sweeps/<name>); run the sweep first"


@dataclass(frozen=True)
class _Task:
    """A task of an entry and the key of what it makes."""

    name: str
    task_id: str
    key: str


def _tasks(entry: RunEntry) -> Iterator[_Task]:
    """The tasks of a row of the sweep, in the order in which they can be done."""
    if entry.kind == "run":
        yield _Task("train", entry.run_id, run_key(entry.run_id))
    yield _Task("sample", entry.sample_id, table_key("generations", entry.sample_id))
    for metric, judge_id in entry.judge_ids.items():
        yield _Task(f"judge {metric}", judge_id, table_key("scores", judge_id))
    if entry.plain_loss_id is not None:
        yield _Task("plain loss", entry.plain_loss_id, table_key("losses", entry.plain_loss_id))


@dataclass(frozen=True)
class Results:
    """The tables of one sweep. ``root`` is the store's folder, ``name`` the sweep's in it."""

    root: Path
    manifest: Manifest
    name: str

    def training(self) -> pd.DataFrame:
        """One row per optimizer step and run."""
        runs = [entry for entry in self.manifest.runs if entry.kind == "run"]
        return self._frame("training", [(entry, entry.run_id, {}) for entry in runs])

    def generations(self) -> pd.DataFrame:
        """One row per sampled answer."""
        return self._frame("generations", [(entry, entry.sample_id, {}) for entry in self.manifest.runs])

    def scores(self) -> pd.DataFrame:
        """One row per judgement: ``metric`` beside what the judge said, ``question`` and ``answer`` joined to it."""
        scores = self._scores()
        answers = self.generations()[[*_ANSWER_KEY, "question", "answer"]].drop_duplicates(_ANSWER_KEY)
        return scores.merge(answers, how="left", on=_ANSWER_KEY, validate="many_to_one")

    def losses(self) -> pd.DataFrame:
        """One row per data row and condition; ``data`` says which file: ``plain``, the held-out plain answers."""
        sources = [
            (entry, entry.plain_loss_id, {"data": PLAIN})
            for entry in self.manifest.runs
            if entry.plain_loss_id is not None
        ]
        return self._frame("losses", sources, extra=("data",))

    def runs(self) -> pd.DataFrame:
        """One row per row of the sweep, in its order: status, every config field as a column, timings and tokens.

        A config field that has the name of a fixed column is called ``config.<field>``.
        """
        fixed = [column.name for column in columns_of("runs")]
        failures = self._failures()
        rows: list[dict[str, Any]] = []
        fields: dict[str, None] = {}
        for entry in self.manifest.runs:
            config = {(f"config.{k}" if k in fixed else k): value for k, value in entry.config.items()}
            fields.update(dict.fromkeys(config))
            rows.append(dataclasses.asdict(self._run_row(entry, failures)) | config)
        columns = {
            field.name: pa.array([row[field.name] for row in rows], type=field.type) for field in schema_of("runs")
        }
        frame = pa.table(columns).to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
        config_frame = pd.DataFrame({name: [row.get(name) for row in rows] for name in fields}, frame.index)
        return pd.concat([frame, config_frame], axis="columns")

    def summary(self) -> pd.DataFrame:
        """One row per row of the sweep, bases first: what each run does, beside what may be broken. See summarize."""
        return summarize(self.manifest.runs, self.runs(), self.generations(), self._scores(), self.losses())

    def failures(self) -> pd.DataFrame:
        """One row per task that failed or was skipped in the last invocation and whose output is still missing.

        ``task`` says what it was to do for ``run``; a task that belongs to no run has neither.
        """
        failures = self._failures()
        rows = []
        known: set[str] = set()
        for entry in self.manifest.runs:
            for task in _tasks(entry):
                known.add(task.task_id)
                if task.task_id in failures and not self._exists(task.key):
                    rows.append(_failure_row(task.task_id, failures, entry.label, entry.run_id, task.name))
        for name, vector_id in self.manifest.vectors.items():
            known.add(vector_id)
            if vector_id in failures and not self._exists(f"vectors/{vector_id}.safetensors"):
                rows.append(_failure_row(vector_id, failures, None, None, f"vector {name}"))
        rows += [_failure_row(task_id, failures, None, None, None) for task_id in failures if task_id not in known]
        columns = ["run", "run_id", "task", "task_id", "kind", "reason", "log_tail"]
        return pd.DataFrame({name: pd.Series([row[name] for row in rows], dtype="str") for name in columns})

    def table(self, name: str) -> pd.DataFrame:
        """The table of this name. Raises ConfigError that lists the names if there is none."""
        if name not in READERS:
            raise ConfigError(
                [Fault("table", f"there is no table {name!r}; allowed: {', '.join(READERS)}")],
                heading="nothing was read",
            )
        return READERS[name](self)

    def _scores(self) -> pd.DataFrame:
        sources = [
            (entry, judge_id, {"metric": metric})
            for entry in self.manifest.runs
            for metric, judge_id in entry.judge_ids.items()
        ]
        return self._frame("scores", sources, extra=("metric",))

    def _frame(
        self, table: str, sources: list[tuple[RunEntry, str, dict[str, str]]], extra: tuple[str, ...] = ()
    ) -> pd.DataFrame:
        """The stored tables of ``sources`` (entry, task id, values of the ``extra`` columns) under each other."""
        labels = pa.schema([(name, pa.string()) for name in ("run", "run_id", *extra)])
        schema = pa.schema([*labels, *schema_of(table)])
        parts = [schema.empty_table()]
        for entry, task_id, values in sources:
            key = table_key(table, task_id)
            if not self._exists(key):
                continue
            rows = read_parquet(self.root / key, table)
            marks = {"run": entry.label, "run_id": entry.run_id, **values}
            repeated = [pa.repeat(pa.scalar(marks[name], pa.string()), rows.num_rows) for name in labels.names]
            parts.append(pa.Table.from_arrays([*repeated, *rows.columns], schema=schema))
        return pa.concat_tables(parts).to_pandas()

    def _run_row(self, entry: RunEntry, failures: dict[str, Failure]) -> RunRow:
        status, reason = self._status(entry, failures)
        record = read_run_record(self.root / run_key(entry.run_id)) if entry.kind == "run" else None
        names = (name for name in RunRecord.model_fields if name != "status")
        measured: dict[str, Any] = {name: record and getattr(record, name) for name in names}
        return RunRow(
            run=entry.label,
            kind=entry.kind,
            run_id=entry.run_id,
            sample_id=entry.sample_id,
            status=status,
            reason=reason,
            **measured,
        )

    def _status(self, entry: RunEntry, failures: dict[str, Failure]) -> tuple[str, str | None]:
        """What failed outranks what was skipped because of it; a failure whose output is there now is history."""
        open_tasks = [task for task in _tasks(entry) if not self._exists(task.key)]
        found = [failures[task.task_id] for task in open_tasks if task.task_id in failures]
        for failure in found:
            if failure.kind != "skipped":
                return "failed", failure.reason
        if found:
            return "skipped", found[0].reason
        return ("missing", None) if open_tasks else ("done", None)

    def _failures(self) -> dict[str, Failure]:
        return read_failures(self.root / failures_key(self.name))

    def _exists(self, key: str) -> bool:
        return (self.root / key).is_file()


READERS: dict[str, Callable[[Results], pd.DataFrame]] = {
    "summary": Results.summary,
    "runs": Results.runs,
    "training": Results.training,
    "generations": Results.generations,
    "scores": Results.scores,
    "losses": Results.losses,
    "failures": Results.failures,
}
"""The tables of a sweep by name."""


def _failure_row(
    task_id: str, failures: dict[str, Failure], run: str | None, run_id: str | None, task: str | None
) -> dict[str, str | None]:
    failure = failures[task_id]
    return {
        "run": run,
        "run_id": run_id,
        "task": task,
        "task_id": task_id,
        "kind": failure.kind,
        "reason": failure.reason,
        "log_tail": "\n".join(failure.log_tail),
    }
