"""The named vectors of a sweep: what they name is looked up, and they become tasks for the bases that use them.

Which kinds there are is not known here: marks on a kind's fields say what it names (``analysis.vectors.base``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath

from analysis.vectors import VectorConfig
from engine.config_faults import format_path
from engine.contents import prompt_bank
from engine.sources import Sources
from engine.tasks import VectorJob, task_id
from trainables.base_model import ResolvedBase
from trainables.config import NamesChatFile, NamesFile, NamesPrompts, NamesVector, Path, marked, replaced
from trainables.errors import ConfigError, Fault
from trainables.shapes import ModelShape, VectorShape

Prove = Callable[[ResolvedBase, str, int, str], None]  # base, content, max_length, key


@dataclass(frozen=True)
class _Found:
    """A vector's config with everything found that it names outside of the sweep file."""

    contents: Mapping[Path, object]  # what stands in place of names
    chats: Mapping[Path, str]  # of these, the hashes of chat files
    files: Mapping[Path, FilePath]


class VectorTasks:
    """A vector is made anew for every base that uses it, so a name can stand for several tasks."""

    def __init__(self, configs: Mapping[str, VectorConfig], sources: Sources) -> None:
        self.configs = configs
        self.sources = sources
        self.jobs: dict[str, VectorJob] = {}
        self.ids: dict[str, str] = {}  # name in tables -> task id
        self._found = {name: found for name in configs if (found := self._look_up(name)) is not None}

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
        faults = list(config.file_faults(files)) if is_sound else []
        self._note(name, faults)
        return _Found(contents, chats, files) if is_sound and not faults else None

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

    def add(self, name: str, base: ResolvedBase, prove: Prove) -> str:
        """Put the task of a vector that has a shape for ``base`` into the graph; returns its id.

        ``prove(base, content, max_length, key)`` is told every data file that the vector is made of.
        """
        config, found = self.configs[name], self._found[name]
        for path, content in found.chats.items():
            prove(base, content, config.max_length, self._key(name, path))
        others = {path: self.add(str(other), base, prove) for path, other in marked(config, NamesVector).items()}
        resolved = replaced(config, {**found.contents, **others})
        head = {"kind": f"vector/{config.key()}", "semantics": config.semantics}
        identity = task_id(head | resolved.identity(base, name))
        if identity not in self.jobs:
            self.jobs[identity] = VectorJob(
                id=identity,
                label=f"vector {name}",
                name=name,
                base=base,
                vector=resolved,
                parents=tuple(dict.fromkeys(others.values())),
            )
        taken = {known: made for known, made in self.ids.items() if known == name or known.startswith(f"{name} #")}
        if identity not in taken.values():  # a name stands for several tasks where several bases use it
            self.ids[name if not taken else f"{name} #{len(taken) + 1}"] = identity
        return identity
