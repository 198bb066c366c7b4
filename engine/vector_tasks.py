"""The named vectors of a sweep: checked against the bases that use them, and turned into tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from analysis.vectors import read_vector_header
from engine.inputs import find_file, places_looked
from engine.sources import Sources
from engine.sweep_file import DifferenceVector, FileVector, RandomVector, VectorConfig
from engine.tasks import DifferenceRecipe, FileRecipe, RandomRecipe, VectorJob, VectorRecipe, task_id
from trainables.base_model import ResolvedBase
from trainables.errors import ConfigError, Fault
from trainables.shapes import ModelShape, VectorShape


class VectorTasks:
    """A vector is made anew for every base that uses it, so a name can stand for several tasks."""

    def __init__(self, configs: Mapping[str, VectorConfig], sources: Sources) -> None:
        self.configs = configs
        self.sources = sources
        self.jobs: dict[str, VectorJob] = {}
        self.ids: dict[str, str] = {}  # name in tables -> task id
        self._contents: dict[str, tuple[str, str]] = {}  # name of a difference -> positive, negative
        self._files: dict[str, tuple[VectorShape, str, str, str]] = {}  # name -> shape, model, revision, content
        for name, config in configs.items():
            self._check_files(f"vectors.{name}", name, config)

    def _check_files(self, key: str, name: str, config: VectorConfig) -> None:
        if isinstance(config, DifferenceVector):
            positive = self.sources.chat_file(config.difference.positive, f"{key}.difference.positive")
            negative = self.sources.chat_file(config.difference.negative, f"{key}.difference.negative")
            if positive is not None and negative is not None:
                self._contents[name] = (positive, negative)
        elif isinstance(config, FileVector):
            path = find_file(config.file, self.sources.folder)
            if path is None:
                where = places_looked(config.file, self.sources.folder)
                self.sources.faults.append(Fault(f"{key}.file", f"no file {config.file!r}; looked at {where}"))
                return
            try:
                self._files[name] = (*read_vector_header(path), self.sources.keep(path.read_bytes()))
            except ConfigError as error:
                self.sources.faults += [Fault(f"{key}.file", str(fault)) for fault in error.faults]

    def shape(self, name: str, base: ResolvedBase, model: ModelShape) -> VectorShape | None:
        """Shape of a named vector for this base; None where it has a fault, which is noted."""
        name = self._origin(name)
        if name in self._contents:
            return VectorShape(model.num_layers, model.hidden_size, "pre_norm")
        if name not in self._files:
            return None  # an unknown name or an unreadable file: said already
        shape, made_for, revision, _ = self._files[name]
        if (shape.num_layers, shape.hidden_size) != (model.num_layers, model.hidden_size):
            fault = (
                f"the vector has {shape.num_layers} layers of hidden size {shape.hidden_size}; "
                f"{base.model} has {model.num_layers} layers of hidden size {model.hidden_size}"
            )
        elif made_for and (made_for, revision) != (base.model, base.revision):
            fault = (
                f"the vector was made for {made_for} ({revision}); "
                f"the run that uses it starts from {base.model} ({base.revision})"
            )
        else:
            return shape
        self.sources.faults.append(Fault(f"vectors.{name}.file", fault))
        return None

    def _origin(self, name: str) -> str:
        """The vector at the end of a chain of ``random_like``; any of them where it goes in a circle (said already)."""
        seen: set[str] = set()
        while isinstance(config := self.configs.get(name), RandomVector) and name not in seen:
            seen.add(name)
            name = config.random_like
        return name

    def add(self, name: str, base: ResolvedBase, prove: Callable[[ResolvedBase, str, int, str], None]) -> str:
        """Put the task of a vector that has a shape for ``base`` into the graph; returns its id.

        ``prove(base, content, max_length, key)`` is told every data file that the vector is made of.
        """
        config = self.configs[name]
        recipe: VectorRecipe
        parents: tuple[str, ...] = ()
        if isinstance(config, DifferenceVector):
            positive, negative = self._contents[name]
            length = config.difference.max_length
            prove(base, positive, length, f"vectors.{name}.difference.positive")
            prove(base, negative, length, f"vectors.{name}.difference.negative")
            recipe = DifferenceRecipe(base=base, max_length=length, positive=positive, negative=negative)
        elif isinstance(config, RandomVector):
            like = self.add(config.random_like, base, prove)
            recipe, parents = RandomRecipe(like=like, name=name, seed=config.seed), (like,)
        else:
            recipe = FileRecipe(content=self._files[name][3])
        identity = task_id(recipe.identity())
        if identity not in self.jobs:
            self.jobs[identity] = VectorJob(id=identity, label=f"vector {name}", recipe=recipe, parents=parents)
        taken = {known: made for known, made in self.ids.items() if known == name or known.startswith(f"{name} #")}
        if identity not in taken.values():  # a name stands for several tasks where several bases use it
            self.ids[name if not taken else f"{name} #{len(taken) + 1}"] = identity
        return identity
