"""What there is to run on, what a sweep asks of it, and how many trials fit side by side."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from engine.sweep_models import ExecutionConfig
from trainables.errors import Fault

_GB = 1e9  # bytes
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_WAITING_GB = 1e-3  # more than the trial asks for that waits for workers (engine/scheduler.py)
_ROUNDING = 1e-9  # 1 / 0.1 devices must hold 10 trials of a tenth


@dataclass(frozen=True)
class Machine:
    """CPUs and GPUs, and memory in 10^9 bytes. Of a cluster: sums over its ``nodes``; a trial fits into one of them."""

    num_cpus: int
    num_gpus: float
    memory_gb: float
    nodes: tuple[Machine, ...] = ()


def read_machine(resources: Mapping[str, float] | None = None) -> Machine:
    """What this process may use; given the resources of a Ray node, what that node offers.

    On this machine a CPU counts if the scheduler's affinity and the cgroups' quota (containers) allow it; memory is
    the smaller of the machine's and the cgroups'. A node that declares no memory counts as this machine's.
    """
    if resources is not None:
        declared = resources.get("memory")
        return Machine(
            num_cpus=int(resources.get("CPU", 0)),
            num_gpus=float(resources.get("GPU", 0)),
            memory_gb=_memory_bytes() / _GB if declared is None else declared / _GB,
        )
    return Machine(num_cpus=_cpus(), num_gpus=float(torch.cuda.device_count()), memory_gb=_memory_bytes() / _GB)


def read_cluster(resources_of_nodes: Sequence[Mapping[str, float]]) -> Machine:
    """A cluster of nodes with these resources."""
    nodes = tuple(read_machine(resources) for resources in resources_of_nodes)
    return Machine(
        num_cpus=sum(node.num_cpus for node in nodes),
        num_gpus=sum(node.num_gpus for node in nodes),
        memory_gb=sum(node.memory_gb for node in nodes),
        nodes=nodes,
    )


def gpus_per_trial(execution: ExecutionConfig, machine: Machine) -> float:
    """The GPUs that each trial gets: auto is one if there is any."""
    if execution.gpus_per_trial == "auto":
        return 1.0 if machine.num_gpus >= 1 else 0.0
    return execution.gpus_per_trial


def resource_faults(execution: ExecutionConfig, machine: Machine) -> list[Fault]:
    """What one trial or local judge asks for that the machine does not have."""
    faults = _trial_faults(execution, machine) or _worker_faults(execution, machine)
    judge_gpus = gpus_per_local_judge(execution, machine)
    if judge_gpus > max(node.num_gpus for node in machine.nodes or (machine,)):
        message = f"{judge_gpus:g} GPUs asked for; no machine has more than {machine.num_gpus:g}"
        return [*faults, Fault("execution.gpus_per_local_judge", message)]
    return faults


def _worker_faults(execution: ExecutionConfig, machine: Machine) -> list[Fault]:
    """What is wrong with several workers, each of which fits somewhere."""
    gpus = gpus_per_trial(execution, machine)
    if execution.workers > 1 and gpus not in (0, 1):
        message = f"each of several workers computes on one whole GPU, or on none; got {gpus:g}"
        return [Fault("execution.gpus_per_trial", message)]
    fits = _num_processes(execution, machine, gpus)
    if execution.workers > fits:
        where = "the cluster" if machine.nodes else "this machine"
        message = f"{execution.workers} asked for; {where} can hold {fits} of {execution.cpus_per_trial} CPUs"
        message += f", {gpus:g} GPUs" if gpus else ""
        memory_gb = execution.memory_gb_per_trial
        return [Fault("execution.workers", message + (f", {memory_gb:g} GB" if memory_gb else ""))]
    return []


def _trial_faults(execution: ExecutionConfig, machine: Machine) -> list[Fault]:
    if machine.nodes and all(_asked_too_much(execution, node, machine) for node in machine.nodes):
        nodes = ", ".join(
            f"{node.num_cpus} CPUs {node.num_gpus:g} GPUs {node.memory_gb:.0f} GB" for node in machine.nodes[:5]
        )
        message = f"no node of the cluster can ever hold one trial; its nodes have {nodes}"
        return [*_asked_too_much(execution, machine, machine), Fault("execution", message)]
    return [] if machine.nodes else _asked_too_much(execution, machine, machine)


def _asked_too_much(execution: ExecutionConfig, machine: Machine, whole: Machine) -> list[Fault]:
    """What one trial asks for beyond ``machine``; ``whole`` decides how many GPUs ``auto`` is."""
    faults: list[Fault] = []
    if execution.cpus_per_trial > machine.num_cpus:
        message = f"{execution.cpus_per_trial} CPUs asked for; this machine has {machine.num_cpus}"
        faults.append(Fault("execution.cpus_per_trial", message))
    gpus = gpus_per_trial(execution, whole)
    if gpus > machine.num_gpus:
        message = f"{gpus:g} GPUs asked for; this machine has {machine.num_gpus:g}"
        faults.append(Fault("execution.gpus_per_trial", message))
    memory_gb = execution.memory_gb_per_trial
    if memory_gb is not None and memory_gb > machine.memory_gb:
        message = f"{memory_gb:g} GB asked for; this machine has {machine.memory_gb:.1f} GB"
        faults.append(Fault("execution.memory_gb_per_trial", message))
    return faults


def num_trials(execution: ExecutionConfig, machine: Machine) -> int:
    """How many trials run side by side: as many as fit with all of their workers, at most ``execution.trials``, at
    least 1.

    Trials that share a GPU never straddle two of them.
    """
    gpus = gpus_per_trial(execution, machine)
    fits = _num_processes(execution, machine, gpus) // execution.workers
    return max(1, fits if execution.trials == "auto" else min(fits, execution.trials))


def _num_processes(execution: ExecutionConfig, machine: Machine, gpus: float) -> int:
    return sum(_num_fitting(execution, node, gpus) for node in machine.nodes or (machine,))


def gpus_per_local_judge(execution: ExecutionConfig, machine: Machine) -> float:
    """The GPUs that each local judge gets: auto is one if there is any."""
    if execution.gpus_per_local_judge == "auto":
        return 1.0 if machine.num_gpus >= 1 else 0.0
    return execution.gpus_per_local_judge


def num_trials_beside(trials: int, gpus_per_trial: float, gpus_of_judges: float, machine: Machine) -> int:
    """How many of ``trials`` run side by side so that local judges have their GPUs too; all of them where the machine
    is too small for both, and the judges wait."""
    left = machine.num_gpus - gpus_of_judges
    if gpus_per_trial == 0 or gpus_of_judges == 0 or left < gpus_per_trial:
        return trials
    return max(1, min(trials, math.floor(left / gpus_per_trial + _ROUNDING)))


def is_short_of_gpus(gpus_per_trial: float, gpus_of_judges: float, machine: Machine) -> bool:
    """Whether local judges and trials cannot have their GPUs at the same time, and take turns."""
    return gpus_of_judges > 0 and 0 < gpus_per_trial > machine.num_gpus - gpus_of_judges


def _num_fitting(execution: ExecutionConfig, machine: Machine, gpus: float) -> int:
    fits = [machine.num_cpus // execution.cpus_per_trial]
    if gpus >= 1:
        fits.append(math.floor(machine.num_gpus / gpus))
    elif gpus > 0:
        fits.append(math.floor(machine.num_gpus) * math.floor(1 / gpus + _ROUNDING))
    if execution.memory_gb_per_trial is not None:
        spare = _WAITING_GB if execution.workers > 1 else 0.0
        fits.append(math.floor((machine.memory_gb - spare) / execution.memory_gb_per_trial + _ROUNDING))
    return min(fits)


def _cpus() -> int:
    # Not every system has affinities.
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quota = cpu_quota()
    return cpus if quota is None else max(1, min(cpus, math.floor(quota)))


def _memory_bytes() -> float:
    limit = memory_limit_bytes()
    total = float(psutil.virtual_memory().total)
    return total if limit is None else min(total, limit)


def cpu_quota(own: Path = _OWN_CGROUPS, root: Path = _CGROUPS) -> float | None:
    """CPUs that the cgroups of this process (versions 1 and 2, with all their parents) allow; None: no limit."""
    quotas = []
    for folder in _folders(own, root, "cpu"):
        words = _read(folder / "cpu.max").split()  # version 2: "max 100000" or "150000 100000"
        if len(words) != 2:
            words = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]  # version 1: -1 is none
        quota, period = (float(word) if word.lstrip("-").isdecimal() else -1.0 for word in words)
        if quota > 0 and period > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def memory_limit_bytes(own: Path = _OWN_CGROUPS, root: Path = _CGROUPS) -> float | None:
    """Memory that the cgroups of this process allow; None: no limit (version 1 writes a huge number for it)."""
    texts = [
        _read(folder / name)
        for folder in _folders(own, root, "memory")
        for name in ("memory.max", "memory.limit_in_bytes")
    ]
    return min((float(text) for text in texts if text.isdecimal()), default=None)


def _folders(own: Path, root: Path, controller: str) -> list[Path]:
    """Folders that may limit this process: its cgroup and the parents, in both versions' layouts.

    A container often sees its own cgroup as the root, whatever /proc says; so the roots are always among them.
    """
    folders = [root, root / controller]
    for line in _read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base = root
        elif controller in controllers.split(","):
            base = root / controller
        else:
            continue
        place = base / path.lstrip("/")
        folders += [place, *(parent for parent in place.parents if parent.is_relative_to(base))]
    return list(dict.fromkeys(folders))


def _read(file: Path) -> str:
    """The text of a file of the kernel; empty where this kernel or container has no such file."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
