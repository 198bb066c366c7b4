"""Writing to a disk so that it lasts: what returned from here survives a kill and a power cut."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from analysis.remote import DIRECTORY_MANIFEST
from trainables.errors import StoreError

REPLACED = ".replaced"
"""Ending of the name under which a directory waits while a new one takes its place."""

_CHUNK = 1 << 20


@contextmanager
def explained(key: str) -> Iterator[None]:
    """Turn an OSError into a StoreError that names the key and says what to do."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{key}: {error.strerror or error}; {_remedy(error.errno)}") from error


def _remedy(number: int | None) -> str:
    match number:
        case errno.ENOSPC | errno.EDQUOT:
            return "what was there is untouched; make room and run again"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return "give this user the right to write there, or choose another folder for the results"
        case errno.ENAMETOOLONG:
            return "choose a shorter name"
        case _:
            return "what was there is untouched; see to the disk and run again"


def fsync_directory(path: Path) -> None:
    """Make the entries of a folder last."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems know no fsync of a folder and keep its entries without
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a folder with its parents, lasting; one that is there stays."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    fsync_directory(path.parent)


def write_new(path: Path, data: bytes) -> None:
    """Write a new file and make its content last (its name lasts when the folder is fsynced)."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def copy_directory(source: Path, target: Path) -> None:
    """Copy a folder to the new folder ``target``, links followed, every file and folder fsynced.

    MANIFEST.json with each file's size and sha256 is written last: a folder that has it is complete.
    """
    if os.path.lexists(source / DIRECTORY_MANIFEST):
        raise StoreError(f"{source}: holds a {DIRECTORY_MANIFEST}, a name that the store keeps for itself")
    files: dict[str, dict[str, int | str]] = {}
    _copy(source, target, "", files)
    content = json.dumps({"format": 1, "files": files}, indent=2, sort_keys=True) + "\n"
    write_new(target / DIRECTORY_MANIFEST, content.encode())
    fsync_directory(target)


def is_complete(directory: Path) -> bool:
    """Whether this is a directory that was written whole."""
    return (directory / DIRECTORY_MANIFEST).is_file()


def aside_of(path: Path) -> Path:
    """Where the directory ``path`` waits while a new one takes its place."""
    return path.with_name(path.name + REPLACED)


def readable(path: Path) -> Path:
    """Where the directory ``path`` can be read at this instant; ``path`` itself if it is nowhere.

    A rename cannot replace a directory that is not empty, so for an instant, or after a kill in it, the old one is
    under ``aside_of(path)`` alone.
    """
    for place in (path, aside_of(path), path):  # the new one may have come between the first two looks
        if is_complete(place):
            return place
    return path


def step_aside(path: Path, trash: Path) -> None:
    """Make room at ``path`` for a new directory, so that what can be read can be read all the time.

    A complete directory goes to ``aside_of(path)``; what is torn, and what an earlier kill left there, into the
    folder ``trash``.
    """
    if not is_complete(path):
        _move(path, trash)  # an old one that an earlier kill left aside is what can be read: it stays
        return
    _move(aside_of(path), trash)
    with suppress(FileNotFoundError):  # another process has just replaced it
        os.rename(path, aside_of(path))


def drop_aside(path: Path, trash: Path) -> None:
    """Take the old directory away, once the new one lasts."""
    _move(aside_of(path), trash)


def _move(path: Path, folder: Path) -> None:
    with suppress(FileNotFoundError):
        os.rename(path, folder / uuid.uuid4().hex)


def _copy(source: Path, target: Path, prefix: str, files: dict[str, dict[str, int | str]]) -> None:
    target.mkdir()
    for entry in sorted(os.scandir(source), key=lambda entry: entry.name):
        if entry.is_dir():
            _copy(source / entry.name, target / entry.name, f"{prefix}{entry.name}/", files)
        elif entry.is_file():
            files[prefix + entry.name] = _copy_file(source / entry.name, target / entry.name)
        else:
            raise StoreError(f"{source / entry.name}: neither a file nor a folder; it cannot be published")
    fsync_directory(target)


def _copy_file(source: Path, target: Path) -> dict[str, int | str]:
    digest, size = hashlib.sha256(), 0
    with open(source, "rb") as reader, open(target, "xb") as writer:
        while chunk := reader.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return {"size": size, "sha256": digest.hexdigest()}
