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
        self._files: dict[str, tuple[VectorShape, str, str, str]] = {}  # name -> shape, model, revision, content
        for name, config in configs.items():
            self._check_files(f"vectors.{name}", name, config)

    def _check_files(self, key: str, name: str, config: VectorConfig) -> None:
        if isinstance(config, DifferenceVector):
            self.sources.chat_file(config.difference.positive, f"{key}.difference.positive")
            self.sources.chat_file(config.difference.negative, f"{key}.difference.negative")
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
        config = self.configs.get(name)
        if isinstance(config, RandomVector):
            return self.shape(config.random_like, base, model)
        if isinstance(config, DifferenceVector):
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

    def add(self, name: str, base: ResolvedBase, prove: Callable[[ResolvedBase, str, int, str], None]) -> str:
        """Put the task of a sound vector into the graph; returns its id.

        ``prove(base, content, max_length, key)`` is told every data file that the vector is made of.
        """
        config = self.configs[name]
        recipe: VectorRecipe
        parents: tuple[str, ...] = ()
        if isinstance(config, DifferenceVector):
            contents = {}
            for side in ("positive", "negative"):
                key = f"vectors.{name}.difference.{side}"
                content = self.sources.chat_file(getattr(config.difference, side), key)
                assert content is not None, "faults are raised before tasks are made"
                prove(base, content, config.difference.max_length, key)
                contents[side] = content
            recipe = DifferenceRecipe(base=base, max_length=config.difference.max_length, **contents)
        elif isinstance(config, RandomVector):
            like = self.add(config.random_like, base, prove)
            recipe, parents = RandomRecipe(like=like, name=name, seed=config.seed), (like,)
        else:
            recipe = FileRecipe(content=self._files[name][3])
        identity = task_id(recipe.identity())
        if identity not in self.jobs:
            self.jobs[identity] = VectorJob(id=identity, label=f"vector {name}", recipe=recipe, parents=parents)
            taken = [known for known in self.ids if known == name or known.startswith(f"{name} #")]
            self.ids[name if not taken else f"{name} #{len(taken) + 1}"] = identity
        return identity
