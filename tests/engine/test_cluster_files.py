"""The cluster files of the project, as far as they can be checked without a cluster: by Ray's own code."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from engine.machine import Machine, read_cluster

PROJECT = Path(__file__).resolve().parents[2]
LAUNCHED = ["cluster.yaml", "configs/cluster/on_premise.yaml"]
RAY_JOB_KEYS = {
    "entrypoint",
    "submissionMode",
    "backoffLimit",
    "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished",
    "rayClusterSpec",
}


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((PROJECT / name).read_text())
    return content


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_launcher_takes_it(name: str) -> None:
    config = read(name)
    validate_config(prepare_config(copy.deepcopy(config)))
    config["headnode"] = {}  # the check can fail
    with pytest.raises(jsonschema.ValidationError, match="headnode"):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_machine_has_the_checkout_the_token_and_ray_of_the_same_environment(name: str) -> None:
    config = read(name)
    assert config["file_mounts"] == {"~/shiftgrad": ".", "~/.ray/auth_token": "~/.ray/auth_token"}
    assert {".venv", "results"} <= set(config["rsync_exclude"])
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert all("~/shiftgrad/.venv/bin/ray st" in command for command in commands)


def test_all_workers_are_up_before_a_sweep_is_planned() -> None:
    """A sweep is planned for the nodes that are there, so none may come later."""
    config = prepare_config(read("cluster.yaml"))
    gpu = config["available_node_types"]["gpu"]
    assert gpu["min_workers"] == gpu["max_workers"] == config["max_workers"]
    config = read("configs/cluster/on_premise.yaml")
    assert config["min_workers"] == config["max_workers"] == len(config["provider"]["worker_ips"])
    (group,) = read("configs/cluster/rayjob.yaml")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]


def test_kuberay_makes_of_the_job_what_a_sweep_can_be_planned_for() -> None:
    job = read("configs/cluster/rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(job["spec"]) == RAY_JOB_KEYS
    spec = job["spec"]["rayClusterSpec"]
    cluster = {"metadata": {"name": "shiftgrad", "namespace": "default"}, "spec": copy.deepcopy(spec)}
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    head, gpu = (node["resources"] for node in types.values())
    assert head["CPU"] == 0, "no trial on the head"
    assert gpu == {"CPU": 8, "GPU": 1, "memory": 32 * 2**30}
    machine = read_cluster([head, gpu, gpu])
    assert (machine.num_cpus, machine.num_gpus) == (16, 2)
    assert machine.nodes[1] == Machine(num_cpus=8, num_gpus=1, memory_gb=32 * 2**30 / 1e9)


def test_the_job_runs_a_sweep_whose_results_outlive_the_cluster() -> None:
    spec = read("configs/cluster/rayjob.yaml")["spec"]
    words = spec["entrypoint"].split()
    assert words[:2] == ["shiftgrad", "run"]
    assert (PROJECT / words[2]).is_file()
    assert any(word.startswith("results=s3://") for word in words)
    assert spec["shutdownAfterJobFinishes"] is True
