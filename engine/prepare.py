"""From a sweep file to the work that it means: all it names is found and checked, every task gets its identity.

The store is not touched. What is cheap is checked first (files, names, layers, identities, resources); where that is
sound, every row of every data set is made into tokens and its response mask proved, which is also where ``plan`` has
its token counts from. All faults of a stage are reported at once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from analysis.judges import MetricConfig
from analysis.manifest import Manifest, RunEntry, Scalar
from engine.lookup import Found, look_up, vector_names
from engine.machine import Machine, gpus_per_trial, num_trials, resource_faults
from engine.named import named
from engine.only import parse, select
from engine.proved import Proved
from engine.smoke import smoke_cell, smoke_questions, smoke_results
from engine.sources import Sources
from engine.store import Store
from engine.sweep_file import Cell, Sweep, check_sweep
from engine.tasks import (
    Job,
    JudgeTask,
    LossTask,
    RunJob,
    SampleTask,
    TrainTask,
    base_run_id,
    part_of,
    resolved_defense,
    task_id,
)
from engine.trackers import tracker_faults
from engine.vector_tasks import VectorTasks
from trainables.base_model import ResolvedBase, load_tokenizer
from trainables.chat_data import ChatEncoder, encode_all
from trainables.defenses import defense_label
from trainables.errors import ConfigError, DataError, Fault
from trainables.sample import Question, SamplingConfig, system_prompt_fault
from trainables.train import num_optimizer_steps

BASE = "base"  # label of the untrained base


@dataclass(frozen=True)
class Cost:
    """What a run takes, counted on its data; the tokens of inoculation prompts are not in it."""

    num_steps: int
    num_training_tokens: int
    num_answers: int
    num_judgements: int


@dataclass(frozen=True)
class Prepared:
    """A sweep with nothing left to look up.

    The manifest, the inputs and the costs are those of the whole sweep; ``jobs`` and ``judge_tasks`` are what the rows
    that are asked for need (``--only``), which are all rows if nothing is said.
    """

    sweep: Sweep
    manifest: Manifest
    jobs: Mapping[str, Job]  # in the order in which they should start
    judge_tasks: Mapping[str, JudgeTask]
    inputs: Mapping[str, bytes]  # by sha256
    costs: Mapping[str, Cost]  # by label
    asked: tuple[RunEntry, ...]  # rows of the manifest
    device: str
    num_trials: int
    gpus_per_trial: float
    proved: Mapping[str, Sequence[int]]  # see engine/proved.py
    only: str | None = None
    smoke: bool = False

    @property
    def num_runs(self) -> int:
        return sum(entry.kind == "run" for entry in self.manifest.runs)

    @property
    def num_asked(self) -> int:
        """Runs that are asked for."""
        return sum(entry.kind == "run" for entry in self.asked)


@dataclass(frozen=True)
class _SoundCell:
    """A cell in which everything was found."""

    index: int
    cell: Cell
    found: Found

    @property
    def sampling(self) -> SamplingConfig:
        evaluation = self.cell.evaluation
        return SamplingConfig(**{name: getattr(evaluation, name) for name in SamplingConfig.model_fields})


def prepare(
    path: str | Path, overrides: Sequence[str], machine: Machine, *, only: str | None = None, smoke: bool = False
) -> Prepared:
    """Read, check and expand a sweep file. Raises ConfigError with every fault.

    ``only``: do what the runs that it selects need, see engine/only.py. ``smoke``: every cell cut short, in a store of
    its own, see engine/smoke.py; ``only`` selects by the settings of the file, as without ``smoke``.
    """
    sweep, faults = check_sweep(path, overrides)
    faults += parse(only)[1] if only is not None else []
    if sweep is None:
        raise ConfigError(faults)
    execution = sweep.execution
    stores = [sweep.results, smoke_results(sweep.results)] if smoke else [sweep.results]
    faults += [Fault("results", message) for store in stores for message in Store.faults(store)]
    faults += resource_faults(execution, machine)
    faults += tracker_faults(sweep.trackers, os.environ)
    gpus = gpus_per_trial(execution, machine)
    sources = Sources(sweep.path.parent, cuda=gpus > 0, faults=faults, endpoints=sweep.endpoints)
    vectors = VectorTasks(sweep.vectors, sources)
    graph = _Graph(sweep, sources, vectors)
    cells = _look_up_all(sweep, sources, vectors, graph)
    if faults:
        raise ConfigError(faults)
    chosen, only_faults = select(only, graph.entries) if only is not None else (None, [])
    faults += only_faults
    proved = Proved.read(stores[-1], sweep.name)
    graph.prove_rows(proved)
    if faults:
        raise ConfigError(faults)
    if smoke:
        graph = graph.smoke(cells)
    asked = graph.rows(chosen)
    jobs: dict[str, Job] = {**vectors.jobs, **graph.base_jobs, **graph.run_jobs}
    return Prepared(
        sweep=replace(sweep, results=stores[-1]),
        manifest=Manifest(name=sweep.name, runs=graph.rows(None), vectors=vectors.ids),
        jobs=jobs if only is None else part_of(jobs, asked),
        judge_tasks={judge_id: graph.judge_tasks[judge_id] for judge_id in _judge_ids(asked)},
        inputs=sources.inputs,
        costs=graph.costs(),
        asked=asked,
        device="cuda" if gpus > 0 else "cpu",
        num_trials=num_trials(execution, machine),
        gpus_per_trial=gpus,
        proved=proved.kept,
        only=only,
        smoke=smoke,
    )


def _judge_ids(entries: Sequence[RunEntry]) -> list[str]:
    return list(dict.fromkeys(judge_id for entry in entries for judge_id in entry.judge_ids.values()))


def _look_up_all(sweep: Sweep, sources: Sources, vectors: VectorTasks, graph: _Graph) -> list[_SoundCell]:
    """Look up all cells, and return those in which everything was found, which are in the graph now."""
    sound: list[_SoundCell] = []
    seen: dict[str, str] = {}  # what cannot be in the graph, as JSON -> what it is called

    def note_twin(content: str, name: str) -> None:
        if content in seen:
            message = f"two cells are the same: {seen[content]} and {name}; let them differ or remove one"
            sources.faults.append(Fault("runs", message))
        seen.setdefault(content, name)

    for index, cell in enumerate(sweep.cells):
        if cell.label == BASE or cell.label.startswith(f"{BASE} #"):
            message = f"{cell.label!r} is what the untrained base is called; choose another label"
            sources.faults.append(Fault(sweep.key(index, "label"), message))

        def key(*path: str | int, index: int = index) -> str:
            return sweep.key(index, *path)

        found = look_up(named(cell), key, sources, vectors)
        if found is not None:
            sound.append(_SoundCell(index, cell, found))
            graph.add(sound[-1])
        else:
            note_twin(cell.model_dump_json(exclude={"label"}), repr(cell.label))
    for faulty in sweep.faulty:
        look_up(faulty.named, faulty.key, sources, vectors)
        note_twin(faulty.content, faulty.block)
    return sound


# What encoding depends on: base, content, max_length, loss_on, allow_truncated_away
_Encoding: TypeAlias = tuple[str, str, int, Literal["responses", "all"], bool]


class _Graph:
    """Tasks of sound cells. ``twins``: whether two of them may be one and the same work, done once for both."""

    def __init__(self, sweep: Sweep, sources: Sources, vectors: VectorTasks, *, twins: bool = False) -> None:
        self.twins = twins
        self.sweep = sweep
        self.sources = sources
        self.vectors = vectors
        self.run_jobs: dict[str, RunJob] = {}
        self.base_jobs: dict[str, RunJob] = {}
        self.judge_tasks: dict[str, JudgeTask] = {}
        self.entries: list[RunEntry] = []
        self.base_entries: list[RunEntry] = []
        self.base_of: dict[str, RunEntry] = {}  # by label of the run
        self.to_prove: dict[_Encoding, tuple[ResolvedBase, str]] = {}  # and the user's key of the data
        self.to_render: dict[tuple[str, str], tuple[Question, SamplingConfig, str]] = {}  # by base and system prompt
        self.base_keys: dict[str, str] = {}  # base -> the user's key of it
        self.num_tokens: dict[_Encoding, tuple[int, int]] = {}  # rows kept, their tokens

    def smoke(self, cells: Sequence[_SoundCell]) -> _Graph:
        """The same cells cut short. Some may be equal then (where they differed in epochs): both rows stay."""
        short = _Graph(self.sweep, self.sources, self.vectors, twins=True)
        for sound in cells:
            found = replace(sound.found, questions=smoke_questions(sound.found.questions))
            short.add(replace(sound, cell=smoke_cell(sound.cell), found=found))
        short.num_tokens = self.num_tokens  # of the same data
        return short

    def rows(self, labels: frozenset[str] | None) -> tuple[RunEntry, ...]:
        """Rows of the sweep: the runs with these labels (None: all), after the bases that belong to them."""
        runs = [entry for entry in self.entries if labels is None or entry.label in labels]
        bases = [self.base_of[entry.label] for entry in runs]
        return (*(base for base in self.base_entries if base in bases), *runs)

    def add(self, sound: _SoundCell) -> None:
        """Add a cell's vectors, run, samples, judgements and measurements, and those of its base."""
        cell, base = sound.cell, sound.found.base
        self.base_keys.setdefault(_name(base), self.sweep.key(sound.index, "base", "model"))
        ids = {name: self.vectors.add(name, base, self._must_prove) for name in vector_names(cell.defense)}
        defense = resolved_defense(cell.defense, ids, dict(sound.found.prompts))
        content = sound.found.train_content
        identity = TrainTask.identity(base, cell.data, content, defense, cell.training, cell.seed)
        train = TrainTask(
            id=task_id(identity),
            base=base,
            data=cell.data,
            train_content=content,
            defense=defense,
            training=cell.training,
            seed=cell.seed,
        )
        data = cell.data
        key = self.sweep.key(sound.index, "data", "train")
        self._must_prove(base, content, data.max_length, key, data.loss_on, data.allow_truncated_away)
        entry = self._evaluate(sound, train.id, cell.label, "run", _flat(cell, base))
        for other in self.entries:
            if _identity(other) == _identity(entry) and not self.twins:
                message = f"two cells have one identity ({train.id}): {other.label!r} and {cell.label!r}"
                self.sources.faults.append(Fault("runs", f"{message}; let them differ or remove one"))
                return
        self.entries.append(entry)
        self._job(self.run_jobs, sound, train.id, cell.label, train)

        base_id = base_run_id(base)
        number = len(self.base_entries) + 1
        label = BASE if number == 1 else f"{BASE} #{number}"
        shared = ("base", "evaluation")
        config = {name: value for name, value in entry.config.items() if name.partition(".")[0] in shared}
        base_entry = self._evaluate(sound, base_id, label, "base", config)
        # Unlike with runs, the names of metrics count: they are the columns beside which the runs are read.
        what = (_identity(base_entry), base_entry.judge_ids)
        known = [other for other in self.base_entries if (_identity(other), other.judge_ids) == what]
        self.base_of[cell.label] = known[0] if known else base_entry
        if not known:
            self.base_entries.append(base_entry)
            self._job(self.base_jobs, sound, base_id, label, None)

    def _sample(self, run_id: str, sound: _SoundCell) -> SampleTask:
        questions, sampling = sound.found.questions, sound.sampling
        if sampling.system_prompt is not None:
            key = self.sweep.key(sound.index, "evaluation", "system_prompt")
            asked = Question(questions[0].id, questions[0].text)
            self.to_render.setdefault((_name(sound.found.base), sampling.system_prompt), (asked, sampling, key))
        identity = task_id(SampleTask.identity(run_id, questions, sampling))
        return SampleTask(id=identity, questions=questions, sampling=sampling)

    def _loss(self, run_id: str, sound: _SoundCell) -> LossTask:
        content, max_length = sound.found.plain_answers, sound.cell.data.max_length
        self._must_prove(sound.found.base, content, max_length, sound.found.plain_answers_key)
        return LossTask(
            id=task_id(LossTask.identity(run_id, content, max_length)), content=content, max_length=max_length
        )

    def _evaluate(
        self, sound: _SoundCell, run_id: str, label: str, kind: Literal["run", "base"], config: dict[str, Scalar]
    ) -> RunEntry:
        sample = self._sample(run_id, sound)
        judge_ids = {name: self._judge(run_id, sample.id, metric) for name, metric in sound.found.metrics.items()}
        return RunEntry(
            label=label,
            kind=kind,
            run_id=run_id,
            sample_id=sample.id,
            judge_ids=judge_ids,
            plain_loss_id=self._loss(run_id, sound).id,
            config=config,
            scales={name: metric.bounds for name, metric in sound.found.metrics.items()},
        )

    def _judge(self, run_id: str, sample_id: str, metric: MetricConfig) -> str:
        judge_id = task_id(JudgeTask.identity(sample_id, metric))
        self.judge_tasks[judge_id] = JudgeTask(id=judge_id, sample_id=sample_id, run_id=run_id, metric=metric)
        return judge_id

    def _job(
        self, jobs: dict[str, RunJob], sound: _SoundCell, run_id: str, label: str, train: TrainTask | None
    ) -> None:
        """One job per run: cells that differ in their evaluation alone share the training."""
        sample, loss = self._sample(run_id, sound), self._loss(run_id, sound)
        known = jobs.get(run_id)
        samples = known.samples if known else ()
        losses = known.losses if known else ()
        jobs[run_id] = RunJob(
            id=run_id,
            label=known.label if known else label,
            base=sound.found.base,
            train=train,
            samples=samples if sample in samples else (*samples, sample),
            losses=losses if loss in losses else (*losses, loss),
        )

    def _must_prove(
        self,
        base: ResolvedBase,
        content: str,
        max_length: int,
        key: str,
        loss_on: Literal["responses", "all"] = "responses",
        allow_truncated_away: bool = False,
    ) -> None:
        self.to_prove.setdefault((_name(base), content, max_length, loss_on, allow_truncated_away), (base, key))

    def prove_rows(self, proved: Proved) -> None:
        """Make tokens of all rows, prove their masks and count them; what cannot be proved is a fault.

        What ``proved`` knows is not done again, and if that is all, no tokenizer is loaded.
        """
        bases = {_name(base): base for base, _ in self.to_prove.values()}
        prompts = {}
        for (name, prompt), (question, sampling, key) in self.to_render.items():
            if name in bases and proved.recall(bases[name], "prompt", question.text, prompt) is None:
                prompts[name, prompt] = (question, sampling, key)
        rows = {}
        for what, (base, key) in self.to_prove.items():
            counts = proved.recall(base, "rows", what)
            if counts is None:
                rows[what] = (base, key)
            else:
                self.num_tokens[what] = (counts[0], counts[1])
        names = {name for name, _ in prompts} | {_name(base) for base, _ in rows.values()}
        tokenizers = self._tokenizers([base for name, base in bases.items() if name in names])
        dated = {name for name, tokenizer in tokenizers.items() if "strftime_now" in str(tokenizer.chat_template)}
        for (name, prompt), (question, sampling, key) in prompts.items():
            if name not in tokenizers:
                continue
            if message := system_prompt_fault(tokenizers[name], question, sampling):
                self.sources.faults.append(Fault(key, message))
            elif name not in dated:
                proved.keep(bases[name], "prompt", question.text, prompt, counts=())
        for what, (base, key) in rows.items():
            name, content, max_length, loss_on, allow = what
            if name not in tokenizers:
                continue
            try:
                encoder = ChatEncoder(tokenizers[name], max_length, loss_on)
            except DataError as error:
                self.sources.faults.append(Fault(self.base_keys[name], f"{base.source}: {error}"))
                continue
            try:
                encoded, _ = encode_all(self.sources.rows[content], encoder, allow)
            except DataError as error:
                self.sources.faults.append(Fault(key, str(error)))
                continue
            self.num_tokens[what] = (len(encoded), sum(len(row.input_ids) for row in encoded))
            if name not in dated:
                proved.keep(base, "rows", what, counts=self.num_tokens[what])

    def _tokenizers(self, bases: Sequence[ResolvedBase]) -> dict[str, Any]:
        """The bases' tokenizers by ``_name``, less those that cannot be loaded."""
        tokenizers: dict[str, Any] = {}
        for base in bases:
            try:
                tokenizers[_name(base)] = load_tokenizer(base)
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                message = f"the tokenizer of {base.source} cannot be loaded: {reason}"
                self.sources.faults.append(Fault(self.base_keys[_name(base)], message))
        return tokenizers

    def costs(self) -> dict[str, Cost]:
        """What every row of the sweep takes, by label."""
        costs = {}
        jobs = {**self.base_jobs, **self.run_jobs}
        for entry in (*self.base_entries, *self.entries):
            job = jobs[entry.run_id]
            sample = next(sample for sample in job.samples if sample.id == entry.sample_id)
            num_answers = len(sample.questions) * sample.sampling.samples
            steps, tokens = self._training_cost(job.train) if job.train else (0, 0)
            costs[entry.label] = Cost(steps, tokens, num_answers, num_answers * len(set(entry.judge_ids.values())))
        return costs

    def _training_cost(self, train: TrainTask) -> tuple[int, int]:
        """Optimizer steps, and tokens of the rows that they take (of a part of an epoch: as many rows on average)."""
        data, batch_size = train.data, train.training.batch_size
        what = (_name(train.base), train.train_content, data.max_length, data.loss_on, data.allow_truncated_away)
        num_rows, num_tokens = self.num_tokens[what]
        steps = num_optimizer_steps(num_rows, train.training)
        epochs, rest = divmod(steps, math.ceil(num_rows / batch_size))
        rows_used = epochs * num_rows + min(rest * batch_size, num_rows)
        return steps, round(num_tokens * rows_used / num_rows)


def _name(base: ResolvedBase) -> str:
    """Says which tokenizer: bases that differ in dtype alone share it."""
    return f"{base.model} {base.revision}"


def _identity(entry: RunEntry) -> tuple[str, str, str | None, frozenset[str]]:
    """All that a row of the sweep rests on; its name and those of its metrics are not in it."""
    return entry.run_id, entry.sample_id, entry.plain_loss_id, frozenset(entry.judge_ids.values())


def _flat(cell: Cell, base: ResolvedBase) -> dict[str, Scalar]:
    """A cell's settings with dotted names, as the columns of table ``runs``; lists and mappings as JSON.

    The base's revision and dtype are those that were really used.
    """
    flat: dict[str, Scalar] = {"defense": defense_label(cell.defense), "seed": cell.seed}

    def put(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                put(f"{prefix}.{name}", inner)
        elif value is None or isinstance(value, (str, int, float)):
            flat[prefix] = value
        else:
            flat[prefix] = json.dumps(value)

    for number, item in enumerate(cell.defense):
        put("defense" if len(cell.defense) == 1 else f"defense.{number}", item.model_dump(mode="json"))
    put("base", {"model": cell.base.model, "revision": base.revision, "dtype": base.dtype})
    for section in ("data", "training", "evaluation"):
        put(section, getattr(cell, section).model_dump(mode="json"))
    return flat
