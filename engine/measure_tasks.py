"""The measurements of a sweep: what they name is found and checked, and each becomes jobs for every model it is of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.manifest import MeasureEntry
from analysis.measurements import BaseMeasurement, MeasurementConfig, ModelMeasurement, Study, SyntheticAxes
from analysis.vectors import part_of_rows
from engine.config_faults import format_path, nearest, show
from engine.contents import prompt_bank
from engine.measure_jobs import STUDY, MeasureJob, MergeJob, StudyJob
from engine.named import without_faults
from engine.row_proofs import RowProofs, tokenizer_name
from engine.smoke import smoke_measurement
from engine.sources import Sources
from engine.sweep_file import Sweep
from engine.tasks import RunJob, base_run_id, task_id
from engine.vector_tasks import VectorTasks
from trainables.base_model import BaseConfig, ResolvedBase
from trainables.chat_data import DataConfig, HubDataset
from trainables.config import (
    NamesChatFile,
    NamesPrompts,
    NamesVector,
    Path,
    inner_configs,
    marked,
    referenced,
    replaced,
)
from trainables.errors import Fault
from trainables.interventions import InterventionConfig
from trainables.randomness import permutation
from trainables.shapes import ModelShape

BASE = "base"


@dataclass(frozen=True)
class Target:
    """A model that is measured: a run, or an untrained base."""

    label: str
    run_id: str
    base: ResolvedBase
    shape: ModelShape
    is_base: bool
    merged: tuple[str, ...] = ()  # as in a run's job


@dataclass(frozen=True)
class MeasureCost:
    """What one measurement of one model takes, by label ``<name> of <run>``: rows, forward passes, and their tokens."""

    num_rows: int
    num_forwards: int
    num_tokens: int
    num_shards: int


class MeasureTasks:
    """Jobs of measurements by what they are of; bases first, so that they begin at once."""

    def __init__(self, sweep: Sweep, sources: Sources, vectors: VectorTasks, proofs: RowProofs) -> None:
        self.sweep = sweep
        self.sources = sources
        self.vectors = vectors
        self.proofs = proofs
        self.base_jobs: dict[str, MeasureJob | StudyJob | MergeJob] = {}
        self.run_jobs: dict[str, MeasureJob | StudyJob | MergeJob] = {}
        self.entries: list[MeasureEntry] = []
        self._encodings: dict[tuple[str, str], tuple[Any, int, int, int]] = {}
        self._costs: dict[tuple[str, str], MeasureCost] = {}  # of what reads no data

    def add_all(
        self, bases: Sequence[Target], runs: Sequence[Target], unsound: Sequence[Target] = (), *, smoke: bool = False
    ) -> None:
        """Find what every measurement names and make its jobs; faults go to the sources' list.

        ``bases`` and ``runs`` are the sound ones of the sweep, each once. ``unsound``: the bases of runs that have
        faults; what does not fit them is told where there is nothing sound to measure.
        """
        data = without_faults(DataConfig, _mapping(self.sweep.raw.get("data")))
        for name, config in self.sweep.measure.items():
            if isinstance(config, Study):
                self._add_study(name, config.smoke() if smoke else config)
                continue
            config = smoke_measurement(config) if smoke else config
            key = f"measure.{name}"
            content = self._content(config, data, f"{key}.data")
            max_length = config.max_length or (data.max_length if data else None)
            max_length = DataConfig.model_fields["max_length"].default if max_length is None else max_length
            prompts, banks = self._prompts(config, name)
            references = self._references(config, name)
            self._check_vector_names(config, name)
            targets = self._targets(config, key, bases, runs)
            for target in () if targets else (bases or unsound):
                self._check(config, name, target)
            for target in targets:
                sound = self._check(config, name, target) and self._check_data(config, name, content)
                if sound and content is not None and prompts is not None and references is not None:
                    self._add(name, config, key, target, content, max_length, prompts, banks, references)

    def _targets(
        self, config: BaseMeasurement, key: str, bases: Sequence[Target], runs: Sequence[Target]
    ) -> list[Target]:
        if isinstance(config.on, str):
            if config.on == "runs" and not runs and not self.sweep.faulty and not self.sweep.cells:
                self.sources.faults.append(Fault(f"{key}.on", "the file has no runs; write base"))
            return [*(bases if config.on != "runs" else ()), *(runs if config.on != "base" else ())]
        by_label = {target.label: target for target in (*bases, *runs)}
        unsound = {cell.label for cell in self.sweep.cells}
        found = []
        for position, label in enumerate(config.on):
            if label in by_label:
                found.append(by_label[label])
            elif label not in unsound and not self.sweep.faulty:  # what a faulty cell is called is not known
                message = f"no run {show(label)}; {nearest(label, by_label)}"
                self.sources.faults.append(Fault(f"{key}.on[{position}]", message))
        return found

    def _content(self, config: BaseMeasurement, data: DataConfig | None, key: str) -> str | None:
        named: str | HubDataset | None = config.data
        if named is None and data is not None:
            named, key = data.train, "data.train"
        if named is None:
            self.sources.faults.append(Fault(key, "missing, and the data section has no train to read instead"))
            return None
        return self.sources.chat_file(named, key) if isinstance(named, str) else self.sources.hub(named, key)

    def _key(self, name: str, path: Path) -> str:
        """Where ``path`` of a measurement stands in the file."""
        return format_path(self.sweep.conditions.written(("measure", name, *path)))

    def _prompts(
        self, config: BaseMeasurement, name: str
    ) -> tuple[dict[Path, tuple[str, ...]] | None, dict[tuple[str, ...], str]]:
        """Texts by the path of their bank, and the banks' names by their texts; None where one is not there."""
        texts: dict[Path, tuple[str, ...]] = {}
        banks: dict[tuple[str, ...], str] = {}
        named = marked(config, NamesPrompts)
        for path, bank in named.items():
            found = prompt_bank(bank, self._key(name, path), self.sources)
            if found is not None:
                texts[path] = found
                if isinstance(bank, str):
                    banks[found] = bank
        return texts if len(texts) == len(named) else None, banks

    def _references(self, config: BaseMeasurement, name: str) -> dict[Path, tuple[str, int]] | None:
        """Content of the chat files that interventions are calibrated on, and how many tokens of a row are read, by the
        path of the file; None where one is not there."""
        found: dict[Path, tuple[str, int]] = {}
        named = {
            (*path, field): (str(file), inner.tokens_read)
            for path, inner in inner_configs(config)
            if isinstance(inner, InterventionConfig)
            for field, file in referenced(inner, NamesChatFile).items()
            if file is not None
        }
        for path, (file, tokens_read) in named.items():
            content = self.sources.chat_file(file, self._key(name, path))
            if content is not None:
                found[path] = content, tokens_read
        return found if len(found) == len(named) else None

    def _check_vector_names(self, config: BaseMeasurement, name: str) -> None:
        for path, vector in vector_names(config).items():
            if str(vector) not in self.vectors.configs:
                message = f"no vector {show(vector)}; {nearest(vector, self.vectors.configs)}"
                self.sources.faults.append(Fault(self._key(name, path), message))

    def _check(self, config: BaseMeasurement, name: str, target: Target) -> bool:
        """Whether vectors and layers fit this model; what does not is a fault."""
        names = {str(vector) for vector in vector_names(config).values()}
        known = sorted(vector for vector in names if vector in self.vectors.configs)
        shapes = {
            vector: shape
            for vector in known
            if (shape := self.vectors.shape(vector, target.base, target.shape)) is not None
        }
        faults = [Fault(self._key(name, path), message) for path, message in config.faults(target.shape, shapes)]
        # conditions of one grid often share a fault, and so do models
        self.sources.faults += [fault for fault in dict.fromkeys(faults) if fault not in self.sources.faults]
        return not faults and len(shapes) == len(names)

    def _check_data(self, config: BaseMeasurement, name: str, content: str | None) -> bool:
        """Whether the number of rows does; what does not is a fault."""
        if content is None:
            return True
        num_rows = len(chosen_rows(len(self.sources.rows[content]), config))
        faults = [Fault(self._key(name, path), message) for path, message in config.data_faults(num_rows)]
        self.sources.faults += [fault for fault in faults if fault not in self.sources.faults]
        return not faults

    def _add(
        self,
        name: str,
        config: ModelMeasurement,
        key: str,
        target: Target,
        content: str,
        max_length: int,
        prompts: Mapping[Path, tuple[str, ...]],
        banks: Mapping[tuple[str, ...], str],
        references: Mapping[Path, tuple[str, int]],
    ) -> None:
        self.proofs.must_prove(target.base, content, max_length, f"{key}.data" if config.data else "data.train")
        for path, (reference, tokens_read) in references.items():
            self.proofs.must_prove(target.base, reference, tokens_read, self._key(name, path))
        names = vector_names(config)
        ids = {
            str(vector): self.vectors.add(str(vector), target.base, self.proofs.must_prove, self.proofs.must_render)
            for vector in dict.fromkeys(names.values())
        }
        values: dict[Path, object] = {path: ids[str(vector)] for path, vector in names.items()}
        values |= {**prompts, **{path: reference for path, (reference, _) in references.items()}}
        resolved = replaced(config, values)
        vector_ids = tuple(dict.fromkeys(ids.values()))
        rows = chosen_rows(len(self.sources.rows[content]), config)
        size = config.rows_per_shard
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        jobs = self.base_jobs if target.is_base else self.run_jobs
        shard_ids = []
        for number, part in enumerate(parts, start=1):
            identity = task_id(MeasureJob.identity(target.run_id, resolved, content, part, max_length))
            shard_ids.append(identity)
            if identity in self.base_jobs or identity in self.run_jobs:
                continue
            jobs[identity] = MeasureJob(
                id=identity,
                label=f"{name} of {target.label} {number}/{len(parts)}",
                base=target.base,
                run_id=target.run_id,
                is_base=target.is_base,
                measurement=resolved,
                content=content,
                rows=part,
                max_length=max_length,
                vector_ids=vector_ids,
                name=name,
                run=target.label,
                merged=target.merged,
            )
        merge_id = _add_merge(jobs, resolved, shard_ids, vector_ids, name, target.label)
        self.entries.append(
            MeasureEntry(
                name=name,
                kind=config.kind,
                run=target.label,
                run_id=target.run_id,
                shard_ids=tuple(shard_ids),
                tables=config.tables,
                has_tensors=config.has_tensors,
                merge_id=merge_id,
                merged_tables=config.merged_tables,
                names=resolved.names({identity: vector for vector, identity in ids.items()}, banks),
                config=config.model_dump(mode="json") | {"data": _data_text(config, self.sweep)},
            )
        )
        forwards = config.forwards_per_row(target.shape)
        encoding = (tokenizer_name(target.base), content, max_length, "responses", False)
        self._encodings[name, target.label] = (encoding, len(rows), forwards, len(parts))

    def _add_study(self, name: str, config: SyntheticAxes) -> None:
        size = config.cells_per_shard
        cells = range(config.num_cells())
        parts = [tuple(cells[start : start + size]) for start in range(0, len(cells), size)]
        shard_ids = []
        for number, part in enumerate(parts, start=1):
            identity = task_id(StudyJob.identity(config, part))
            shard_ids.append(identity)
            label = f"{name} {number}/{len(parts)}"
            job = StudyJob(id=identity, label=label, measurement=config, cells=part, name=name)
            self.base_jobs.setdefault(identity, job)
        self.entries.append(
            MeasureEntry(
                name=name,
                kind=config.kind,
                run=STUDY,
                run_id=task_id({"kind": "study"}),
                shard_ids=tuple(shard_ids),
                tables=config.tables,
                merge_id=_add_merge(self.base_jobs, config, shard_ids, (), name, STUDY),
                merged_tables=config.merged_tables,
                config=config.model_dump(mode="json"),
            )
        )
        self._costs[name, STUDY] = MeasureCost(0, 0, 0, len(parts))

    def costs(self) -> dict[tuple[str, str], MeasureCost]:
        """What every measurement takes, by its name and the label of its model. Rows must have been proved."""
        costs = dict(self._costs)
        for what, (encoding, num_rows, forwards, num_shards) in self._encodings.items():
            of_all, num_tokens = self.proofs.num_tokens[encoding]
            tokens = round(num_tokens * num_rows / of_all) * forwards
            costs[what] = MeasureCost(num_rows, num_rows * forwards, tokens, num_shards)
        return costs


def _add_merge(
    jobs: dict[str, MeasureJob | StudyJob | MergeJob],
    config: MeasurementConfig,
    shard_ids: Sequence[str],
    vector_ids: tuple[str, ...],
    name: str,
    run: str,
) -> str | None:
    """Put the merge step of a kind that has one into the graph; returns its id."""
    if not config.merged_tables:
        return None
    merge_id = task_id(MergeJob.identity(config, shard_ids))
    jobs[merge_id] = MergeJob(
        id=merge_id,
        label=f"{name} of {run}",
        measurement=config,
        shard_ids=tuple(shard_ids),
        vector_ids=vector_ids,
        name=name,
        run=run,
    )
    return merge_id


def _data_text(config: BaseMeasurement, sweep: Sweep) -> Any:
    """The data that is read, as the file names it."""
    named = config.model_dump(mode="json")["data"]
    return named if named is not None else _mapping(sweep.raw.get("data")).get("train")


def vector_names(config: BaseMeasurement) -> dict[Path, str]:
    """Where ``config`` names vectors, those of a list one by one, with their names."""
    names: dict[Path, str] = {}
    for path, value in marked(config, NamesVector).items():
        if isinstance(value, tuple):
            names |= {(*path, index): str(name) for index, name in enumerate(value)}
        else:
            names[path] = str(value)
    return names


def chosen_rows(count: int, config: BaseMeasurement) -> tuple[int, ...]:
    """Indices of the rows that are read, in the order of the data.

    With more ``samples`` the same rows are read and others beside them.
    """
    allowed = set(part_of_rows(count, config.part, config.seed))
    drawn = [row for row in permutation(count, config.seed, 0) if row in allowed]
    return tuple(sorted(drawn[: config.samples]))


def base_targets(
    sweep: Sweep, sources: Sources, jobs: Iterable[RunJob], shapes: Mapping[str, ModelShape]
) -> list[Target]:
    """The bases that runs start from; in a file without runs that of its ``base`` section."""
    found = [Target(job.label, job.id, job.base, shapes[job.id], True) for job in jobs]
    if found or sweep.cells or sweep.faulty or not sweep.measure:
        return found
    config = without_faults(BaseConfig, _mapping(sweep.raw.get("base")))
    base = sources.base(config, "base") if config is not None else None
    return [] if base is None else [Target(BASE, base_run_id(base[0]), *base, True)]


def unsound_targets(sweep: Sweep, sources: Sources) -> list[Target]:
    """The bases that cells with faults name, as far as they can be found; those of sound cells are among them."""
    configs = [*(cell.base for cell in sweep.cells), *(faulty.named.base for faulty in sweep.faulty)]
    found = {}
    for config in configs:
        base = sources.base(config, "base") if config is not None else None  # its faults have been noted
        if base is not None:
            found[base_run_id(base[0])] = Target(BASE, base_run_id(base[0]), *base, True)
    return list(found.values())


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
