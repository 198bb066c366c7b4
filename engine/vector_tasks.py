"""The named vectors of a sweep: what they name is looked up, and they become tasks for the bases that use them.

Which kinds there are is not known here: marks on a kind's fields say what it names (``analysis.vectors.base``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath

from analysis.judges import BaseMetric, NamesTrait
from analysis.manifest import AskedEntry
from analysis.vectors import Asking, VectorConfig
from engine.config_faults import format_path
from engine.contents import prompt_bank, resolved_metric
from engine.sources import Sources
from engine.tasks import (
    AnswersJob,
    AskedTask,
    JudgeTask,
    QuestionText,
    SampleTask,
    VectorJob,
    base_run_id,
    task_id,
)
from trainables.base_model import ResolvedBase
from trainables.config import NamesChatFile, NamesFile, NamesPrompts, NamesVector, Path, inner_configs, marked, replaced
from trainables.errors import ConfigError, Fault
from trainables.sample import Question, SamplingConfig
from trainables.shapes import ModelShape, VectorShape

Prove = Callable[[ResolvedBase, str, int, str], None]  # base, content, max_length, key
Render = Callable[[ResolvedBase, Question, SamplingConfig, str], None]  # base, question, sampling, key


@dataclass(frozen=True)
class _Found:
    """A vector's config with everything found that it names outside of the sweep file."""

    config: VectorConfig  # with the traits that it names
    contents: Mapping[Path, object]  # what stands in place of names
    chats: Mapping[Path, str]  # of these, the hashes of chat files
    files: Mapping[Path, FilePath]


class VectorTasks:
    """A vector is made anew for every base that uses it, so a name can stand for several tasks."""

    def __init__(self, configs: Mapping[str, VectorConfig], sources: Sources, *, smoke: bool = False) -> None:
        self.configs = configs
        self.sources = sources
        self.is_smoke = smoke
        self.answer_jobs: dict[str, AnswersJob] = {}
        self.jobs: dict[str, VectorJob] = {}
        self.judge_tasks: dict[str, JudgeTask] = {}
        self.ids: dict[str, str] = {}  # name in tables -> task id
        self._found = {name: found for name in configs if (found := self._look_up(name)) is not None}

    def smoke(self) -> VectorTasks:
        """The same vectors with little sampling, in a graph of their own."""
        return VectorTasks(self.configs, self.sources, smoke=True)

    def _key(self, name: str, path: Path) -> str:
        return format_path(("vectors", name, *path))

    def _look_up(self, name: str) -> _Found | None:
        config = self.configs[name]
        contents: dict[Path, object] = {}
        chats: dict[Path, str] = {}
        files: dict[Path, FilePath] = {}
        is_sound = True
        for path, text in marked(config, NamesChatFile).items():
            content = self.sources.chat_file(str(text), self._key(name, path))
            if content is None:
                is_sound = False
            else:
                contents[path] = chats[path] = content
        for path, text in marked(config, NamesFile).items():
            file = self.sources.file(str(text), self._key(name, path), config.content, config.model_dump_json())
            if file is None:
                is_sound = False
            else:
                files[path], contents[path] = file
        for path, bank in marked(config, NamesPrompts).items():
            texts = prompt_bank(bank, self._key(name, path), self.sources)
            if texts is None:
                is_sound = False
            else:
                contents[path] = texts
        for path, metric in inner_configs(config, within=BaseMetric):
            if isinstance(metric, BaseMetric):
                resolved = resolved_metric(metric, self._key(name, path), self.sources)  # type: ignore[arg-type]
                is_sound = is_sound and resolved is not None
                contents[path] = resolved
        traits = {}
        for path, text in marked(config, NamesTrait, within=BaseMetric).items():
            trait = self.sources.trait(str(text), self._key(name, path))
            is_sound = is_sound and trait is not None
            if trait is not None:
                traits[path] = trait[0]
        if not is_sound:
            return None
        rows = {path: self.sources.rows[content] for path, content in chats.items()}
        faults = [*config.file_faults(files), *config.chat_faults(rows)]
        try:
            config = config.with_traits(traits)
        except ConfigError as error:
            faults += error.faults
        self._note(name, faults)
        return _Found(config, contents, chats, files) if not faults else None

    def _note(self, name: str, faults: list[Fault]) -> None:
        self.sources.faults += [Fault(f"vectors.{name}.{fault.key}", fault.message) for fault in faults]

    def shape(self, name: str, base: ResolvedBase, model: ModelShape) -> VectorShape | None:
        """Shape of a named vector for this base; None where it has a fault, which is noted."""
        return self._shape(name, base, model, ())

    def _shape(self, name: str, base: ResolvedBase, model: ModelShape, above: tuple[str, ...]) -> VectorShape | None:
        """``above``: the vectors that ask for it, of which it must be none."""
        found = self._found.get(name)
        if found is None or name in above:
            return None  # an unknown name, a circle or something that was not found: said already
        config = self.configs[name]
        shapes: dict[Path, VectorShape] = {}
        for path, other in marked(config, NamesVector).items():
            shape = self._shape(str(other), base, model, (*above, name))
            if shape is None:
                return None
            shapes[path] = shape
        try:
            return config.shape(base, model, shapes, found.files)
        except ConfigError as error:
            self._note(name, list(error.faults))
            return None

    def add(self, name: str, base: ResolvedBase, prove: Prove, render: Render | None = None) -> str:
        """Put the task of a vector that has a shape for ``base`` into the graph; returns its id.

        ``prove(base, content, max_length, key)`` is told every data file that the vector is made of, ``render(base,
        question, sampling, key)`` every system prompt under which the base is asked.
        """
        found = self._found[name]
        config = found.config
        for path, content in found.chats.items():
            prove(base, content, config.max_length, self._key(name, path))
        others = {
            path: self.add(str(other), base, prove, render) for path, other in marked(config, NamesVector).items()
        }
        resolved = replaced(config, {**found.contents, **others})
        if self.is_smoke:
            resolved = resolved.smoke()
        asked = tuple(self._ask(name, asking, base, render) for asking in resolved.asked())
        recipe = {"kind": f"vector/{config.key()}", "semantics": config.semantics} | resolved.identity(base, name)
        if asked:
            recipe["asked"] = [one.identity() for one in asked]
        identity = task_id(recipe)
        if identity not in self.jobs:
            self.jobs[identity] = VectorJob(
                id=identity,
                label=f"vector {name}",
                name=name,
                base=base,
                vector=resolved,
                parents=tuple(dict.fromkeys([*others.values(), *(one.sample.id for one in asked)])),
                asked=asked,
            )
        taken = {known: made for known, made in self.ids.items() if known == name or known.startswith(f"{name} #")}
        if identity not in taken.values():  # a name stands for several tasks where several bases use it
            self.ids[name if not taken else f"{name} #{len(taken) + 1}"] = identity
        return identity

    def asked_entries(self) -> tuple[AskedEntry, ...]:
        """What the sweep's manifest says of the answers that its vectors are made of."""
        entries = []
        for name, vector_id in self.ids.items():
            job = self.jobs[vector_id]
            for asked, asking in zip(job.asked, job.vector.asked(), strict=True):
                metrics = {**asking.metrics, **asking.compared}
                entries.append(
                    AskedEntry(
                        vector=name,
                        about=asked.about,
                        sample_id=asked.sample.id,
                        judge_ids={**asked.judge_ids, **asked.compared_ids},
                        counted=tuple(asked.judge_ids),
                        scales={metric: one.bounds for metric, one in metrics.items()},
                        rule=dict(asking.rule),
                    )
                )
        return tuple(entries)

    def _ask(self, name: str, asking: Asking, base: ResolvedBase, render: Render | None) -> AskedTask:
        """Put sampling and judging tasks into the graph."""
        if render is not None:
            render(base, asking.questions[0], asking.sampling, f"vectors.{name}")
        run_id = base_run_id(base)
        questions = tuple(QuestionText(id=question.id, text=question.text) for question in asking.questions)
        identity = task_id(SampleTask.identity(run_id, questions, asking.sampling))
        sample = SampleTask(id=identity, questions=questions, sampling=asking.sampling)
        label = f"answers for vector {name}, {asking.about}"
        job = AnswersJob(id=identity, label=label, base=base, run_id=run_id, sample=sample)
        self.answer_jobs.setdefault(identity, job)

        def judged(metrics: Mapping[str, BaseMetric]) -> dict[str, str]:
            ids = {}
            for metric_name, metric in metrics.items():
                judge_id = task_id(JudgeTask.identity(identity, metric))  # type: ignore[arg-type]
                task = JudgeTask(id=judge_id, sample_id=identity, run_id=run_id, metric=metric)
                self.judge_tasks.setdefault(judge_id, task)
                ids[metric_name] = judge_id
            return ids

        return AskedTask(
            about=asking.about,
            sample=sample,
            judge_ids=judged(asking.metrics),
            compared_ids=judged(asking.compared),
        )
