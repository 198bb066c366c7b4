"""Everything outside the sweep file that a sweep names: bases, data files, traits. Each is read once and checked.

Nothing is written. What is wrong is collected in ``faults``, under every key under which the user named it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.formats import any_trait, foreign_chat
from analysis.traits import Trait
from engine.endpoints import EndpointConfig
from engine.inputs import (
    bank_places,
    canonical_jsonl,
    file_places,
    find_bank,
    find_file,
    find_trait,
    places_looked,
    read_chat_rows,
    read_hub_rows,
)
from trainables.base_model import BaseConfig, ResolvedBase, resolve_base
from trainables.chat_data import HubDataset
from trainables.defenses import Message
from trainables.embedded import PREFIX
from trainables.errors import ConfigError, Fault
from trainables.shapes import ModelShape

Rows = Sequence[Sequence[Message]]


@dataclass
class Sources:
    """What has been found so far. Methods return None after noting a fault."""

    folder: Path  # of the sweep file
    cuda: bool
    faults: list[Fault]
    endpoints: Mapping[str, EndpointConfig] = field(default_factory=dict)
    inputs: dict[str, bytes] = field(default_factory=dict)  # content hash -> content, what workers will read
    rows: dict[str, Rows] = field(default_factory=dict)  # content hash -> chat rows
    _found: dict[tuple[str, str], tuple[Any, list[Fault]]] = field(default_factory=dict)

    def base(self, config: BaseConfig, key: str) -> tuple[ResolvedBase, ModelShape] | None:
        """The base with its revision and shape; ``key`` is where the ``base`` section stands.

        A folder with the model is looked for where other files are, see ``engine.inputs.file_places``.
        """

        def look() -> tuple[tuple[ResolvedBase, ModelShape] | None, list[Fault]]:
            places = [] if config.model.startswith(PREFIX) else file_places(config.model, self.folder)
            place = next((place for place in places if (place / "config.json").is_file()), None)
            local = config if place is None else config.model_copy(update={"model": str(place)})
            try:
                return resolve_base(local, cuda=self.cuda), []
            except ConfigError as error:
                return None, [Fault(fault.key.removeprefix("base"), fault.message) for fault in error.faults]

        value: tuple[ResolvedBase, ModelShape] | None = self._once("base", config.model_dump_json(), key, look)
        return value

    def chat_file(self, text: str, key: str) -> str | None:
        """Content hash of the chat JSONL file that the user calls ``text``."""

        def look() -> tuple[str | None, list[Fault]]:
            path = find_file(text, self.folder)
            if path is None:
                return None, [Fault("", f"no file {text!r}; looked at {places_looked(text, self.folder)}")]
            return self._checked(path)

        content: str | None = self._once("file", text, key, look)
        return content

    def chat_path(self, path: Path, key: str) -> str | None:
        """Content hash of the chat JSONL file at ``path``, which a trait names."""

        def look() -> tuple[str | None, list[Fault]]:
            return self._checked(path) if path.is_file() else (None, [Fault("", f"no file {path}")])

        content: str | None = self._once("path", str(path), key, look)
        return content

    def file(
        self, text: str, key: str, read: Callable[[Path], bytes] = Path.read_bytes, how: str = ""
    ) -> tuple[Path, str] | None:
        """Place and content hash of the file that the user calls ``text``. ``read`` gives what workers get of it, as
        ``how`` says."""

        def look() -> tuple[tuple[Path, str] | None, list[Fault]]:
            path = find_file(text, self.folder)
            if path is None:
                return None, [Fault("", f"no file {text!r}; looked at {places_looked(text, self.folder)}")]
            try:
                return (path, self.keep(read(path))), []
            except ConfigError as error:
                return None, [Fault("", str(fault)) for fault in error.faults]
            except OSError as error:
                return None, [Fault("", f"{path} cannot be read: {error.strerror or error}")]

        value: tuple[Path, str] | None = self._once(f"any file {how}", text, key, look)
        return value

    def hub(self, dataset: HubDataset, key: str) -> str | None:
        """Content hash of a dataset's rows."""

        def look() -> tuple[str | None, list[Fault]]:
            rows, content, faults = read_hub_rows(dataset)
            return (self.keep(content, rows), []) if not faults else (None, [Fault("", str(fault)) for fault in faults])

        content: str | None = self._once("hub", dataset.model_dump_json(), key, look)
        return content

    def trait(self, name: str, key: str) -> tuple[Trait, Path] | None:
        """The trait that the user calls ``name`` and the place of its file."""

        def look() -> tuple[tuple[Trait, Path] | None, list[Fault]]:
            path = find_trait(name, self.folder)
            if path is None:
                where = places_looked(name, self.folder, trait=True)
                return None, [Fault("", f"no trait {name!r}; looked at {where}")]
            try:
                return (any_trait(path), path), []
            except ConfigError as error:
                return None, list(error.faults)

        value: tuple[Trait, Path] | None = self._once("trait", name, key, look)
        return value

    def prompt_bank(self, name: str, key: str) -> tuple[str, ...] | None:
        """The prompts that the user calls ``name``: those of a trait or, where there is no such trait, of a file (of a
        name that ends in .txt always)."""
        is_trait = not name.endswith(".txt") and find_trait(name, self.folder) is not None

        def look() -> tuple[tuple[str, ...] | None, list[Fault]]:
            path = find_bank(name, self.folder) if not is_trait else None
            if path is None:
                return None, []
            try:
                lines = path.read_text(encoding="utf-8-sig").split("\n")
            except (OSError, UnicodeDecodeError) as error:
                return None, [Fault(str(path), f"cannot be read: {error}")]
            texts = tuple(line.strip() for line in lines if line.strip())
            return (texts, []) if texts else (None, [Fault(str(path), "the bank is empty; write one prompt per line")])

        texts: tuple[str, ...] | None = self._once("bank", name, key, look)
        if texts is not None or self._found["bank", name][1]:
            return texts
        if not is_trait:
            banks = ", ".join(str(place) for place in bank_places(name, self.folder))
            traits = places_looked(name, self.folder, trait=True)
            message = f"no trait {name!r} and no bank of that name; looked at {traits}, {banks}"
            self.faults.append(Fault(key, message))
            return None
        trait = self.trait(name, key)
        if trait is not None and not trait[0].inoculation_prompts:
            self.faults.append(Fault(key, f"trait {name!r} has no inoculation_prompts"))
        return trait[0].inoculation_prompts or None if trait is not None else None

    def keep(self, content: bytes, rows: Rows | None = None) -> str:
        """Note content that workers will need; returns its hash."""
        digest = hashlib.sha256(content).hexdigest()
        self.inputs[digest] = content
        if rows is not None:
            self.rows[digest] = rows
        return digest

    def _checked(self, path: Path) -> tuple[str | None, list[Fault]]:
        faults: list[Fault] = []
        rows: Rows = ()
        try:
            foreign = foreign_chat(path)
        except ConfigError as error:
            return None, list(error.faults)
        if foreign is None:
            rows, faults = read_chat_rows(path)
        else:
            rows = foreign
        return (self.keep(canonical_jsonl(rows), rows), []) if not faults else (None, faults)

    def _once(self, kind: str, name: str, key: str, look: Callable[[], tuple[Any, list[Fault]]]) -> Any:
        """What ``look`` found the first time. Its faults with a key of their own (a file and a line) stay as they are;
        the others are about what stands at ``key`` or, if they begin with a dot, below it."""
        if (kind, name) not in self._found:
            self._found[kind, name] = look()
        value, faults = self._found[kind, name]
        self.faults += [
            Fault(key + fault.key, fault.message) if fault.key[:1] in ("", ".") else fault for fault in faults
        ]
        return value
