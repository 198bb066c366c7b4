"""Reading a sweep, finished or running, into pandas.

``load("results/sweeps/quickstart").summary()`` is the table to look at first. Nothing here writes, and every call reads
the store as it is now.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pandas as pd
import pyarrow as pa

from analysis.agreement import agreement_rows
from analysis.agreement import frame_of as agreement_frame
from analysis.extractions import asked_answers, extraction_rows
from analysis.extractions import frame_of as extraction_frame
from analysis.failed_tasks import failures_frame
from analysis.groups import has_several_seeds, over_seeds, summarize_groups
from analysis.manifest import (
    Failure,
    Manifest,
    MeasureEntry,
    RunEntry,
    RunRecord,
    failures_key,
    manifest_key,
    read_failures,
    read_manifest,
    read_run_record,
    run_key,
    sweep_key,
    vector_key,
)
from analysis.one_run import Run, find_run
from analysis.quantities import Measured, measured
from analysis.remote import Location, Remote, local_copy, location_of
from analysis.row_tasks import measurement_keys, tasks_of
from analysis.rows import RunRow
from analysis.summary import summarize
from analysis.tables import TABLES, columns_of, read_parquet, schema_of, table_key
from trainables.errors import ConfigError, Fault, StoreError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from analysis.vectors import Vector

PLAIN = "plain"
_ANSWER_KEY = ["sample_id", "question_id", "sample_index"]


def load(path: str | Location) -> Results:
    """Open a sweep's folder, ``<store>/sweeps/<name>``, on a disk or in an object store (``s3://...``).

    Raises StoreError if it is not there or not a sweep.
    """
    folder = location_of(path)
    if not (folder / "manifest.json").is_file() or folder.parent.name != "sweeps":
        raise StoreError(f"{path}: {_why_no_sweep(folder)}")
    root = folder.parent.parent
    return Results(root, read_manifest(root / manifest_key(folder.name)), folder.name)


def _why_no_sweep(folder: Location) -> str:
    if isinstance(folder, Remote):
        return "not a sweep (no manifest.json); give <store>/sweeps/<name>, such as s3://bucket/results/sweeps/mine"
    for inside in (folder / "sweeps", folder, folder.parent):
        names = sorted(file.parent.name for file in inside.glob("*/manifest.json"))
        if inside.name == "sweeps" and names:
            problem = "not a sweep" if folder.exists() else "there is no such sweep"
            return f"{problem}; in {inside} there are: {', '.join(names)}"
    if not folder.exists():
        return "there is no such folder; give <store>/sweeps/<name>, such as results/sweeps/quickstart"
    return "not a sweep's folder (no manifest.json in <store>/sweeps/<name>); run the sweep first"


_OfARun: TypeAlias = RunEntry | MeasureEntry


@dataclass(frozen=True, repr=False)
class Results:
    """The tables of one sweep. ``location`` is where its store is, ``name`` the sweep's in it."""

    location: Location
    manifest: Manifest
    name: str

    @property
    def root(self) -> Path:
        """The store's folder. Raises StoreError if it is in an object store."""
        if isinstance(self.location, Remote):
            raise StoreError(f"{self.location}: is in an object store and has no folder; `shiftgrad fetch` copies it")
        return self.location

    def training(self) -> pd.DataFrame:
        """One row per optimizer step and run."""
        runs = [entry for entry in self.manifest.runs if entry.kind == "run"]
        return self._frame("training", [(entry, entry.run_id, {}) for entry in runs])

    def signals(self) -> pd.DataFrame:
        """One row per figure that a run showed at a step beside its loss: penalties, and what ``training.watch`` asks
        for."""
        runs = [entry for entry in self.manifest.runs if entry.kind == "run"]
        frame = self._frame("signals", [(entry, entry.run_id, {}) for entry in runs])
        for name, task_id in self.manifest.vectors.items():  # a run knows its vectors by their ids
            frame["name"] = frame["name"].str.replace(task_id, name, regex=False)
        return frame

    def generations(self) -> pd.DataFrame:
        """One row per sampled answer."""
        return self._frame("generations", [(entry, entry.sample_id, {}) for entry in self.manifest.runs])

    def scores(self) -> pd.DataFrame:
        """One row per judgement: ``metric`` beside what the judge said, ``question`` and ``answer`` joined to it."""
        scores = self._scores()
        answers = self.generations()[[*_ANSWER_KEY, "question", "answer"]].drop_duplicates(_ANSWER_KEY)
        return scores.merge(answers, how="left", on=_ANSWER_KEY, validate="many_to_one")

    def losses(self) -> pd.DataFrame:
        """One row per data row and condition. ``data`` says what of: ``plain``, the held-out plain answers of the
        evaluation, or the name of a measurement."""
        measured = self.measured("losses").rename(columns={"measurement": "data"})
        plain = self._plain_losses()
        return pd.concat([plain, measured[plain.columns]], ignore_index=True) if len(measured) else plain

    def _plain_losses(self) -> pd.DataFrame:
        sources = [
            (entry, entry.plain_loss_id, {"data": PLAIN})
            for entry in self.manifest.runs
            if entry.plain_loss_id is not None
        ]
        return self._frame("losses", sources, extra=("data",))

    def measured(self, table: str) -> pd.DataFrame:
        """What the sweep's measurements put into a stored table, with the measurement's name, the label of the model
        and the sweep's names of vectors and conditions. Raises StoreError for a table that is not stored."""
        parts = [self._frame(table, [], extra=("measurement",))]
        for entry in self.manifest.measurements:
            marks = {"measurement": entry.name}
            part = self._frame(table, [(entry, task, marks) for task in entry.sources(table)], extra=("measurement",))
            texts = [name for name in schema_of(table).names if schema_of(table).field(name).type == pa.string()]
            for name in texts if len(part) else ():
                part[name] = part[name].replace(entry.names)
            parts.append(part)
        filled = [part for part in parts if len(part)]
        return pd.concat(filled, ignore_index=True) if filled else parts[0]

    def gradients(self) -> pd.DataFrame:
        """One row per measured data row, condition, layer and vector: the cosine of the loss gradient with it."""
        return self.measured("gradients")

    def measurements(self) -> pd.DataFrame:
        """One row per measurement and model: how many of its shards are done, and what it makes."""
        rows = []
        for entry in self.manifest.measurements:
            keys = measurement_keys(entry)
            done = sum(all(self._exists(key) for key in keys[shard]) for shard in entry.shard_ids)
            is_done = all(self._exists(key) for found in keys.values() for key in found)
            failed = [self._failures()[task] for task in keys if task in self._failures()] if not is_done else []
            rows.append(
                {
                    "measurement": entry.name,
                    "kind": entry.kind,
                    "run": entry.run,
                    "run_id": entry.run_id,
                    "status": "done" if is_done else failed[0].kind if failed else "missing",
                    "shards_done": done,
                    "num_shards": len(entry.shard_ids),
                    "tables": ", ".join((*entry.tables, *entry.merged_tables)),
                }
            )
        columns = ["measurement", "kind", "run", "run_id", "status", "shards_done", "num_shards", "tables"]
        return pd.DataFrame(rows, columns=columns)

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

    def summary(self, by: str | Sequence[str] | None = None) -> pd.DataFrame:
        """What runs do, beside what may be broken. Bases first.

        Without ``by`` one row per row of the sweep: ``summary.summarize`` says what its columns are. With ``by``, the
        names of config fields such as ``["defense", "training.learning_rate"]``, one row per group of runs that agree
        in them, over everything else (usually seeds): see ``groups.summarize_groups``. Raises ConfigError that lists
        the fields for one that no run has.
        """
        if by is None:
            return summarize(self._measured())
        return summarize_groups(self._measured(), [by] if isinstance(by, str) else by)

    def over_seeds(self) -> pd.DataFrame:
        """One row per set of runs that differ in their seed alone, whatever else differs in the sweep."""
        return over_seeds(self._measured())

    def has_several_seeds(self) -> bool:
        """Whether some runs differ in their seed alone."""
        return has_several_seeds(self.manifest.runs)

    def agreement(self) -> pd.DataFrame:
        """One row per pair of metrics that scored the same answers: how far they agree (``analysis.agreement``).

        First over the answers of all runs and bases, then over those that each vector is made of.
        """
        scales: dict[str, tuple[float, float]] = {}
        for entry in self.manifest.runs:
            scales |= entry.scales
        rows = list(agreement_rows(self._scores(), scales, "runs"))
        asked = self.asked_answers()
        for vector in dict.fromkeys(entry.vector for entry in self.manifest.asked):
            first = next(asked for asked in self.manifest.asked if asked.vector == vector)
            names = [*first.counted, *sorted(first.judge_ids.keys() - set(first.counted))]
            scales = {metric: first.scales[metric] for metric in names}
            rows += agreement_rows(asked[asked["vector"] == vector], scales, f"vector {vector}")
        return agreement_frame(rows)

    def asked_answers(self) -> pd.DataFrame:
        """One row per judgement of an answer that a vector is made of; ``run`` says which, such as ``positive 1``."""
        return asked_answers(self.location, self.manifest)

    def extractions(self) -> pd.DataFrame:
        """One row per vector and judge of its answers: how many rows the filter keeps by it."""
        return extraction_frame(extraction_rows(self.location, self.manifest))

    def capping(self, *, harm: str = "trait", capability: str = "capability") -> pd.DataFrame:
        """One row per model and cap of ``evaluation.interventions``: what it takes from attacks, and what it leaves.

        ``harm`` and ``capability`` name metrics; empty in a sweep without a cap.
        """
        from analysis.capping import capping_frame, capping_rows  # brings torch

        entries = [entry for entry in self.manifest.runs if entry.kind != "imported"]
        return capping_frame(
            capping_rows(entries, self._scores(), self._plain_losses(), harm=harm, capability=capability)
        )

    def failures(self) -> pd.DataFrame:
        """One row per task that failed or was skipped in the last invocation and whose output is still missing.

        ``task`` says what it was to do for ``run``; a task that belongs to no run has neither.
        """
        return failures_frame(self.manifest, self._failures(), self._exists)

    def table(self, name: str) -> pd.DataFrame:
        """The table of this name. Raises ConfigError that lists the names if there is none."""
        if name not in READERS:
            raise ConfigError(
                [Fault("table", f"there is no table {name!r}; allowed: {', '.join(READERS)}")],
                heading="nothing was read",
            )
        return READERS[name](self)

    def _measured(self) -> Measured:
        return measured(self.manifest.runs, self.runs(), self.generations(), self._scores(), self._plain_losses())

    def _scores(self) -> pd.DataFrame:
        sources = [
            (entry, judge_id, {"metric": metric})
            for entry in self.manifest.runs
            for metric, judge_id in entry.judge_ids.items()
        ]
        return self._frame("scores", sources, extra=("metric",))

    def _frame(
        self, table: str, sources: Sequence[tuple[_OfARun, str, dict[str, str]]], extra: tuple[str, ...] = ()
    ) -> pd.DataFrame:
        """The stored tables of ``sources`` (entry, task id, values of the ``extra`` columns) under each other."""
        labels = pa.schema([(name, pa.string()) for name in ("run", "run_id", *extra)])
        schema = pa.schema([*labels, *schema_of(table)])
        parts = [schema.empty_table()]
        stored: dict[str, pa.Table] = {}  # rows of the sweep may share a training
        for entry, task_id, values in sources:
            key = table_key(table, task_id)
            if not self._exists(key):
                continue
            rows = stored[key] = stored[key] if key in stored else read_parquet(self.location / key, table)
            label = entry.run if isinstance(entry, MeasureEntry) else entry.label
            marks = {"run": label, "run_id": entry.run_id, **values}
            repeated = [pa.repeat(pa.scalar(marks[name], pa.string()), rows.num_rows) for name in labels.names]
            parts.append(pa.Table.from_arrays([*repeated, *rows.columns], schema=schema))
        return pa.concat_tables(parts).to_pandas()

    def _run_row(self, entry: RunEntry, failures: dict[str, Failure]) -> RunRow:
        status, failure = self._status(entry, failures)
        record = read_run_record(self.location / run_key(entry.run_id)) if entry.kind == "run" else None
        names = (name for name in RunRecord.model_fields if name != "status")
        measured: dict[str, Any] = {name: record and getattr(record, name) for name in names}
        measured["diverged"] = self._diverged(entry) if record is not None else None
        return RunRow(
            run=entry.label,
            kind=entry.kind,
            run_id=entry.run_id,
            sample_id=entry.sample_id,
            status=status,
            reason=failure.reason if failure is not None else None,
            log_tail="\n".join(failure.log_tail) if failure is not None and failure.log_tail else None,
            **measured,
        )

    def _diverged(self, entry: RunEntry) -> bool | None:
        """Whether a training ended at a higher loss than it began with: means of a tenth of its steps each."""
        key = table_key("training", entry.run_id)
        if not self._exists(key):
            return None
        losses = read_parquet(self.location / key, "training").column("loss").to_pylist()
        tenth = max(1, len(losses) // 10)
        return bool(sum(losses[-tenth:]) > sum(losses[:tenth]))

    def _status(self, entry: RunEntry, failures: dict[str, Failure]) -> tuple[str, Failure | None]:
        """What failed outranks what was skipped because of it; a failure whose output is there now is history."""
        open_tasks = [task for task in tasks_of(entry) if not self._exists(task.key)]
        found = [failures[task.task_id] for task in open_tasks if task.task_id in failures]
        for failure in found:
            if failure.kind != "skipped":
                return "failed", failure
        if found:
            return "skipped", found[0]
        return ("missing", None) if open_tasks else ("done", None)

    def _failures(self) -> dict[str, Failure]:
        return read_failures(self.location / failures_key(self.name))

    def _exists(self, key: str) -> bool:
        return (self.location / key).is_file()

    def run(self, text: str) -> Run:
        """One run or base: ``text`` is its label, or the beginning of its id. Raises ConfigError that lists them."""
        return Run(self, find_run(self, text))

    def vector(self, name: str) -> Vector:
        """A vector of the sweep, [num_layers + 1, hidden] float32. Raises ConfigError if there is none yet."""
        from analysis.vectors import Vector  # brings torch, which reading tables need not wait for

        if name not in self.manifest.vectors:
            known = ", ".join(self.manifest.vectors) or "none"
            raise ConfigError([Fault("vector", f"no vector {name!r}; vectors: {known}")], "nothing was read")
        key = vector_key(self.manifest.vectors[name])
        if not self._exists(key):
            raise ConfigError([Fault("vector", f"{name!r} is not made yet")], "nothing was read")
        return Vector.read(local_copy(self.location / key))

    def has_vector(self, name: str) -> bool:
        """Whether a vector of the sweep is made."""
        return name in self.manifest.vectors and self._exists(vector_key(self.manifest.vectors[name]))

    def load_model(
        self, run: str, *, device: str | None = None, base: str | None = None
    ) -> tuple[Any, PreTrainedTokenizerBase]:
        """The model of a run, ready to ``generate``, and its tokenizer (padding on the left), for your own experiments.

        A PEFT model: the base in the dtype of the sweep with the run's adapter, frozen, in evaluation mode, and without
        the defense, which is there in training alone; for a base the plain model. ``device``: ``cpu``, ``cuda``,
        ``cuda:1``; None: a GPU if there is one. ``base``: where the base lies if not where the sweep file said; it
        must be the same one. Memory and time of one model, at every call. Raises ConfigError if the run is not done or
        its base is not here.

        Layers are embedding-inclusive, as everywhere in shiftgrad: layer l >= 1 is the output of block l - 1,
        ``model_parts.decoder_layers(model)[l - 1]``, and layer 0 the embedding output. In transformers'
        ``output_hidden_states`` that is ``hidden_states[l]``, but for the last layer: theirs is taken after the final
        norm, ours before it. ``residual_stream.residual_stream(model, [Add(layer, vector)])`` steers and reads.
        """
        return self.run(run).load_model(device=device, base=base)

    def describe(self) -> str:
        """One line: how many runs there are and how they stand."""
        counts = self.runs()["status"].value_counts()
        bases = sum(entry.kind == "base" for entry in self.manifest.runs)
        runs = len(self.manifest.runs) - bases
        parts = [f"{bases} base{'s' if bases != 1 else ''}", f"{runs} run{'s' if runs != 1 else ''}"]
        return f"{self.name}: {' and '.join(parts)}: {', '.join(f'{num} {status}' for status, num in counts.items())}"

    def __repr__(self) -> str:
        return f"<Results {self.describe()}; {self.location / sweep_key(self.name, '')}>"

    def _repr_html_(self) -> str:
        from analysis.pages import results_page  # brings matplotlib with the report

        return results_page(self)


READERS: dict[str, Callable[[Results], pd.DataFrame]] = {
    "summary": Results.summary,
    "runs": Results.runs,
    "training": Results.training,
    "signals": Results.signals,
    "generations": Results.generations,
    "scores": Results.scores,
    "losses": Results.losses,
    "measurements": Results.measurements,
    "agreement": Results.agreement,
    "extractions": Results.extractions,
    "capping": Results.capping,
    "failures": Results.failures,
}
READERS |= {
    name: functools.partial(lambda results, table: results.measured(table), table=name)
    for name in TABLES
    if name not in READERS
}
"""The tables of a sweep by name; those that measurements alone make are read as they are declared."""
