"""The store: everything that work makes, under keys, written so that a kill leaves the old state or the new one.

A key is a posix string such as ``tables/scores/0123456789ab.parquet``. Callers never build paths from it: today the
store is a local folder, and only ``path`` and the code below know that.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from analysis.tables import read_parquet, table_key, to_parquet_bytes
from engine.atomic import (
    DIRECTORY_MANIFEST,
    REPLACED,
    aside_of,
    copy_directory,
    drop_aside,
    explained,
    fsync_directory,
    is_complete,
    make_directory,
    readable,
    step_aside,
    write_new,
)
from engine.file_lock import try_lock
from engine.location import MARKER, MARKER_CONTENT, TEMPORARY, local_root, location_faults
from trainables.errors import StoreError
from trainables.failpoints import failpoint

CLAIM_RETRY_S = 0.5
_MAX_ATTEMPTS = 20


@dataclass(frozen=True)
class Store:
    """A store in a local folder. Plain data: it pickles, and any number of processes may write at once.

    Every method raises StoreError with the key and what to do about it.
    """

    root: Path

    @staticmethod
    def faults(location: str | Path) -> list[str]:
        """Why no store can be opened or made here, or nothing. Touches nothing on disk."""
        return location_faults(location)

    @classmethod
    def open(cls, location: str | Path, create: bool = False) -> Store:
        """Open the store at a folder or ``file://`` URL; ``create`` makes it where there is none yet."""
        faults = location_faults(location)
        if faults:
            raise StoreError("; ".join(faults))
        store = cls(local_root(location))
        if not (store.root / MARKER).exists():
            if not create:
                raise StoreError(f"{location}: there is no store here; run a sweep to make it, or correct the path")
            with explained(str(location)):
                make_directory(store.root)
            store._put_bytes(store.root / MARKER, MARKER_CONTENT, "store", str(location))
        return store

    def exists(self, key: str) -> bool:
        """Whether ``key`` is published: a file, or a directory that is complete."""
        return self._path(key).is_file() or self.is_complete(key)

    def is_complete(self, key: str) -> bool:
        """Whether ``key`` is a directory that was published whole."""
        return is_complete(readable(self._path(key)))

    def path(self, key: str) -> Path:
        """A local path to read the file or directory ``key`` from; never to write to. It must be there."""
        path = readable(self._path(key))
        if not path.exists():
            raise StoreError(f"{key}: not in the store {self.root}; run the sweep (again) to make it")
        return path

    def read(self, key: str) -> bytes:
        """The content of the file ``key``."""
        path = self.path(key)
        with explained(key):
            return path.read_bytes()

    def publish(self, key: str, data: bytes | Path) -> None:
        """Make ``data`` the content of ``key``: a file's bytes, or a folder whose copy the directory ``key`` becomes.

        What was there is replaced whole: at any instant, and after a kill at any instant, ``path`` finds the old state
        or the new one. A directory key holds nothing but what is published under it (nothing is published INSIDE it),
        and gets a MANIFEST.json with every file's size and sha256.
        """
        path = self._path(key)
        if path.name == DIRECTORY_MANIFEST or path.name.endswith(REPLACED) or key == MARKER:
            raise StoreError(f"{key}: the store keeps this name for itself; choose another key")
        if isinstance(data, bytes):
            self._put_bytes(path, data, _kind(key), key)
        else:
            self._put_directory(path, data, _kind(key), key)

    def publish_table(self, table: str, task_id: str, rows: Sequence[object]) -> None:
        """Publish the rows that a task made of a stored table, checked against its declared columns."""
        self.publish(table_key(table, task_id), to_parquet_bytes(table, rows))

    def read_table(self, table: str, task_id: str) -> pa.Table:
        """The table that a task made, checked against its declared columns."""
        return read_parquet(self.path(table_key(table, task_id)), table)

    def publish_json(self, key: str, obj: Any) -> None:
        """Publish ``obj`` as JSON for people and diffs: sorted keys, indented. NaN and infinities are refused."""
        try:
            text = json.dumps(obj, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise StoreError(f"{key}: cannot be written as JSON: {error}") from error
        self.publish(key, (text + "\n").encode())

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
        if not self.exists(key) or self.read(key) != data:
            self.publish(key, data)
        return digest

    def read_input(self, digest: str) -> bytes:
        """The copy of the input with this sha256, checked against it."""
        data = self.read(f"inputs/{digest}")
        if hashlib.sha256(data).hexdigest() != digest:
            raise StoreError(f"inputs/{digest}: damaged, it is not what it was; run the sweep again to copy it anew")
        return data

    def create(self, key: str, data: bytes) -> bool:
        """Publish ``data`` only if there is no such key; of several processes that try, one gets True."""
        path = self._path(key)
        with explained(key), self._temporary() as temporary:
            write_new(temporary, data)
            make_directory(path.parent)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return path.read_bytes() == data  # a network file system may repeat a request that went through
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                    raise
                try:  # no hard links here (exFAT, SMB): the name is taken at once, the content follows
                    write_new(path, data)
                except FileExistsError:
                    return False
            fsync_directory(path.parent)
        return True

    @contextmanager
    def claimed(self, name: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Hold the claim ``name``: of several processes one is inside, the others call ``waiting`` as they wait.

        The claim of a process ends with it, however it ends. It saves work that would be done twice; nothing is
        damaged without it, and where the file system knows no locks all go in.
        """
        path = self.root / TEMPORARY / f"{name}.claim"
        while True:
            with explained(name):
                make_directory(path.parent)
                held = try_lock(path)
            if held is not None:
                break
            waiting()
            time.sleep(CLAIM_RETRY_S)
        try:
            yield
        finally:
            held.release()

    def names(self, key: str) -> list[str]:
        """Names of what lies in the folder ``key``, sorted; none if there is no such folder."""
        path = readable(self._path(key))
        with explained(key):
            return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []

    def append_line(self, key: str, text: str) -> None:
        """Add a line to a log with one write, so that lines of several processes do not mix. It is not fsynced."""
        path = self._path(key)
        line = (text.rstrip("\n") + "\n").encode(errors="backslashreplace")
        with explained(key):
            make_directory(path.parent)
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                written = os.write(descriptor, line)
            finally:
                os.close(descriptor)
        if written < len(line):
            raise StoreError(f"{key}: only {written} of {len(line)} bytes of a line were written; is the disk full?")

    def append_durably(self, key: str, lines: Sequence[str]) -> None:
        """Add lines to a file that ONE process writes, and make them last before this returns.

        If that fails the file is cut back to what it was: a later line must not follow half of another.
        """
        path = self._path(key)
        data = "".join(f"{line}\n" for line in lines).encode()
        with explained(key):
            make_directory(path.parent)
            is_new = not path.exists()
            with path.open("ab", buffering=0) as file:
                before = file.tell()
                try:
                    if file.write(data) != len(data):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(before)
                    raise
            if is_new:
                fsync_directory(path.parent)

    def remove(self, key: str) -> None:
        """Take ``key`` away, a directory in one step. Nothing happens if it is not there."""
        path = self._path(key)
        if key == MARKER:
            raise StoreError(f"{key}: marks the folder as a store and cannot be removed through it")
        with explained(key), self._temporary() as trash, self._temporary() as old:
            for place, goes_to in ((aside_of(path), old), (path, trash)):
                with suppress(FileNotFoundError):
                    os.rename(place, goes_to)
                    fsync_directory(path.parent)

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        if any(part in ("", ".", "..") for part in parts) or "\\" in key or "\0" in key:
            raise StoreError(
                f"{key!r} is not a key: a key is relative, its parts neither empty nor '.' or '..', "
                "as in runs/0123/run.json"
            )
        if parts[0] == TEMPORARY:
            raise StoreError(f"{key!r}: {TEMPORARY} is where the store keeps what is not finished; choose another key")
        return self.root.joinpath(*parts)

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        """A new path in the store for something unfinished; what is still there at the end is deleted."""
        folder = self.root / TEMPORARY
        make_directory(folder)
        path = folder / f"{os.getpid()}-{uuid.uuid4().hex}"
        try:
            yield path
        finally:
            # a left-over here is harmless, and an error about it would hide the one that matters
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()

    def _put_bytes(self, path: Path, data: bytes, kind: str, key: str) -> None:
        if path.is_dir():
            raise StoreError(f"{key}: is a directory in the store, and a file cannot replace it; remove the key first")
        with explained(key), self._temporary() as temporary:
            write_new(temporary, data)
            make_directory(path.parent)
            failpoint(f"before_publish:{kind}")
            os.replace(temporary, path)
            fsync_directory(path.parent)
            failpoint(f"after_publish:{kind}")

    def _put_directory(self, path: Path, source: Path, kind: str, key: str) -> None:
        if not source.is_dir():
            raise StoreError(f"{key}: {source} is not a folder; publish a file by its bytes")
        if path.exists() and not path.is_dir():
            raise StoreError(f"{key}: is a file in the store, and a directory cannot replace it; remove the key first")
        with explained(key), self._temporary() as temporary, self._temporary() as trash:
            copy_directory(source, temporary)
            make_directory(path.parent)
            failpoint(f"before_publish:{kind}")
            trash.mkdir()
            for attempt in range(_MAX_ATTEMPTS):
                try:
                    step_aside(path, trash)
                    failpoint(f"during_publish:{kind}")
                    os.rename(temporary, path)
                    break
                except OSError as error:
                    # another process published the same key in between: its directory steps aside in turn
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt + 1 == _MAX_ATTEMPTS:
                        raise
            fsync_directory(path.parent)
            drop_aside(path, trash)
            failpoint(f"after_publish:{kind}")


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
