"""Everything outside the sweep file that a sweep names: bases, data files, traits. Each is read once and checked.

Nothing is written. What is wrong is collected in ``faults`` with the key under which the user named it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from analysis.traits import Trait, read_trait
from engine.inputs import (
    canonical_jsonl,
    find_file,
    find_trait,
    places_looked,
    read_chat_rows,
    read_hub_rows,
)
from trainables.base_model import BaseConfig, ResolvedBase, resolve_base
from trainables.chat_data import HubDataset
from trainables.defenses import Message
from trainables.errors import ConfigError, Fault
from trainables.shapes import ModelShape

Rows = Sequence[Sequence[Message]]


@dataclass
class Sources:
    """What has been found so far. Methods return None after noting a fault; asked again, they note it once."""

    folder: Path  # of the sweep file
    cuda: bool
    faults: list[Fault]
    inputs: dict[str, bytes] = field(default_factory=dict)  # content hash -> content, what workers will read
    rows: dict[str, Rows] = field(default_factory=dict)  # content hash -> chat rows
    _bases: dict[str, tuple[ResolvedBase, ModelShape] | None] = field(default_factory=dict)
    _contents: dict[str, str | None] = field(default_factory=dict)
    _traits: dict[str, tuple[Trait, Path] | None] = field(default_factory=dict)

    def base(self, config: BaseConfig, key: str) -> tuple[ResolvedBase, ModelShape] | None:
        """The base with its revision and shape; ``key`` is where the ``base`` section stands."""
        name = config.model_dump_json()
        if name not in self._bases:
            self._bases[name] = None
            try:
                self._bases[name] = resolve_base(config, cuda=self.cuda)
            except ConfigError as error:
                self.faults += [Fault(key + fault.key.removeprefix("base"), fault.message) for fault in error.faults]
        return self._bases[name]

    def chat_file(self, text: str, key: str) -> str | None:
        """Content hash of the chat JSONL file that the user calls ``text``."""
        if text not in self._contents:
            path = find_file(text, self.folder)
            if path is None:
                self.faults.append(Fault(key, f"no file {text!r}; looked at {places_looked(text, self.folder)}"))
            self._contents[text] = self._checked(path) if path is not None else None
        return self._contents[text]

    def chat_path(self, path: Path, key: str) -> str | None:
        """Content hash of the chat JSONL file at ``path``, which a trait names."""
        name = str(path)
        if name not in self._contents:
            if not path.is_file():
                self.faults.append(Fault(key, f"no file {path}"))
            self._contents[name] = self._checked(path) if path.is_file() else None
        return self._contents[name]

    def hub(self, dataset: HubDataset, key: str) -> str | None:
        """Content hash of a dataset's rows."""
        name = dataset.model_dump_json()
        if name not in self._contents:
            rows, content, faults = read_hub_rows(dataset)
            self.faults += [Fault(key, str(fault)) for fault in faults]
            self._contents[name] = self.keep(content, rows) if not faults else None
        return self._contents[name]

    def trait(self, name: str, key: str) -> tuple[Trait, Path] | None:
        """The trait that the user calls ``name`` and the place of its file."""
        if name not in self._traits:
            self._traits[name] = None
            path = find_trait(name, self.folder)
            if path is None:
                where = places_looked(name, self.folder, trait=True)
                self.faults.append(Fault(key, f"no trait {name!r}; looked at {where}"))
            else:
                try:
                    self._traits[name] = (read_trait(path), path)
                except ConfigError as error:
                    self.faults += error.faults
        return self._traits[name]

    def keep(self, content: bytes, rows: Rows | None = None) -> str:
        """Note content that workers will need; returns its hash."""
        digest = hashlib.sha256(content).hexdigest()
        self.inputs[digest] = content
        if rows is not None:
            self.rows[digest] = rows
        return digest

    def _checked(self, path: Path) -> str | None:
        rows, faults = read_chat_rows(path)
        self.faults += faults
        return self.keep(canonical_jsonl(rows), rows) if not faults else None
