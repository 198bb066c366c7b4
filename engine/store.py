"""The store: everything that work makes, under keys, written so that a kill leaves the old state or the new one.

A key is a posix string such as ``tables/scores/0123456789ab.parquet``. Callers never build paths from it: the store is
a folder (engine/disk.py) or lies in an object store (engine/objects.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from analysis.remote import DIRECTORY_MANIFEST, Location, Remote, location_of, read_log
from analysis.tables import read_parquet, table_key, to_parquet_bytes
from engine.atomic import REPLACED, explained, make_directory
from engine.disk import DiskFiles
from engine.location import MARKER, MARKER_CONTENT, TEMPORARY, location_faults
from engine.objects import ObjectFiles
from trainables.errors import StoreError


@dataclass(frozen=True)
class Store:
    """A store in a folder or an object store. Plain data: it pickles, and any number of processes may write at once.

    Every method raises StoreError with the key and what to do about it.
    """

    location: Location

    @staticmethod
    def faults(location: str | Location) -> list[str]:
        """Why no store can be opened or made here, or nothing. Writes nothing; looks into an object store."""
        return location_faults(location)

    @classmethod
    def open(cls, location: str | Location, create: bool = False) -> Store:
        """Open the store at a folder or URL. ``create``: to write there; it is made where there is none yet."""
        faults = location_faults(location)
        if faults:
            raise StoreError("; ".join(faults))
        store = cls(location_of(location))
        if isinstance(store._files, ObjectFiles) and create:
            store._files.make()
        elif not store._files.is_file(MARKER):
            if not create:
                raise StoreError(f"{location}: there is no store here; run a sweep to make it, or correct the path")
            with explained(str(location)):
                make_directory(store.root)
            store._files.put_bytes(MARKER, MARKER_CONTENT, "store")
        return store

    @property
    def root(self) -> Path:
        """The folder of a store on a disk."""
        if isinstance(self.location, Remote):
            raise StoreError(f"{self.location}: is in an object store and has no folder; `shiftgrad fetch` copies it")
        return self.location

    @cached_property
    def _files(self) -> DiskFiles | ObjectFiles:
        return ObjectFiles(self.location) if isinstance(self.location, Remote) else DiskFiles(self.location)

    def exists(self, key: str) -> bool:
        """Whether ``key`` is published: a file, or a directory that is complete."""
        return self._files.is_file(_checked(key)) or self._files.is_complete(key)

    def is_complete(self, key: str) -> bool:
        """Whether ``key`` is a directory that was published whole."""
        return self._files.is_complete(_checked(key))

    def path(self, key: str) -> Path:
        """A local path to read the file or directory ``key`` from; never to write to. It must be there.

        Of an object store it is a copy of this moment (``analysis.remote.local_copy``).
        """
        path = self._files.path(_checked(key))
        if path is None:
            raise StoreError(f"{key}: not in the store {self.location}; run the sweep (again) to make it")
        return path

    def place(self, key: str) -> Location:
        """Where the files of a directory lie now, for people: the next publish of it may be elsewhere."""
        return self._files.place(_checked(key))

    def sweep(self, name: str) -> Location:
        """Where the sweep lies, for ``analysis.results.load``."""
        return self.location / "sweeps" / name

    def read(self, key: str) -> bytes:
        """The content of the file ``key``."""
        content = self._files.read(_checked(key))
        if content is None:
            raise StoreError(f"{key}: not in the store {self.location}; run the sweep (again) to make it")
        return content

    def read_log(self, key: str) -> str:
        """The text of what ``append_line`` wrote; empty if nothing."""
        return read_log(self.location / _checked(key))

    def publish(self, key: str, data: bytes | Path) -> None:
        """Make ``data`` the content of ``key``: a file's bytes, or a folder whose copy the directory ``key`` becomes.

        What was there is replaced whole: at any instant, and after a kill at any instant, ``path`` finds the old state
        or the new one. A directory key holds nothing but what is published under it (nothing is published INSIDE it),
        and gets a MANIFEST.json with every file's size and sha256.
        """
        name = _checked(key).rpartition("/")[2]
        if name == DIRECTORY_MANIFEST or name.endswith(REPLACED) or key == MARKER:
            raise StoreError(f"{key}: the store keeps this name for itself; choose another key")
        if isinstance(data, bytes):
            self._files.put_bytes(key, data, _kind(key))
        else:
            self._files.put_directory(key, data, _kind(key))

    def publish_table(self, table: str, task_id: str, rows: Sequence[object]) -> None:
        """Publish the rows that a task made of a stored table, checked against its declared columns."""
        self.publish(table_key(table, task_id), to_parquet_bytes(table, rows))

    def read_table(self, table: str, task_id: str) -> pa.Table:
        """The table that a task made, checked against its declared columns."""
        return read_parquet(self.location / table_key(table, task_id), table)

    def publish_json(self, key: str, obj: Any, *, unless_same: bool = False) -> None:
        """Publish ``obj`` as JSON for people and diffs: sorted keys, indented. NaN and infinities are refused.

        ``unless_same``: write nothing if that is its content already.
        """
        try:
            text = json.dumps(obj, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise StoreError(f"{key}: cannot be written as JSON: {error}") from error
        put = self.keep if unless_same else self.publish
        put(key, (text + "\n").encode())

    def read_json(self, key: str) -> Any:
        """The content of a JSON file."""
        try:
            return json.loads(self.read(key))
        except ValueError as error:
            raise StoreError(f"{key}: not a JSON file ({error}); remove it and run the sweep again") from error

    def put_input(self, data: bytes) -> str:
        """Keep a copy of an input as ``inputs/<sha256>`` and return the sha256 in hex.

        One that is there and sound stays; a damaged one is replaced.
        """
        digest = hashlib.sha256(data).hexdigest()
        key = f"inputs/{digest}"
        self.keep(key, data)
        return digest

    def keep(self, key: str, data: bytes) -> None:
        """Publish a file unless it is there with this content: what was written before need not be written again."""
        if not self.exists(key) or self.read(key) != data:
            self.publish(key, data)

    def read_input(self, digest: str) -> bytes:
        """The copy of the input with this sha256, checked against it."""
        data = self.read(f"inputs/{digest}")
        if hashlib.sha256(data).hexdigest() != digest:
            raise StoreError(f"inputs/{digest}: damaged, it is not what it was; run the sweep again to copy it anew")
        return data

    def create(self, key: str, data: bytes) -> bool:
        """Publish ``data`` only if there is no such key; of several processes that try, one gets True."""
        return self._files.create(_checked(key), data)

    def claimed(self, name: str, waiting: Callable[[], None]) -> AbstractContextManager[None]:
        """Hold the claim ``name``: of several processes one is inside, the others call ``waiting`` as they wait.

        The claim of a process ends with it, however it ends. It saves work that would be done twice; nothing is
        damaged without it, and where there are no locks (some file systems, object stores) all go in.
        """
        return self._files.claimed(name, waiting)

    def names(self, key: str) -> list[str]:
        """Names of what lies in the folder ``key``, sorted; none if there is no such folder."""
        return self._files.names(_checked(key))

    def sizes(self, key: str) -> dict[str, int]:
        """Names of what lies in the folder ``key``, with the sizes of files in bytes."""
        return self._files.sizes(_checked(key))

    def num_bytes(self, key: str) -> int:
        """The size of a file, or of all files of a directory."""
        return self._files.num_bytes(_checked(key))

    def reader(self, key: str) -> BinaryIO:
        """The file ``key`` opened for reading; close it."""
        return self._files.reader(_checked(key))

    def append_line(self, key: str, text: str) -> None:
        """Add a line to a log, so that lines of several processes do not mix. Read it with ``read_log``."""
        self._files.append_line(_checked(key), text)

    def append_durably(self, key: str, lines: Sequence[str]) -> None:
        """Add lines to a file that ONE process writes, and make them last before this returns.

        If that fails the file is what it was: a later line must not follow half of another. In an object store it comes
        in parts, ``<key>.<number>`` before the ending.
        """
        self._files.append_durably(_checked(key), lines)

    def remove(self, key: str) -> None:
        """Take ``key`` away, a directory in one step. Nothing happens if it is not there."""
        if _checked(key) == MARKER:
            raise StoreError(f"{key}: marks the folder as a store and cannot be removed through it")
        self._files.remove(key)


def _checked(key: str) -> str:
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in key or "\0" in key:
        raise StoreError(
            f"{key!r} is not a key: a key is relative, its parts neither empty nor '.' or '..', "
            "as in runs/0123/run.json"
        )
    if parts[0] == TEMPORARY:
        raise StoreError(f"{key!r}: {TEMPORARY} is where the store keeps what is not finished; choose another key")
    return key


def _kind(key: str) -> str:
    """What the failpoints call a key: its table, ``adapter``, ``checkpoint``, ``run``, or else its first part."""
    match key.split("/"):
        case ["tables", table, _]:
            return table
        case ["runs", _, "adapter" | "checkpoint" as name]:
            return name
        case ["runs", _, "run.json"]:
            return "run"
        case [first, *_]:
            return first
    raise AssertionError(key)
