"""A store's files on a disk: written so that a kill leaves the old state or the new one."""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from engine.atomic import (
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
from engine.location import TEMPORARY
from trainables.errors import StoreError
from trainables.failpoints import failpoint

CLAIM_RETRY_S = 0.5
_MAX_ATTEMPTS = 20


@dataclass(frozen=True)
class DiskFiles:
    """Files under a folder. Keys have been checked by the store."""

    root: Path

    def is_file(self, key: str) -> bool:
        """Whether ``key`` is a file."""
        return self._path(key).is_file()

    def is_complete(self, key: str) -> bool:
        """Whether ``key`` is a directory that was published whole."""
        return is_complete(readable(self._path(key)))

    def path(self, key: str) -> Path | None:
        """Where ``key`` can be read at this instant; None if it is not there."""
        path = readable(self._path(key))
        return path if path.exists() else None

    def place(self, key: str) -> Path:
        """Where the files of the directory ``key`` lie now."""
        return readable(self._path(key))

    def read(self, key: str) -> bytes | None:
        """The content of the file ``key``; None if it is not there."""
        path = self.path(key)
        with explained(key):
            return None if path is None else path.read_bytes()

    def put_bytes(self, key: str, data: bytes, kind: str) -> None:
        """Make ``data`` the content of the file ``key``; ``kind`` is what failpoints call it."""
        path = self._path(key)
        if path.is_dir():
            raise StoreError(f"{key}: is a directory in the store, and a file cannot replace it; remove the key first")
        with explained(key), self._temporary() as temporary:
            write_new(temporary, data)
            make_directory(path.parent)
            failpoint(f"before_publish:{kind}")
            os.replace(temporary, path)
            fsync_directory(path.parent)
            failpoint(f"after_publish:{kind}")

    def put_directory(self, key: str, source: Path, kind: str) -> None:
        """Make a copy of the folder ``source`` the directory ``key``."""
        path = self._path(key)
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

    def create(self, key: str, data: bytes) -> bool:
        """Write ``data`` only if there is no such key; of several processes that try, one gets True."""
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

    def reader(self, key: str) -> BinaryIO:
        """The file ``key`` opened for reading."""
        with explained(key):
            return self._path(key).open("rb")

    def sizes(self, key: str) -> dict[str, int]:
        """Names of what lies in the folder ``key``, with files' sizes in bytes."""
        path = readable(self._path(key))
        with explained(key):
            if not path.is_dir():
                return {}
            with os.scandir(path) as entries:
                return {entry.name: entry.stat().st_size if entry.is_file() else 0 for entry in entries}

    def num_bytes(self, key: str) -> int:
        """The size of the file ``key``, or of all files of the directory."""
        path = self._path(key)
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        return sum(file.stat().st_size for file in files)

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
        with explained(key), self._temporary() as trash, self._temporary() as old:
            for place, goes_to in ((aside_of(path), old), (path, trash)):
                with suppress(FileNotFoundError):
                    os.rename(place, goes_to)
                    fsync_directory(path.parent)

    def _path(self, key: str) -> Path:
        return self.root.joinpath(*key.split("/"))

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
