"""Places in an object store, with as much of ``pathlib.Path`` as readers use: ``s3://bucket/results``.

Whatever fsspec opens is read and written; that several drivers are kept apart is asked of S3 alone. An object store has
neither folders nor renames, so a *directory* of ours there is a ``MANIFEST.json`` that names the folder beside it in
which its files lie: writing it is what makes a new state of the directory readable, in one step.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit

from trainables.errors import StoreError

DIRECTORY_MANIFEST = "MANIFEST.json"
NUM_COPIES = 64
COPIES_BYTES = 4 * 10**9
"""Copies of files and directories of object stores that a process keeps: older ones go when there are more than so many
and they take more than so much."""

# One slash is enough: a Path turns s3://bucket into s3:/bucket
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/+(?P<rest>.*)", re.DOTALL)
_CLIENTS = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "adlfs")
_MAX_ATTEMPTS = 5


@dataclass(frozen=True)
class Remote:
    """A place in an object store. Plain data: it pickles. Nothing is remembered of what lies there.

    Every method raises StoreError if the store cannot be reached or refuses.
    """

    url: str  # without a slash at its end

    def __truediv__(self, key: str) -> Remote:
        return Remote(f"{self.url}/{key}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> Remote:
        """The place without its last part."""
        return Remote(self.url.rpartition("/")[0])

    def opened(self) -> tuple[Any, str]:
        """fsspec's file system, and what it calls this place. Raises StoreError if none can be had for this URL."""
        import fsspec  # which reading tables from a disk need not wait for

        try:
            # a listing that is remembered would hide what other machines have written since
            found: tuple[Any, str] = fsspec.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            raise StoreError(f"{self}: {error}; for s3:// install shiftgrad[s3]") from error
        except ValueError as error:
            raise StoreError(f"{self}: {error}") from error
        return found

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        fs, path = self.opened()
        with reached(self):
            return bool(fs.isfile(path))

    exists = is_file

    def read_bytes(self) -> bytes:
        """The object's content. Raises FileNotFoundError if there is none."""
        fs, path = self.opened()
        with reached(self):
            content: bytes = fs.cat_file(path)
            return content

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """The object's content as text."""
        return self.read_bytes().decode(encoding, errors)

    def sizes(self) -> dict[str, int]:
        """Names of objects and folders right under this place, with objects' sizes in bytes (a folder's is 0)."""
        fs, path = self.opened()
        with reached(self):
            try:
                entries = fs.ls(path, detail=True)
            except FileNotFoundError:
                return {}
        found = {}
        for entry in entries:
            name = entry["name"].rstrip("/").rpartition("/")[2]
            if entry["name"].rstrip("/") != path.rstrip("/"):
                found[name] = int(entry["size"] or 0) if entry["type"] == "file" else 0
        return found


Location: TypeAlias = Path | Remote
"""Where something lies: on a disk or in an object store."""


def location_of(location: str | Path | Remote) -> Location:
    """What a path or URL means: an absolute local path (workers start in other folders), or a place in an object store.

    Raises StoreError for a ``file://`` URL of another machine.
    """
    if isinstance(location, Remote):
        return location
    text = str(location)
    url = _URL.match(text)
    if url is None:
        return Path(os.path.abspath(Path(text).expanduser()))
    if url["scheme"].lower() != "file":
        return Remote(f"{url['scheme'].lower()}://{url['rest'].rstrip('/')}")
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise StoreError(f"{text}: a file URL with a host; a local folder has three slashes, file:///...")
    return Path(os.path.abspath(unquote(parts.path)))


@contextmanager
def reached(place: Remote) -> Iterator[None]:
    """Turn what the client of an object store raises into a StoreError that says what to do.

    That something is not there (FileNotFoundError, FileExistsError) is for the caller.
    """
    try:
        yield
    except (StoreError, FileNotFoundError, FileExistsError):
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise StoreError(f"{place}: {reason}") from error


def _reason(error: Exception) -> str | None:
    """What went wrong and what to do; None for what is not the store's."""
    text = " ".join(str(error).split()) or type(error).__name__
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
        return (
            f"no credentials ({text}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or give the "
            "machine a role that may read and write there"
        )
    if isinstance(error, PermissionError):
        return f"refused ({text}); these credentials may not do that there: ask for the right, or choose another place"
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _CLIENTS:
        kind = type(error).__name__
        return f"{kind}: {text}; what was there is untouched; see to the network or the service and run again"
    return None


def directory_files(place: Remote) -> tuple[Remote, dict[str, dict[str, Any]]] | None:
    """Where the files of a directory lie, and size and sha256 of each; None if it is not there."""
    try:
        content = json.loads((place / DIRECTORY_MANIFEST).read_bytes())
        return place / content["folder"], content["files"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{place / DIRECTORY_MANIFEST}: cannot be read ({error!r})") from error


def has_directory(place: Location) -> bool:
    """Whether a directory was published here whole."""
    return (place / DIRECTORY_MANIFEST).is_file()


def local_copy(place: Location) -> Path:
    """The file or directory on this machine, to read and never to write to; on a disk it is the place itself.

    Of an object store it is a copy that is taken away when the process ends, or when many others have been made.
    Raises FileNotFoundError if there is nothing.
    """
    if isinstance(place, Path):
        return place
    for _ in range(_MAX_ATTEMPTS):
        files = directory_files(place)
        if files is None:
            content = place.read_bytes()
            target = _copies().new(place)
            (target / place.name).write_bytes(content)
            return target / place.name
        target = _copies().new(place) / place.name
        try:
            _fetch(*files, target)
        except FileNotFoundError:  # it was replaced since its manifest was read
            continue
        return target
    raise StoreError(f"{place}: is being replaced faster than it can be read, or some of its files are gone")


def _fetch(folder: Remote, files: dict[str, dict[str, Any]], target: Path) -> None:
    target.mkdir()
    for name, expected in files.items():
        data = (folder / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise StoreError(f"{folder / name}: damaged, it is not what it was; remove the directory and run again")
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


class _Copies:
    """Folders of this process for copies, the oldest taken away as new ones come."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="shiftgrad-copies-"))
        self.made: list[Path] = []
        self.lock = threading.Lock()
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)

    def new(self, place: Remote) -> Path:
        """An empty folder."""
        folder = self.folder / f"{hashlib.sha256(place.url.encode()).hexdigest()[:12]}-{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        with self.lock:
            self.made.append(folder)
            old = self.made[:-NUM_COPIES]
            if sum(map(_num_bytes, self.made)) > COPIES_BYTES:
                self.made = self.made[len(old) :]
                for one in old:
                    shutil.rmtree(one, ignore_errors=True)  # what is mapped into memory stays readable
        return folder


def _num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@functools.cache
def _copies() -> _Copies:
    return _Copies()


def read_log(place: Location) -> str:
    """The text of a log; empty before it has begun. In an object store every process writes a part of its own."""
    if isinstance(place, Path):
        return place.read_text(encoding="utf-8", errors="replace") if place.is_file() else ""
    parts = []
    for name in sorted(place.sizes()):
        try:
            parts.append((place / name).read_text(errors="replace"))
        except FileNotFoundError:  # collected since it was listed
            continue
    return "".join(parts)
