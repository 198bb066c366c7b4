"""What a sweep needs of this machine, tried one by one."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass

from engine.machine import read_machine
from engine.ray_session import RaySession
from engine.store import Store
from engine.versions import versions
from trainables.embedded import MODELS, PREFIX, cache_folder, embedded_revision, embedded_shape
from trainables.errors import ShiftgradError


@dataclass(frozen=True)
class Finding:
    """One thing that was tried. ``detail`` says what was found, or what went wrong and what to do."""

    name: str
    ok: bool
    detail: str


def examine(results: str = "results") -> list[Finding]:
    """Try everything; one failure does not stop the rest."""
    checks: dict[str, Callable[[], str]] = {
        "python": lambda: f"{platform.python_version()} at {sys.executable}",
        "versions": lambda: ", ".join(f"{name} {version}" for name, version in versions().items() if name != "python"),
        "machine": _machine,
        "model": _model,
        "store": lambda: _store(results),
        "ray": _ray,
    }
    findings = []
    for name, check in checks.items():
        try:
            findings.append(Finding(name, True, check()))
        except (ShiftgradError, OSError, RuntimeError, ImportError) as error:
            findings.append(Finding(name, False, f"{type(error).__name__}: {error}"))
    return findings


def _machine() -> str:
    machine = read_machine()
    device = f"{machine.num_gpus:g} GPUs (CUDA, bfloat16)" if machine.num_gpus else "no GPU (CPU, float32)"
    return f"{machine.num_cpus} CPUs, {machine.memory_gb:.0f} GB of memory, {device}"


def _model() -> str:
    found = []
    for name in MODELS:
        shape = embedded_shape(PREFIX + name)
        found.append(f"{PREFIX}{name} ({embedded_revision(PREFIX + name)}): {shape.num_layers} layers")
    return "; ".join(found) + f"; cache {cache_folder()}"


def _store(results: str) -> str:
    faults = Store.faults(results)
    if faults:
        raise OSError("; ".join(faults))
    return f"{results}: can be written"


def _ray() -> str:
    with RaySession() as session:
        session.start(threads=1)
        import ray

        @ray.remote
        def where() -> str:
            import torch

            return f"a worker answered (torch {torch.__version__})"

        return str(ray.get(where.remote()))
