"""Tasks: units of work with an identity, and the jobs that place them in one process.

A task's id is the first 12 hex digits of sha256 over canonical JSON of everything that can change its outcome: file
inputs by content hash, the base by name and revision, what other tasks make by their ids, and a ``semantics`` number
per method that is raised when a fix changes numbers. Paths, names, worker counts and machines are not in it. So every
id is known before anything runs, and the same id means the same experiment.

Everything here is plain data that pickles: workers get a job, and read files only from the store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from analysis.judges import MetricConfig
from analysis.manifest import run_key, vector_key
from analysis.tables import table_key
from analysis.vectors import VectorConfig
from engine.jobs import StoredJob
from engine.measure_jobs import MeasureJob, MergeJob, StudyJob
from engine.weight_jobs import EditTask, PileJob, ProfileJob
from trainables.base_model import ResolvedBase
from trainables.chat_data import DataConfig
from trainables.config import Config, NamesPrompts, NamesVector, marked, names_in, recipe_of, referenced
from trainables.defenses import Item
from trainables.interventions import Interventions
from trainables.lora import LoraSettings
from trainables.sample import SamplingConfig
from trainables.training_config import TrainingConfig

TRAIN_SEMANTICS = 2  # 2: rows of a step are cut into micro-batches by length, which deals out dropout masks anew
SAMPLE_SEMANTICS = 1
LOSS_SEMANTICS = 1


def task_id(recipe: dict[str, Any]) -> str:
    """Identity of the task with this recipe."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Start(Config):
    """What a training starts from, by the ids of earlier trainings: the base with the adapters of ``merged`` merged
    into it, in order, and with the adapter of ``continued`` to go on with (None: a new one)."""

    merged: tuple[str, ...] = ()
    continued: str | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        """All these trainings."""
        return self.merged if self.continued is None else (*self.merged, self.continued)

    def of_child(self, parent_id: str, adapter: Literal["continue", "merge"]) -> Start:
        """What a child of a training with this start starts from. A continued adapter is whole: it holds what was
        learned in it before."""
        if adapter == "continue":
            return Start(merged=self.merged, continued=parent_id)
        return Start(merged=(*self.merged, parent_id))


FROM_BASE = Start()


class TrainTask(Config):
    """One training. ``defense`` names vectors by task id and holds prompt banks as texts."""

    id: str
    base: ResolvedBase
    data: DataConfig
    train_content: str  # sha256 of the training rows
    defense: tuple[Item, ...]
    training: TrainingConfig
    seed: int
    start: Start = FROM_BASE

    @staticmethod
    def identity(
        base: ResolvedBase,
        data: DataConfig,
        train_content: str,
        defense: tuple[Item, ...],
        training: TrainingConfig,
        seed: int,
        start: Start = FROM_BASE,
    ) -> dict[str, Any]:
        """What comes from another run has the ids of its ancestors in it; what starts from the base has not even the
        field, as it was before there was one."""
        micro = training.micro_batch_size or training.batch_size
        update: dict[str, object] = {"micro_batch_size": min(micro, training.batch_size)}
        if training.max_steps is not None:
            update["epochs"] = 1.0  # has no say then
        if training.lora.target_modules is not None:
            names = tuple(sorted(set(training.lora.target_modules)))
            update["lora"] = training.lora.model_copy(update={"target_modules": names})
        if training.lora.layers is not None:
            lora = update.get("lora", training.lora)
            assert isinstance(lora, LoraSettings)
            update["lora"] = lora.model_copy(update={"layers": tuple(sorted(set(training.lora.layers)))})
        settled = training.model_copy(update=update)
        return {
            "kind": "train",
            "semantics": TRAIN_SEMANTICS,
            "base": base.identity(),
            "data": recipe_of(data) | {"train": train_content},
            "defense": [recipe_of(item) | {"semantics": item.semantics} for item in defense],
            "training": recipe_of(settled),
            "seed": seed,
        } | ({"start": recipe_of(start)} if start != FROM_BASE else {})

    def vector_ids(self) -> tuple[str, ...]:
        """Tasks that make the vectors of this training's defense, and those that it watches."""
        named = [value for item in self.defense for value in referenced(item, NamesVector).values()]
        named += [self.training.watch.vector_names()] if self.training.watch is not None else []
        return tuple(dict.fromkeys(name for value in named for name in names_in(value)))


class QuestionText(Config):
    """A question of an evaluation."""

    id: str
    text: str


class SampleTask(Config):
    """Answers of one run to an evaluation's questions."""

    id: str
    questions: tuple[QuestionText, ...]
    sampling: SamplingConfig
    endpoint: str | None = None  # where they come from; None: from the model in the trial

    @staticmethod
    def identity(
        run_id: str, questions: tuple[QuestionText, ...], sampling: SamplingConfig, *, from_server: bool = False
    ) -> dict[str, Any]:
        """A server draws otherwise than we do, so that answers come from one is in it; which one is not."""
        texts = [[question.id, question.text] for question in questions]
        head = {"kind": "sample", "semantics": SAMPLE_SEMANTICS, "run": run_id, "questions": texts}
        if from_server:
            head["answers_from"] = "server"
        recipe = recipe_of(sampling)
        if sampling.interventions:
            recipe["interventions"] = _interventions_recipe(sampling.interventions)
        return head | {"sampling": recipe}

    def vector_ids(self) -> tuple[str, ...]:
        """Tasks that make the vectors which are at work while it answers."""
        return _vector_ids(self.sampling.interventions)


def _interventions_recipe(items: Interventions) -> list[dict[str, Any]]:
    return [recipe_of(item) | {"semantics": item.semantics} for item in items]


def _vector_ids(items: Interventions) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(name) for item in items for name in marked(item, NamesVector).values()))


class AnswerTask(Config):
    """A sampling task whose answers a server gives."""

    sample: SampleTask
    run_id: str

    @property
    def id(self) -> str:
        return self.sample.id

    @property
    def endpoint(self) -> str:
        assert self.sample.endpoint is not None, "sampled in the trial"
        return self.sample.endpoint


class LossTask(Config):
    """Losses of one run on held-out plain answers."""

    id: str
    content: str  # sha256 of the rows
    max_length: int
    interventions: Interventions = ()  # as in the sampling beside it

    @staticmethod
    def identity(run_id: str, content: str, max_length: int, interventions: Interventions = ()) -> dict[str, Any]:
        data: dict[str, Any] = {"data": content, "max_length": max_length}
        if interventions:
            data["interventions"] = _interventions_recipe(interventions)
        return {"kind": "measure/loss", "semantics": LOSS_SEMANTICS, "run": run_id} | data

    def vector_ids(self) -> tuple[str, ...]:
        """Tasks that make the vectors which are at work while it is measured."""
        return _vector_ids(self.interventions)


class JudgeTask(Config):
    """Scores of one run's answers by one metric (a resolved one: it names no trait any more)."""

    id: str
    sample_id: str
    run_id: str
    metric: MetricConfig

    @staticmethod
    def identity(sample_id: str, metric: MetricConfig) -> dict[str, Any]:
        return {"kind": "judge", "sample": sample_id, "semantics": metric.semantics, "metric": metric.identity()}


class AskedTask(Config):
    """Judged answers of the base that a vector is made of: ``judge_ids`` it waits for, ``compared_ids`` not."""

    about: str
    sample: SampleTask
    judge_ids: dict[str, str]  # metric -> judging task
    compared_ids: dict[str, str]

    def identity(self) -> list[Any]:
        """What of it can change the vector."""
        return [self.sample.id, self.judge_ids]


class AnswersJob(StoredJob):
    """What one trial does to get answers that a vector is made of: sample one task from the untrained base."""

    id: str  # of the sampling task
    label: str
    base: ResolvedBase
    run_id: str  # the base's
    sample: SampleTask

    @property
    def parents(self) -> tuple[str, ...]:
        return ()

    def tasks(self) -> tuple[tuple[str, str], ...]:
        """Ids of what the job does, each with the key of what it makes."""
        return ((self.id, table_key("generations", self.sample.id)),)


class VectorJob(StoredJob):
    """Makes one vector."""

    id: str
    label: str
    name: str  # in the sweep
    base: ResolvedBase
    vector: VectorConfig  # a resolved one: it names nothing outside of the store any more
    parents: tuple[str, ...] = ()
    asked: tuple[AskedTask, ...] = ()

    @property
    def judge_ids(self) -> tuple[str, ...]:
        """Judging tasks that must be done before it."""
        return tuple(judge_id for asked in self.asked for judge_id in asked.judge_ids.values())

    @property
    def all_judge_ids(self) -> tuple[str, ...]:
        """These, and those that are for people alone."""
        return (*self.judge_ids, *(judge_id for asked in self.asked for judge_id in asked.compared_ids.values()))

    def tasks(self) -> tuple[tuple[str, str], ...]:
        """Ids of what the job does, each with the key of what it makes."""
        return ((self.id, vector_key(self.id)),)


class RunJob(StoredJob):
    """What one trial does for one run: train (not for a base, or a model whose weights are moved), sample, measure the
    loss on plain answers.

    Answers that a server gives are no part of it: they are asked for when it is done."""

    id: str  # the train_id, or the base's or the edit's id
    label: str
    base: ResolvedBase
    train: TrainTask | None
    samples: tuple[SampleTask, ...]
    losses: tuple[LossTask, ...]
    edit: EditTask | None = None

    @property
    def parents(self) -> tuple[str, ...]:
        made_of: tuple[str, ...] = ()
        if self.edit is not None:
            made_of = self.edit.parents
        elif self.train is not None:
            made_of = (*self.train.start.ids, *self.train.vector_ids())
        present = [name for sample in self.samples for name in sample.vector_ids()]
        present += [name for loss in self.losses for name in loss.vector_ids()]
        return tuple(dict.fromkeys((*made_of, *present)))

    @property
    def merged(self) -> tuple[str, ...]:
        """Trainings whose adapters are merged into the base that this run's adapter is on."""
        return () if self.train is None else self.train.start.merged

    def bare(self) -> RunJob:
        """The training alone, as what rests on it needs it."""
        return self.model_copy(update={"samples": (), "losses": ()})

    def tasks(self) -> tuple[tuple[str, str], ...]:
        """Ids of what the job does, in order, each with the key of what it makes."""
        trained = ((self.id, run_key(self.id)),) if self.train is not None else ()
        return (
            *trained,
            *((task.id, table_key("generations", task.id)) for task in self.samples if task.endpoint is None),
            *((task.id, table_key("losses", task.id)) for task in self.losses),
        )

    def answers(self) -> tuple[AnswerTask, ...]:
        """What a server is asked for once the job is done."""
        return tuple(AnswerTask(sample=task, run_id=self.id) for task in self.samples if task.endpoint is not None)


Job: TypeAlias = AnswersJob | VectorJob | RunJob | MeasureJob | StudyJob | MergeJob | PileJob | ProfileJob


def base_run_id(base: ResolvedBase) -> str:
    """Identity of the untrained base as something to sample from and measure."""
    return task_id({"kind": "base", "base": base.identity()})


def _ids_for_names(item: Config, vector_ids: Mapping[str, str]) -> dict[str, object]:
    """Field -> task id of the vector that it names, or tuple of them."""
    ids: dict[str, object] = {}
    for field, value in referenced(item, NamesVector).items():
        found = tuple(vector_ids[name] for name in names_in(value))
        ids[field] = found[0] if isinstance(value, str) else found
    return ids


def resolved_defense(
    items: tuple[Item, ...], vector_ids: dict[str, str], prompts: dict[str, tuple[str, ...]]
) -> tuple[Item, ...]:
    """Replace every vector name by its task id and every name of a prompt bank by its texts."""
    resolved = []
    for item in items:
        update = _ids_for_names(item, vector_ids)
        for field, bank in referenced(item, NamesPrompts).items():
            update[field] = prompts[bank] if isinstance(bank, str) else bank
        resolved.append(item.model_copy(update=update))
    return tuple(resolved)


def resolved_training(training: TrainingConfig, vector_ids: dict[str, str]) -> TrainingConfig:
    """Replace the names of the vectors that are watched by their task ids."""
    if training.watch is None:
        return training
    watch = training.watch.model_copy(update=_ids_for_names(training.watch, vector_ids))
    return training.model_copy(update={"watch": watch})
