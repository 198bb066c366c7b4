"""From a sweep file to the work that it means: all it names is found and checked, every task gets its identity.

The store is not touched. What is cheap is checked first (files, names, layers, resources); where that is sound, every
row of every data set is made into tokens and its response mask proved, which is also where ``plan`` has its token
counts from. All faults of a stage are reported at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.judges import BaseMetric, DegenerationMetric, MetricConfig, NamesTrait
from analysis.manifest import Manifest, RunEntry, Scalar
from analysis.summary import repeated_columns
from analysis.traits import Trait
from engine.machine import Machine, gpus_per_trial, num_trials, resource_faults
from engine.sources import Sources
from engine.store import Store
from engine.sweep_file import Cell, EvaluationConfig, Sweep, check_sweep
from engine.tasks import (
    Job,
    JudgeTask,
    LossTask,
    QuestionText,
    RunJob,
    SampleTask,
    TrainTask,
    base_run_id,
    resolved_defense,
    task_id,
)
from engine.vector_tasks import VectorTasks
from trainables.base_model import ResolvedBase, load_tokenizer
from trainables.chat_data import ChatEncoder, encode_all
from trainables.config import NamesPrompts, NamesVector, referenced
from trainables.defenses import defense_faults, defense_label
from trainables.errors import ConfigError, DataError, Fault
from trainables.sample import SamplingConfig
from trainables.shapes import ModelShape
from trainables.train import num_optimizer_steps

DEGENERATION = "degeneration"


@dataclass(frozen=True)
class Cost:
    """What a run takes, counted on its data; the tokens of inoculation prompts are not in it."""

    num_steps: int
    num_training_tokens: int
    num_answers: int
    num_judgements: int


@dataclass(frozen=True)
class Prepared:
    """A sweep with nothing left to look up."""

    sweep: Sweep
    manifest: Manifest
    jobs: Mapping[str, Job]  # in the order in which they should start
    judge_tasks: Mapping[str, JudgeTask]
    inputs: Mapping[str, bytes]  # by sha256
    costs: Mapping[str, Cost]  # by label
    device: str
    num_trials: int
    gpus_per_trial: float


@dataclass(frozen=True)
class _Evaluation:
    """An evaluation with its texts."""

    questions: tuple[QuestionText, ...]
    sampling: SamplingConfig
    metrics: Mapping[str, MetricConfig]
    plain_answers: str  # content


@dataclass(frozen=True)
class _SoundCell:
    """A cell in which everything was found."""

    index: int
    cell: Cell
    base: ResolvedBase
    train_content: str
    prompts: Mapping[str, tuple[str, ...]]
    evaluation: _Evaluation


def prepare(path: str | Path, overrides: Sequence[str], machine: Machine) -> Prepared:
    """Read, check and expand a sweep file. Raises ConfigError with every fault."""
    sweep, faults = check_sweep(path, overrides)
    if sweep is None:
        raise ConfigError(faults)
    execution = sweep.execution
    faults += [Fault("results", message) for message in Store.faults(sweep.results)]
    faults += resource_faults(execution, machine)
    gpus = gpus_per_trial(execution, machine)
    sources = Sources(sweep.path.parent, cuda=gpus > 0, faults=faults)
    vectors = VectorTasks(sweep.vectors, sources)
    sound = [_check_cell(sweep, index, cell, sources, vectors) for index, cell in enumerate(sweep.cells)]
    if faults:
        raise ConfigError(faults)
    graph = _Graph(sweep, sources, vectors)
    for entry in sound:
        assert entry is not None, "a cell without a fault is sound"
        graph.add(entry)
    graph.prove_rows()
    if faults:
        raise ConfigError(faults)
    return Prepared(
        sweep=sweep,
        manifest=Manifest(name=sweep.name, runs=(*graph.base_entries, *graph.entries), vectors=vectors.ids),
        jobs={**vectors.jobs, **graph.base_jobs, **graph.run_jobs},
        judge_tasks=graph.judge_tasks,
        inputs=sources.inputs,
        costs=graph.costs(),
        device="cuda" if gpus > 0 else "cpu",
        num_trials=num_trials(execution, machine),
        gpus_per_trial=gpus,
    )


def _check_cell(sweep: Sweep, index: int, cell: Cell, sources: Sources, vectors: VectorTasks) -> _SoundCell | None:
    base = sources.base(cell.base, sweep.key(index, "base"))
    train_key = sweep.key(index, "data", "train")
    train = cell.data.train
    content = sources.chat_file(train, train_key) if isinstance(train, str) else sources.hub(train, train_key)
    prompts = _prompt_banks(sweep, index, cell, sources)
    evaluation = _evaluation(sweep, index, cell.evaluation, sources)
    if base is not None:
        _check_defense(sweep, index, cell, base, sources, vectors)
    if base is None or content is None or evaluation is None:
        return None
    return _SoundCell(index, cell, base[0], content, prompts, evaluation)


def _prompt_banks(sweep: Sweep, index: int, cell: Cell, sources: Sources) -> dict[str, tuple[str, ...]]:
    banks: dict[str, tuple[str, ...]] = {}
    for position, item in enumerate(cell.defense):
        for field, bank in referenced(item, NamesPrompts).items():
            if not isinstance(bank, str):
                continue
            key = sweep.key(index, "defense", position, field)
            trait = sources.trait(bank, key)
            if trait is not None and not trait[0].inoculation_prompts:
                sources.faults.append(Fault(key, f"trait {bank!r} has no inoculation_prompts"))
            elif trait is not None:
                banks[bank] = trait[0].inoculation_prompts
    return banks


def _vector_names(cell: Cell) -> list[str]:
    return [str(name) for item in cell.defense for name in referenced(item, NamesVector).values()]


def _check_defense(
    sweep: Sweep,
    index: int,
    cell: Cell,
    base: tuple[ResolvedBase, ModelShape],
    sources: Sources,
    vectors: VectorTasks,
) -> None:
    resolved, model = base
    shapes = {name: shape for name in _vector_names(cell) if (shape := vectors.shape(name, resolved, model))}
    for position, field, message in defense_faults(cell.defense, model, shapes):
        sources.faults.append(Fault(sweep.key(index, "defense", position, field), message))


def _evaluation(sweep: Sweep, index: int, config: EvaluationConfig, sources: Sources) -> _Evaluation | None:
    key = sweep.key(index, "evaluation", "questions")
    found = sources.trait(config.questions, key)
    if found is None:
        return None
    trait, _ = found
    if config.plain_answers is not None:
        content = sources.chat_file(config.plain_answers, sweep.key(index, "evaluation", "plain_answers"))
    elif trait.plain_answers is not None:
        content = sources.chat_path(trait.path_of(trait.plain_answers), key)
    else:
        message = f"trait {config.questions!r} has no plain_answers; give evaluation.plain_answers"
        sources.faults.append(Fault(key, message))
        return None
    metrics: dict[str, MetricConfig] = {}
    for name, metric in config.metrics.items():
        resolved = _metric(metric, sweep.key(index, "evaluation", "metrics", name), sources)
        if resolved is not None:
            metrics[name] = resolved
    metrics.setdefault(DEGENERATION, DegenerationMetric())  # a broken model must not look defended
    for column in repeated_columns(tuple(metrics)):
        message = f"the summary would have two columns {column!r}; rename one"
        sources.faults.append(Fault(sweep.key(index, "evaluation", "metrics"), message))
    if content is None or len(metrics) < len(config.metrics):
        return None
    return _Evaluation(
        questions=tuple(QuestionText(id=question.id, text=question.question) for question in trait.questions),
        sampling=SamplingConfig(**{name: getattr(config, name) for name in SamplingConfig.model_fields}),
        metrics=metrics,
        plain_answers=content,
    )


def _metric(metric: MetricConfig, key: str, sources: Sources) -> MetricConfig | None:
    assert isinstance(metric, BaseMetric)
    named: dict[str, Trait] = {}
    for field, name in referenced(metric, NamesTrait).items():
        if name is None:
            continue
        found = sources.trait(str(name), f"{key}.{field}")
        if found is None:
            return None
        named[str(name)] = found[0]
    try:
        return metric.resolved(named)
    except ConfigError as error:
        sources.faults += [Fault(f"{key}.{fault.key}", fault.message) for fault in error.faults]
        return None


class _Graph:
    """Tasks of sound cells."""

    def __init__(self, sweep: Sweep, sources: Sources, vectors: VectorTasks) -> None:
        self.sweep = sweep
        self.sources = sources
        self.vectors = vectors
        self.run_jobs: dict[str, RunJob] = {}
        self.base_jobs: dict[str, RunJob] = {}
        self.judge_tasks: dict[str, JudgeTask] = {}
        self.entries: list[RunEntry] = []
        self.base_entries: list[RunEntry] = []
        self.to_prove: dict[tuple[str, str, int, str, bool], tuple[ResolvedBase, str]] = {}
        self.num_tokens: dict[tuple[str, str, int, str, bool], tuple[int, int]] = {}  # rows kept, their tokens

    def add(self, sound: _SoundCell) -> None:
        """Add a cell's vectors, run, samples, judgements and measurements, and those of its base."""
        cell, base = sound.cell, sound.base
        ids = {name: self.vectors.add(name, base, self._must_prove) for name in _vector_names(cell)}
        defense = resolved_defense(cell.defense, ids, dict(sound.prompts))
        identity = TrainTask.identity(base, cell.data, sound.train_content, defense, cell.training, cell.seed)
        train = TrainTask(
            id=task_id(identity),
            base=base,
            data=cell.data,
            train_content=sound.train_content,
            defense=defense,
            training=cell.training,
            seed=cell.seed,
        )
        self._must_prove(
            base,
            sound.train_content,
            cell.data.max_length,
            self.sweep.key(sound.index, "data", "train"),
            cell.data.loss_on,
            cell.data.allow_truncated_away,
        )
        entry = self._evaluate(sound, train.id, cell.label, "run", _flat(cell))
        for other in self.entries:
            if (other.run_id, other.sample_id) == (entry.run_id, entry.sample_id):
                message = f"two cells have one identity ({train.id}): {other.label!r} and {cell.label!r}"
                self.sources.faults.append(Fault("runs", f"{message}; let them differ or remove one"))
                return
        self.entries.append(entry)
        self._job(self.run_jobs, sound, train.id, cell.label, train)

        base_id = base_run_id(base)
        config: dict[str, Scalar] = {"base.model": base.model, "base.dtype": base.dtype}
        number = len(self.base_entries) + 1
        label = "base" if number == 1 else f"base #{number}"
        base_entry = self._evaluate(sound, base_id, label, "base", config)
        if all((known.run_id, known.sample_id) != (base_id, base_entry.sample_id) for known in self.base_entries):
            self.base_entries.append(base_entry)
            self._job(self.base_jobs, sound, base_id, label, None)

    def _sample(self, run_id: str, evaluation: _Evaluation) -> SampleTask:
        identity = task_id(SampleTask.identity(run_id, evaluation.questions, evaluation.sampling))
        return SampleTask(id=identity, questions=evaluation.questions, sampling=evaluation.sampling)

    def _loss(self, run_id: str, sound: _SoundCell) -> LossTask:
        content, max_length = sound.evaluation.plain_answers, sound.cell.data.max_length
        self._must_prove(sound.base, content, max_length, self.sweep.key(sound.index, "evaluation", "plain_answers"))
        return LossTask(
            id=task_id(LossTask.identity(run_id, content, max_length)), content=content, max_length=max_length
        )

    def _evaluate(self, sound: _SoundCell, run_id: str, label: str, kind: Any, config: dict[str, Scalar]) -> RunEntry:
        sample = self._sample(run_id, sound.evaluation)
        judge_ids = {}
        for name, metric in sound.evaluation.metrics.items():
            judge_id = task_id(JudgeTask.identity(sample.id, metric))
            self.judge_tasks[judge_id] = JudgeTask(id=judge_id, sample_id=sample.id, run_id=run_id, metric=metric)
            judge_ids[name] = judge_id
        return RunEntry(
            label=label,
            kind=kind,
            run_id=run_id,
            sample_id=sample.id,
            judge_ids=judge_ids,
            plain_loss_id=self._loss(run_id, sound).id,
            config=config,
        )

    def _job(
        self, jobs: dict[str, RunJob], sound: _SoundCell, run_id: str, label: str, train: TrainTask | None
    ) -> None:
        """One job per run: cells that differ in their evaluation alone share the training."""
        sample, loss = self._sample(run_id, sound.evaluation), self._loss(run_id, sound)
        known = jobs.get(run_id)
        samples = known.samples if known else ()
        losses = known.losses if known else ()
        jobs[run_id] = RunJob(
            id=run_id,
            label=known.label if known else label,
            base=sound.base,
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
        loss_on: str = "responses",
        allow_truncated_away: bool = False,
    ) -> None:
        what = (base.model + base.revision, content, max_length, loss_on, allow_truncated_away)
        self.to_prove.setdefault(what, (base, key))

    def prove_rows(self) -> None:
        """Make tokens of all rows, prove their masks and count them; what cannot be proved is a fault."""
        tokenizers: dict[str, Any] = {}
        for what, (base, key) in self.to_prove.items():
            model, content, max_length, loss_on, allow = what
            if model not in tokenizers:
                tokenizers[model] = load_tokenizer(base)
            encoder = ChatEncoder(tokenizers[model], max_length, "all" if loss_on == "all" else "responses")
            try:
                encoded, _ = encode_all(self.sources.rows[content], encoder, allow)
            except DataError as error:
                self.sources.faults.append(Fault(key, str(error)))
                continue
            self.num_tokens[what] = (len(encoded), sum(len(row.input_ids) for row in encoded))

    def costs(self) -> dict[str, Cost]:
        """What every row of the sweep takes, by label."""
        costs = {}
        jobs = {**self.base_jobs, **self.run_jobs}
        for entry in (*self.base_entries, *self.entries):
            job = jobs[entry.run_id]
            sample = next(sample for sample in job.samples if sample.id == entry.sample_id)
            num_answers = len(sample.questions) * sample.sampling.samples
            steps, tokens = self._training_cost(job.train) if job.train else (0, 0)
            costs[entry.label] = Cost(steps, tokens, num_answers, num_answers * len(entry.judge_ids))
        return costs

    def _training_cost(self, train: TrainTask) -> tuple[int, int]:
        data, base = train.data, train.base
        what = (
            base.model + base.revision,
            train.train_content,
            data.max_length,
            data.loss_on,
            data.allow_truncated_away,
        )
        num_rows, num_tokens = self.num_tokens[what]
        steps = num_optimizer_steps(num_rows, train.training)
        rows_used = steps * min(train.training.batch_size, num_rows)
        return steps, round(num_tokens * rows_used / num_rows)


def _flat(cell: Cell) -> dict[str, Scalar]:
    """A cell's settings with dotted names, as the columns of table ``runs``; lists and mappings as JSON."""
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
    for section in ("base", "data", "training", "evaluation"):
        put(section, getattr(cell, section).model_dump(mode="json"))
    return flat
