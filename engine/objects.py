"""A store's files in an object store: every write is one PUT, which is there whole or not at all.

There are no renames and no appending. A directory's files go into a new folder under its key, and its MANIFEST.json,
which names that folder, is written last (``analysis.remote``): until then readers find the old state. What several
lines are written to is a part per process, written whole each time, and begun anew when it has grown.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from analysis.remote import (
    DIRECTORY_MANIFEST,
    Remote,
    directory_files,
    has_directory,
    local_copy,
    reached,
)
from engine.location import MARKER, MARKER_CONTENT
from trainables.errors import StoreError
from trainables.failpoints import failpoint

PART_BYTES = 1 << 20
"""A part that has grown to this is left as it is, and the next lines begin another one."""


@dataclass(frozen=True)
class ObjectFiles:
    """Objects under a URL. Keys have been checked by the store."""

    root: Remote

    def is_file(self, key: str) -> bool:
        """Whether ``key`` is an object."""
        return (self.root / key).is_file()

    def is_complete(self, key: str) -> bool:
        """Whether ``key`` is a directory that was published whole."""
        return has_directory(self.root / key)

    def path(self, key: str) -> Path | None:
        """A copy of ``key`` on this machine; None if it is not there."""
        try:
            return local_copy(self.root / key)
        except FileNotFoundError:
            return None

    def place(self, key: str) -> Remote:
        """Where the files of the directory ``key`` lie now."""
        found = directory_files(self.root / key)
        return self.root / key if found is None else found[0]

    def read(self, key: str) -> bytes | None:
        """The content of the object ``key``; None if it is not there."""
        try:
            return (self.root / key).read_bytes()
        except FileNotFoundError:
            return None

    def put_bytes(self, key: str, data: bytes, kind: str) -> None:
        """Make ``data`` the content of the object ``key``; ``kind`` is what failpoints call it."""
        failpoint(f"before_publish:{kind}")
        self._put(self.root / key, data)
        failpoint(f"after_publish:{kind}")

    def put_directory(self, key: str, source: Path, kind: str) -> None:
        """Make a copy of the folder ``source`` the directory ``key``."""
        if not source.is_dir():
            raise StoreError(f"{key}: {source} is not a folder; publish a file by its bytes")
        place = self.root / key
        before = directory_files(place)
        # a name of its own: what an old manifest names is taken away, and must not be what a new one names
        folder = uuid.uuid4().hex[:12]
        files: dict[str, dict[str, int | str]] = {}
        for file in _files_of(source):
            data = file.read_bytes()
            name = file.relative_to(source).as_posix()
            self._put(place / folder / name, data)
            files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        failpoint(f"before_publish:{kind}")
        manifest = json.dumps({"format": 1, "folder": folder, "files": files}, indent=2, sort_keys=True) + "\n"
        self._put(place / DIRECTORY_MANIFEST, manifest.encode())
        failpoint(f"during_publish:{kind}")
        if before is not None:
            self._remove_below(before[0])
        failpoint(f"after_publish:{kind}")

    def create(self, key: str, data: bytes) -> bool:
        """Write ``data`` only if there is no such key; of several processes that try, one gets True."""
        place = self.root / key
        return self._put_new(place, data) or place.read_bytes() == data  # a request that went through may be repeated

    def make(self) -> None:
        """Write the marker of a store where there is none. Raises StoreError if this user may not write here, or if the
        service does not know conditional writes: then two drivers could take one lease."""
        if self._put_new(self.root / MARKER, MARKER_CONTENT) and self._put_new(self.root / MARKER, MARKER_CONTENT):
            raise StoreError(
                f"{self.root}: this service overwrites an object that it was asked to make only if there is none, so "
                "it cannot keep two drivers apart; use one that knows conditional writes (If-None-Match)"
            )

    @contextmanager
    def claimed(self, name: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Nothing is held: there are no locks that end with their process. Two sweeps that share a run and start
        together may both do it, and nothing is damaged."""
        del name, waiting
        yield

    def names(self, key: str) -> list[str]:
        """Names of what lies under ``key``, sorted."""
        return sorted(self.sizes(key))

    def reader(self, key: str) -> BinaryIO:
        """The whole of the object ``key``; what is read piece by piece has parts of ``PART_BYTES``."""
        content = self.read(key)
        if content is None:
            raise StoreError(f"{self.root / key}: not there any more")
        return io.BytesIO(content)

    def sizes(self, key: str) -> dict[str, int]:
        """Names of what lies under ``key``, with objects' sizes in bytes."""
        return (self.root / key).sizes()

    def num_bytes(self, key: str) -> int:
        """The size of the object ``key``, or of all objects of the directory."""
        fs, path = (self.root / key).opened()
        with reached(self.root / key):
            return int(fs.du(path))

    def append_line(self, key: str, text: str) -> None:
        """Add a line to this process's part of a log."""
        part = _part(self.root / key, lambda number: f"{key}/{_writer()}-{number:04d}.txt")
        part.add(self, text.rstrip("\n").encode(errors="backslashreplace") + b"\n")

    def append_durably(self, key: str, lines: Sequence[str]) -> None:
        """Add lines to a file that ONE process writes; they last when this returns. Its parts are numbered."""
        stem, dot, ending = key.rpartition(".")
        part = _part(self.root / key, lambda number: f"{stem}.{number:04d}{dot}{ending}")
        part.add(self, "".join(f"{line}\n" for line in lines).encode())

    def remove(self, key: str) -> None:
        """Take ``key`` away; of a directory the manifest goes first, and with it the directory."""
        place = self.root / key
        fs, path = (place / DIRECTORY_MANIFEST).opened()
        with reached(place), suppress(FileNotFoundError):
            fs.rm_file(path)
        self._remove_below(place)

    def _remove_below(self, place: Remote) -> None:
        fs, path = place.opened()
        with reached(place), suppress(FileNotFoundError):
            found = fs.find(path)
            if found:
                fs.rm(found)

    def _put(self, place: Remote, data: bytes) -> None:
        fs, path = place.opened()
        try:
            with reached(place):
                fs.pipe_file(path, data)
        except FileNotFoundError as error:  # of a bucket: objects need no folder
            raise StoreError(f"{place}: there is no such bucket ({error}); make it, or correct the name") from error

    def _put_new(self, place: Remote, data: bytes) -> bool:
        """Whether there was no such object and now there is."""
        fs, path = place.opened()
        try:
            with reached(place):
                fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        except FileNotFoundError as error:
            raise StoreError(f"{place}: there is no such bucket ({error}); make it, or correct the name") from error
        return True


def _files_of(folder: Path) -> Iterator[Path]:
    """All files of a folder, in order; what is neither a file nor a folder is refused."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = folder / entry.name
        if entry.name == DIRECTORY_MANIFEST:
            raise StoreError(f"{folder}: holds a {DIRECTORY_MANIFEST}, a name that the store keeps for itself")
        if entry.is_dir():
            yield from _files_of(path)
        elif entry.is_file():
            yield path
        else:
            raise StoreError(f"{path}: neither a file nor a folder; it cannot be published")


@dataclass
class _Part:
    """What this process has written to a key, of which the last part is still growing."""

    key_of: Callable[[int], str]
    number: int = 0
    content: bytes = b""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, files: ObjectFiles, data: bytes) -> None:
        """Write the part again with more at its end. If that fails it is as it was."""
        with self.lock:
            if self.content and len(self.content) + len(data) > PART_BYTES:
                self.number, self.content = self.number + 1, b""
            content = self.content + data
            files._put(files.root / self.key_of(self.number), content)
            self.content = content


_parts: dict[tuple[int, Remote], _Part] = {}
_parts_lock = threading.Lock()


def _part(place: Remote, key_of: Callable[[int], str]) -> _Part:
    with _parts_lock:  # by process: what a fork inherits is its parent's
        return _parts.setdefault((os.getpid(), place), _Part(key_of))


def _writer() -> str:
    """A name for this process that no other has; parts of later processes come after those of earlier ones."""
    return _writers.setdefault(os.getpid(), _new_writer())


_writers: dict[int, str] = {}


def _new_writer() -> str:
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S%f")
    host = "".join(c if c.isalnum() else "-" for c in socket.gethostname())[:40]
    return f"{stamp}-{host}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
