"""The software that numbers depend on, and the check that a trial runs on the driver's.

Package versions are in no identity (run.json records them), so a node with another one would give other numbers under
the same id, and nothing would say so.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import socket
from dataclasses import dataclass
from pathlib import Path

from trainables.errors import VersionError

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("engine", "analysis", "trainables")
LIBRARIES = ("torch", "transformers", "peft", "deepspeed")


@dataclass(frozen=True)
class Software:
    """``versions``: of ours whole, of Python and the libraries major.minor. ``source``: hash of our packages' source,
    with the ``semantics`` numbers in it. ``place``: the installation."""

    versions: tuple[tuple[str, str], ...]
    source: str
    place: str


def software() -> Software:
    """What this process runs on."""
    python = ".".join(platform.python_version_tuple()[:2])
    versions = [("shiftgrad", importlib.metadata.version("shiftgrad")), ("python", python)]
    versions += [(name, ".".join(importlib.metadata.version(name).split(".")[:2])) for name in LIBRARIES]
    return Software(tuple(versions), source_hash(ROOT), f"{socket.gethostname()}:{ROOT}")


@functools.cache
def source_hash(root: Path) -> str:
    """The first 12 hex digits of sha256 over the names and contents of our Python files below ``root``."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(root).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()[:12]


def check_same(driver: Software, here: Software) -> None:
    """Raise VersionError that says what differs. The source of one installation is not compared with itself: a file
    that is edited while a sweep runs must not end the sweep."""
    ours = dict(here.versions)
    other = [
        f"{name} {ours.get(name, 'none')} where the driver has {version}"
        for name, version in driver.versions
        if ours.get(name) != version
    ]
    if here.source != driver.source and here.place != driver.place:
        other.append(f"shiftgrad's source {here.source} where the driver has {driver.source}")
    if other:
        machine = here.place.partition(":")[0]
        raise VersionError(
            f"machine {machine} has {'; '.join(other)}; install the same on all machines of the cluster: "
            "else runs of one sweep could not be compared"
        )
