"""The task graph of a sweep: every sound cell becomes a run with its samples, judgements and measurements."""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Literal

from analysis.judges import MetricConfig
from analysis.manifest import EditEntry, RunEntry, Scalar
from engine.lookup import Found, vector_names
from engine.row_proofs import RowProofs, tokenizer_name
from engine.smoke import smoke_cell, smoke_questions
from engine.sources import Sources
from engine.sweep_file import Cell, Sweep
from engine.tasks import (
    FROM_BASE,
    JudgeTask,
    LossTask,
    QuestionText,
    RunJob,
    SampleTask,
    Start,
    TrainTask,
    base_run_id,
    resolved_defense,
    resolved_training,
    task_id,
)
from engine.vector_tasks import VectorTasks
from engine.weight_jobs import EditTask
from trainables.base_model import ResolvedBase
from trainables.config import NamesVector, Path, marked, replaced
from trainables.defenses import defense_label
from trainables.errors import Fault
from trainables.interventions import Interventions, interventions_label
from trainables.sample import Question, SamplingConfig
from trainables.shapes import ModelShape
from trainables.training_config import num_optimizer_steps

BASE = "base"  # label of the untrained base


@dataclass(frozen=True)
class Cost:
    """What a run takes, counted on its data; the tokens of inoculation prompts are not in it."""

    num_steps: int
    num_training_tokens: int
    num_answers: int
    num_judgements: int


@dataclass(frozen=True)
class SoundCell:
    """A cell in which everything was found."""

    index: int
    cell: Cell
    found: Found

    @property
    def sampling(self) -> SamplingConfig:
        evaluation = self.cell.evaluation
        return SamplingConfig(**{name: getattr(evaluation, name) for name in SamplingConfig.model_fields})


class Graph:
    """Tasks of sound cells. ``twins``: whether two of them may be one and the same work, done once for both."""

    def __init__(self, sweep: Sweep, sources: Sources, vectors: VectorTasks, *, twins: bool = False) -> None:
        self.twins = twins
        self.sweep = sweep
        self.sources = sources
        self.vectors = vectors
        self.run_jobs: dict[str, RunJob] = {}
        self.base_jobs: dict[str, RunJob] = {}
        self.judge_tasks: dict[str, JudgeTask] = {}
        self.trains: dict[int, TrainTask] = {}  # by index of the cell
        self._entries: list[tuple[int, RunEntry]] = []  # with that index, in its order
        self.base_entries: list[RunEntry] = []
        self.base_of: dict[str, RunEntry] = {}  # by label of the run, or edited model
        self.edited_jobs: dict[str, RunJob] = {}
        self.edited_entries: list[RunEntry] = []
        self.sound: dict[str, SoundCell] = {}  # by label of the run
        self.run_ids: dict[str, str] = {}
        self.shapes: dict[str, ModelShape] = {}  # by run, and base
        self.proofs = RowProofs(sources)

    @property
    def entries(self) -> list[RunEntry]:
        """Rows of the runs, in the order of the file."""
        return [entry for _, entry in self._entries]

    def smoke(self, cells: Sequence[SoundCell]) -> Graph:
        """The same cells cut short. Some may be equal then (where they differed in epochs): both rows stay."""
        short = Graph(self.sweep, self.sources, self.vectors.smoke(), twins=True)
        for sound in cells:
            found = replace(sound.found, questions=smoke_questions(sound.found.questions))
            short.add(replace(sound, cell=smoke_cell(sound.cell), found=found))
        short.proofs.num_tokens = self.proofs.num_tokens  # of the same data
        return short

    def rows(self, labels: frozenset[str] | None) -> tuple[RunEntry, ...]:
        """Rows of the sweep: the runs, and edited models, with these labels (None: all), after the bases that belong to
        them."""
        runs = [entry for entry in self.all_entries if labels is None or entry.label in labels]
        bases = [self.base_of[entry.label] for entry in runs]
        return (*(base for base in self.base_entries if base in bases), *runs)

    @property
    def all_entries(self) -> list[RunEntry]:
        """Rows that can be asked for: runs, then edited models."""
        return [*self.entries, *self.edited_entries]

    def add(self, sound: SoundCell) -> None:
        """Add a cell's vectors, run, samples, judgements and measurements, and those of its base. The cell that it
        starts from must have been added before."""
        cell, base = sound.cell, sound.found.base
        start = self._start(sound)
        if start is None:
            return
        self.proofs.name_base(base, self.sweep.key(sound.index, "base", "model"))
        watched = cell.training.watch.vector_names() if cell.training.watch is not None else ()
        names = dict.fromkeys((*vector_names(cell.defense), *watched))
        ids = {name: self.vectors.add(name, base, self.proofs.must_prove, self.proofs.must_render) for name in names}
        defense = resolved_defense(cell.defense, ids, dict(sound.found.prompts))
        training = resolved_training(cell.training, ids)
        content = sound.found.train_content
        identity = TrainTask.identity(base, cell.data, content, defense, training, cell.seed, start)
        train = TrainTask(
            id=task_id(identity),
            base=base,
            data=cell.data,
            train_content=content,
            defense=defense,
            training=training,
            seed=cell.seed,
            start=start,
        )
        self.trains[sound.index] = train
        data = cell.data
        key = self.sweep.key(sound.index, "data", "train")
        self.proofs.must_prove(base, content, data.max_length, key, data.loss_on, data.allow_truncated_away)
        for position, item in enumerate(defense):
            self.proofs.must_prove_rewritten(
                base, data, content, item, self.sweep.key(sound.index, "defense", position)
            )
        entry = self._evaluate(sound, train.id, cell.label, "run", _flat(cell, base), start)
        for other in self.entries:
            if _identity(other) == _identity(entry) and not self.twins:
                message = f"two cells have one identity ({train.id}): {other.label!r} and {cell.label!r}"
                self.sources.faults.append(Fault("runs", f"{message}; let them differ or remove one"))
                return
        bisect.insort(self._entries, (sound.index, entry), key=lambda placed: placed[0])
        self.sound[cell.label], self.run_ids[cell.label] = sound, train.id
        self._job(self.run_jobs, sound, train.id, cell.label, train)

        base_id = base_run_id(base)
        self.shapes[train.id] = self.shapes[base_id] = sound.found.shape
        shared = ("base", "evaluation")
        config = {name: value for name, value in entry.config.items() if name.partition(".")[0] in shared}
        label = _base_label(cell, config, self.base_entries)
        base_entry = self._evaluate(sound, base_id, label, "base", config)
        # Unlike with runs, the names of metrics count: they are the columns beside which the runs are read.
        what = (_identity(base_entry), base_entry.judge_ids)
        known = [other for other in self.base_entries if (_identity(other), other.judge_ids) == what]
        self.base_of[cell.label] = known[0] if known else base_entry
        if not known:
            self.base_entries.append(base_entry)
            self._job(self.base_jobs, sound, base_id, label, None)

    def _start(self, sound: SoundCell) -> Start | None:
        """What a cell's training starts from; None if that has a fault, here or in the cell that it starts from."""
        start, index = sound.cell.start_from, self.sweep.parents[sound.index]
        if start is None:
            return FROM_BASE
        parent = self.trains.get(index) if index is not None else None
        if index is None or parent is None:
            return None
        faults = []
        base, label = sound.found.base, self.sweep.cells[index].label
        if base.identity() != parent.base.identity():
            ours, theirs = (" ".join(one.identity().values()) for one in (base, parent.base))
            key = self.sweep.key(sound.index, "base", "model")
            faults.append(Fault(key, f"{ours}, but {label!r}, which this run starts from, has {theirs}"))
        found = parent.start.of_child(parent.id, start.adapter)
        if found.merged and sound.cell.evaluation.answers_from is not None:
            message = (
                "a server puts adapters on the base, and this run's stands on one that has the adapter of "
                f"{label!r} merged into it; leave it out, or write adapter: continue"
            )
            faults.append(Fault(self.sweep.key(sound.index, "evaluation", "answers_from"), message))
        self.sources.faults += [fault for fault in faults if fault not in self.sources.faults]
        return None if faults else found

    def judged(
        self, sound: SoundCell, run_id: str, metrics: Mapping[str, MetricConfig]
    ) -> tuple[SampleTask, dict[str, str]]:
        """A run's answers to its evaluation, and their judgements by some of its metrics."""
        sample = self._sample(run_id, sound)
        return sample, self._judge(run_id, sample.id, metrics)

    def asked_too(
        self,
        sound: SoundCell,
        run_id: str,
        questions: tuple[QuestionText, ...],
        sampling: SamplingConfig,
        metrics: Mapping[str, MetricConfig],
    ) -> tuple[SampleTask, dict[str, str]]:
        """Have a run asked other questions too, beside its evaluation, and judge its answers."""
        asked = Question(questions[0].id, questions[0].text)
        self.proofs.must_render(sound.found.base, asked, sampling, "weight_steering.answers.system_prompt")
        identity = task_id(SampleTask.identity(run_id, questions, sampling))
        sample = SampleTask(id=identity, questions=questions, sampling=sampling)
        job = self.run_jobs[run_id]
        if sample.id not in [known.id for known in job.samples]:
            self.run_jobs[run_id] = job.model_copy(update={"samples": (*job.samples, sample)})
        return sample, self._judge(run_id, sample.id, metrics)

    def add_edited(
        self,
        sound: SoundCell,
        run: str,
        label: str,
        edit: EditTask,
        entry: EditEntry,
        settings: Mapping[str, Scalar],
    ) -> str | None:
        """Add a model whose weights are moved, evaluated as the run labelled ``run`` is; returns what is wrong, if
        anything."""
        base = sound.found.base
        edit_id = task_id(edit.identity(base_run_id(base)))
        config = {**_flat(sound.cell, base), **settings}
        row = self._evaluate(sound, edit_id, label, "edited", config).model_copy(update={"edit": entry})
        for other in (*self.base_entries, *self.all_entries):
            if _identity(other) == _identity(row) and not self.twins:
                return f"two edited models have one identity ({edit_id}): {other.label!r} and {label!r}"
            if other.label == label:
                return f"an edited model would be called {label!r} like another row; give the direction another name"
        self.edited_entries.append(row)
        self.base_of[label] = self.base_of[run]
        self._job(self.edited_jobs, sound, edit_id, label, None)
        self.edited_jobs[edit_id] = self.edited_jobs[edit_id].model_copy(update={"edit": edit})
        return None

    def _sample(self, run_id: str, sound: SoundCell) -> SampleTask:
        questions = sound.found.questions
        sampling = sound.sampling.model_copy(update={"interventions": self._interventions(sound)})
        asked = Question(questions[0].id, questions[0].text)
        key = self.sweep.key(sound.index, "evaluation", "system_prompt")
        self.proofs.must_render(sound.found.base, asked, sampling, key)
        endpoint = sound.cell.evaluation.answers_from
        identity = task_id(SampleTask.identity(run_id, questions, sampling, from_server=endpoint is not None))
        return SampleTask(id=identity, questions=questions, sampling=sampling, endpoint=endpoint)

    def _loss(self, run_id: str, sound: SoundCell) -> LossTask:
        content, max_length = sound.found.plain_answers, sound.cell.data.max_length
        self.proofs.must_prove(sound.found.base, content, max_length, sound.found.plain_answers_key)
        present = self._interventions(sound)
        return LossTask(
            id=task_id(LossTask.identity(run_id, content, max_length, present)),
            content=content,
            max_length=max_length,
            interventions=present,
        )

    def _interventions(self, sound: SoundCell) -> Interventions:
        """The evaluation's interventions with ids of vectors and hashes of files; both are in the graph then."""
        resolved = []
        for index, item in enumerate(sound.cell.evaluation.interventions):
            values: dict[Path, object] = {}
            for path, name in marked(item, NamesVector).items():
                values[path] = self.vectors.add(
                    str(name), sound.found.base, self.proofs.must_prove, self.proofs.must_render
                )
            for where, content in sound.found.references.items():
                if where[0] == index:
                    key = self.sweep.key(sound.index, "evaluation", "interventions", *where)
                    self.proofs.must_prove(sound.found.base, content, item.tokens_read, key)
                    values[where[1:]] = content
            resolved.append(replaced(item, values))
        return tuple(resolved)

    def _evaluate(
        self,
        sound: SoundCell,
        run_id: str,
        label: str,
        kind: Literal["run", "base", "edited"],
        config: dict[str, Scalar],
        start: Start = FROM_BASE,
    ) -> RunEntry:
        sample, judge_ids = self.judged(sound, run_id, sound.found.metrics)
        return RunEntry(
            label=label,
            kind=kind,
            run_id=run_id,
            sample_id=sample.id,
            judge_ids=judge_ids,
            plain_loss_id=self._loss(run_id, sound).id,
            config=config,
            parent=start.ids[-1] if start.ids else None,
            merged=start.merged,
            scales={name: metric.bounds for name, metric in sound.found.metrics.items()},
        )

    def _judge(self, run_id: str, sample_id: str, metrics: Mapping[str, MetricConfig]) -> dict[str, str]:
        judge_ids = {name: task_id(JudgeTask.identity(sample_id, metric)) for name, metric in metrics.items()}
        for name, judge_id in judge_ids.items():
            self.judge_tasks[judge_id] = JudgeTask(
                id=judge_id, sample_id=sample_id, run_id=run_id, metric=metrics[name]
            )
        return judge_ids

    def _job(self, jobs: dict[str, RunJob], sound: SoundCell, run_id: str, label: str, train: TrainTask | None) -> None:
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

    def costs(self) -> dict[str, Cost]:
        """What every row of the sweep takes, by label."""
        costs = {}
        jobs = {**self.base_jobs, **self.run_jobs, **self.edited_jobs}
        for entry in (*self.base_entries, *self.all_entries):
            job = jobs[entry.run_id]
            sample = next(sample for sample in job.samples if sample.id == entry.sample_id)
            num_answers = len(sample.questions) * sample.sampling.samples
            steps, tokens = self._training_cost(job.train) if job.train else (0, 0)
            costs[entry.label] = Cost(steps, tokens, num_answers, num_answers * len(set(entry.judge_ids.values())))
        return costs

    def _training_cost(self, train: TrainTask) -> tuple[int, int]:
        """Optimizer steps, and tokens of the rows that they take (of a part of an epoch: as many rows on average)."""
        data, batch_size = train.data, train.training.batch_size
        what = (
            tokenizer_name(train.base),
            train.train_content,
            data.max_length,
            data.loss_on,
            data.allow_truncated_away,
        )
        num_rows, num_tokens = self.proofs.num_tokens[what]
        steps = num_optimizer_steps(num_rows, train.training)
        epochs, rest = divmod(steps, math.ceil(num_rows / batch_size))
        rows_used = epochs * num_rows + min(rest * batch_size, num_rows)
        return steps, round(num_tokens * rows_used / num_rows)


def _base_label(cell: Cell, config: Mapping[str, Scalar], bases: Sequence[RunEntry]) -> str:
    """What the next base is called: its number, and how it is asked otherwise than the first one."""
    if not bases:
        return BASE
    label, asked = f"{BASE} #{len(bases) + 1}", "evaluation.questions"
    if config[asked] != bases[0].config[asked]:
        label += f" on {PurePath(cell.evaluation.questions).stem}"
    if cell.evaluation.interventions:
        label += f" under {interventions_label(cell.evaluation.interventions)}"
    return label


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
    if cell.start_from is not None:
        put("start_from", cell.start_from.model_dump(mode="json"))
    for section in ("data", "training", "evaluation"):
        values = getattr(cell, section).model_dump(mode="json")
        if not values.get("interventions", True):
            del values["interventions"]  # nothing is present: no column for it
        put(section, values)
    return flat
