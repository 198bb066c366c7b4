"""What the machine has, what a trial may ask of it, and how many fit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import engine.machine
from engine.machine import (
    Machine,
    cpu_quota,
    gpus_per_local_judge,
    gpus_per_trial,
    is_short_of_gpus,
    memory_limit_bytes,
    num_trials,
    num_trials_beside,
    read_cluster,
    read_machine,
    resource_faults,
)
from engine.sweep_file import ExecutionConfig

LAPTOP = Machine(num_cpus=2, num_gpus=0, memory_gb=8)
SERVER = Machine(num_cpus=16, num_gpus=4, memory_gb=128)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_this_machine() -> None:
    machine = read_machine()
    assert 1 <= machine.num_cpus <= (os.cpu_count() or 1)
    assert machine.num_gpus == torch.cuda.device_count()
    assert 0.1 < machine.memory_gb < 1e5  # in 10^9 bytes, not bytes or MB


def test_affinity_quota_and_memory_limit_all_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(engine.machine, "memory_limit_bytes", lambda: 2e6)
    monkeypatch.setattr(engine.machine, "cpu_quota", lambda: None)
    assert read_machine().num_cpus == 6
    assert read_machine().memory_gb == pytest.approx(0.002)
    monkeypatch.setattr(engine.machine, "cpu_quota", lambda: 3.5)
    assert read_machine().num_cpus == 3
    monkeypatch.setattr(engine.machine, "cpu_quota", lambda: 0.5)  # half a CPU still runs one trial
    assert read_machine().num_cpus == 1
    monkeypatch.setattr(engine.machine, "cpu_quota", lambda: 99.0)
    monkeypatch.setattr(engine.machine, "memory_limit_bytes", lambda: 1e19)  # what version 1 says for "none"
    assert read_machine().num_cpus == 6
    assert read_machine().memory_gb < 1e6


def test_a_cluster_is_taken_by_its_resources() -> None:
    machine = read_machine({"CPU": 64.0, "GPU": 8.0, "memory": 5e11, "node:10.0.0.1": 1.0})
    assert machine == Machine(num_cpus=64, num_gpus=8, memory_gb=500)
    assert read_machine({"CPU": 2.0}).num_gpus == 0
    assert read_machine({"CPU": 2.0}).memory_gb == read_machine().memory_gb


def test_quota_of_version_2_with_parents(tmp_path: Path) -> None:
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    write(own, "0::/pod/container\n")
    assert cpu_quota(own, root) is None
    write(root / "pod/container/cpu.max", "max 100000\n")
    assert cpu_quota(own, root) is None
    write(root / "pod/cpu.max", "150000 100000\n")  # the parent limits its children
    assert cpu_quota(own, root) == 1.5
    write(root / "pod/container/cpu.max", "50000 100000\n")
    assert cpu_quota(own, root) == 0.5


def test_quota_of_version_1(tmp_path: Path) -> None:
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    write(own, "4:memory:/job\n3:cpu,cpuacct:/job\n0::/\n")
    write(root / "cpu/job/cpu.cfs_quota_us", "-1\n")
    write(root / "cpu/job/cpu.cfs_period_us", "100000\n")
    assert cpu_quota(own, root) is None
    write(root / "cpu/job/cpu.cfs_quota_us", "300000\n")
    assert cpu_quota(own, root) == 3


def test_a_container_that_sees_its_cgroup_as_the_root(tmp_path: Path) -> None:
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    write(own, "0::/a/path/of/the/host\n")
    write(root / "cpu.max", "200000 100000\n")
    write(root / "memory.max", "3000000000\n")
    assert cpu_quota(own, root) == 2
    assert memory_limit_bytes(own, root) == 3e9


def test_memory_limits(tmp_path: Path) -> None:
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    assert memory_limit_bytes(own, root) is None  # a system without cgroups
    write(own, "4:memory:/job\n0::/pod\n")
    write(root / "pod/memory.max", "max\n")
    assert memory_limit_bytes(own, root) is None
    write(root / "memory/job/memory.limit_in_bytes", "4000000000\n")
    assert memory_limit_bytes(own, root) == 4e9
    write(root / "pod/memory.max", "2000000000\n")
    assert memory_limit_bytes(own, root) == 2e9


@pytest.mark.parametrize(
    ("settings", "machine", "key", "message"),
    [
        ({"cpus_per_trial": 3}, LAPTOP, "execution.cpus_per_trial", "3 CPUs asked for; this machine has 2"),
        ({"gpus_per_trial": 1}, LAPTOP, "execution.gpus_per_trial", "1 GPUs asked for; this machine has 0"),
        ({"gpus_per_trial": 0.5}, LAPTOP, "execution.gpus_per_trial", "0.5 GPUs asked for; this machine has 0"),
        ({"gpus_per_trial": 8}, SERVER, "execution.gpus_per_trial", "8 GPUs asked for; this machine has 4"),
        (
            {"memory_gb_per_trial": 8.5},
            LAPTOP,
            "execution.memory_gb_per_trial",
            "8.5 GB asked for; this machine has 8.0 GB",
        ),
    ],
)
def test_more_than_the_machine_has(settings: dict[str, Any], machine: Machine, key: str, message: str) -> None:
    (fault,) = resource_faults(ExecutionConfig(**settings), machine)
    assert (fault.key, fault.message) == (key, message)


def test_every_resource_that_is_missing_is_named() -> None:
    execution = ExecutionConfig(cpus_per_trial=4, gpus_per_trial=1, memory_gb_per_trial=64)
    assert len(resource_faults(execution, LAPTOP)) == 3
    assert resource_faults(execution, SERVER) == []


def test_exactly_what_the_machine_has_is_allowed() -> None:
    execution = ExecutionConfig(cpus_per_trial=2, gpus_per_trial=0, memory_gb_per_trial=8)
    assert resource_faults(execution, LAPTOP) == []


def test_gpus_auto_is_one_where_there_is_one() -> None:
    assert gpus_per_trial(ExecutionConfig(), LAPTOP) == 0
    assert gpus_per_trial(ExecutionConfig(), SERVER) == 1
    assert gpus_per_trial(ExecutionConfig(gpus_per_trial=0), SERVER) == 0


@pytest.mark.parametrize(
    ("settings", "machine", "expected"),
    [
        ({}, LAPTOP, 2),
        ({}, SERVER, 4),  # by GPUs
        ({"gpus_per_trial": 0}, SERVER, 16),
        ({"cpus_per_trial": 3, "gpus_per_trial": 0}, SERVER, 5),
        ({"gpus_per_trial": 0.25}, SERVER, 16),
        ({"gpus_per_trial": 0.4}, SERVER, 8),  # two on each GPU, none across two
        ({"gpus_per_trial": 0.1}, Machine(64, 1, 64), 10),
        ({"gpus_per_trial": 3}, SERVER, 1),
        ({"memory_gb_per_trial": 3}, LAPTOP, 2),
        ({"memory_gb_per_trial": 5}, LAPTOP, 1),
        ({"memory_gb_per_trial": 99}, LAPTOP, 1),  # at least one; resource_faults says what is wrong
        ({"cpus_per_trial": 99}, LAPTOP, 1),
        ({"trials": 1}, LAPTOP, 1),
        ({"trials": 3}, SERVER, 3),
        ({"trials": 9}, LAPTOP, 2),  # at most what fits
    ],
)
def test_how_many_fit(settings: dict[str, Any], machine: Machine, expected: int) -> None:
    assert num_trials(ExecutionConfig(**settings), machine) == expected


@pytest.mark.parametrize(
    ("settings", "machine", "expected"),
    [
        ({"workers": 2}, LAPTOP, 1),
        ({"workers": 2}, SERVER, 2),  # by GPUs
        ({"workers": 3}, SERVER, 1),
        ({"workers": 3, "gpus_per_trial": 0}, SERVER, 5),
        ({"workers": 4, "cpus_per_trial": 2, "gpus_per_trial": 0, "trials": 1}, SERVER, 1),
    ],
)
def test_trials_are_counted_with_all_their_workers(settings: dict[str, Any], machine: Machine, expected: int) -> None:
    assert resource_faults(ExecutionConfig(**settings), machine) == []
    assert num_trials(ExecutionConfig(**settings), machine) == expected


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        ({"workers": 5}, "execution.workers", "5 asked for; this machine can hold 4 of 1 CPUs, 1 GPUs"),
        (
            {"workers": 9, "cpus_per_trial": 2, "gpus_per_trial": 0},
            "execution.workers",
            "9 asked for; this machine can hold 8 of 2 CPUs",
        ),
        (
            {
                "workers": 2,
                "gpus_per_trial": 0,
                "memory_gb_per_trial": 64,
            },  # all of it, and what waits needs a byte
            "execution.workers",
            "2 asked for; this machine can hold 1 of 1 CPUs, 64 GB",
        ),
        (
            {"workers": 2, "gpus_per_trial": 0.5},
            "execution.gpus_per_trial",
            "each of several workers computes on one whole GPU, or on none; got 0.5",
        ),
        (
            {"workers": 2, "gpus_per_trial": 2},
            "execution.gpus_per_trial",
            "each of several workers computes on one whole GPU, or on none; got 2",
        ),
    ],
)
def test_workers_that_the_machine_cannot_hold(settings: dict[str, Any], key: str, message: str) -> None:
    (fault,) = resource_faults(ExecutionConfig(**settings), SERVER)
    assert (fault.key, fault.message) == (key, message)


class TestCluster:
    CLUSTER = read_cluster([{"CPU": 4.0, "memory": 16e9}] * 3 + [{"CPU": 2.0, "GPU": 1.0, "memory": 8e9}])

    def test_it_is_the_sum_of_its_nodes(self) -> None:
        assert (self.CLUSTER.num_cpus, self.CLUSTER.num_gpus, self.CLUSTER.memory_gb) == (14, 1.0, 56.0)

    def test_a_trial_must_fit_into_one_node(self) -> None:
        on_cpu = ExecutionConfig(cpus_per_trial=4, gpus_per_trial=0)
        assert resource_faults(on_cpu, self.CLUSTER) == []
        (fault,) = resource_faults(ExecutionConfig(cpus_per_trial=5, gpus_per_trial=0), self.CLUSTER)
        assert fault.key == "execution"
        assert "no node of the cluster can ever hold one trial" in fault.message
        assert "4 CPUs 0 GPUs 16 GB" in fault.message

    def test_what_fits_no_single_node_together_is_a_fault(self) -> None:
        (fault,) = resource_faults(ExecutionConfig(cpus_per_trial=4, gpus_per_trial=1), self.CLUSTER)
        assert fault.key == "execution"

    def test_workers_of_a_trial_may_be_on_several_nodes(self) -> None:
        execution = ExecutionConfig(cpus_per_trial=3, gpus_per_trial=0, workers=3)
        assert resource_faults(execution, self.CLUSTER) == []
        assert num_trials(execution, self.CLUSTER) == 1
        (fault,) = resource_faults(ExecutionConfig(cpus_per_trial=3, gpus_per_trial=0, workers=4), self.CLUSTER)
        assert fault.message == "4 asked for; the cluster can hold 3 of 3 CPUs"

    def test_trials_are_counted_node_by_node(self) -> None:
        assert num_trials(ExecutionConfig(cpus_per_trial=3, gpus_per_trial=0), self.CLUSTER) == 3
        assert num_trials(ExecutionConfig(cpus_per_trial=1), self.CLUSTER) == 1, "auto: one GPU each"
        assert num_trials(ExecutionConfig(cpus_per_trial=1, gpus_per_trial=0, trials=5), self.CLUSTER) == 5


class TestLocalJudges:
    def test_trials_leave_a_gpu_free_where_there_are_enough(self) -> None:
        machine = Machine(num_cpus=16, num_gpus=4.0, memory_gb=64.0)
        assert gpus_per_local_judge(ExecutionConfig(), machine) == 1.0
        assert num_trials_beside(4, 1.0, 1.0, machine) == 3
        assert num_trials_beside(8, 0.5, 1.0, machine) == 6
        assert num_trials_beside(2, 1.0, 1.0, machine) == 2  # asked for fewer anyway
        assert num_trials_beside(4, 1.0, 0.0, machine) == 4  # no local judge

    def test_with_one_gpu_the_judge_waits_for_the_trials(self) -> None:
        machine = Machine(num_cpus=16, num_gpus=1.0, memory_gb=64.0)
        assert num_trials_beside(1, 1.0, 1.0, machine) == 1

    def test_without_a_gpu_judges_are_on_the_cpu(self) -> None:
        machine = Machine(num_cpus=2, num_gpus=0.0, memory_gb=8.0)
        assert gpus_per_local_judge(ExecutionConfig(), machine) == 0.0
        (fault,) = resource_faults(ExecutionConfig(gpus_per_local_judge=1), machine)
        assert fault.key == "execution.gpus_per_local_judge"


def test_trials_and_local_judges_take_turns_only_where_gpus_are_short() -> None:
    assert is_short_of_gpus(1, 1, Machine(num_cpus=4, num_gpus=1, memory_gb=8))
    assert not is_short_of_gpus(0.5, 0.5, Machine(num_cpus=4, num_gpus=1, memory_gb=8))
    assert not is_short_of_gpus(1, 1, SERVER)
    assert not is_short_of_gpus(0, 0, LAPTOP)
