"""``plan --address`` plans for a cluster: what fits side by side is counted on its nodes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import engine.ray_session
from engine.cli import app
from tests.engine.tiny_sweep import write_tiny_sweep


class _Session:
    """A RaySession that has joined a cluster of three nodes."""

    def __init__(self, address: str | None) -> None:
        assert address == "head:6379"

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing was joined."""

    def nodes(self) -> list[dict[str, float]]:
        return [{"CPU": cpus, "GPU": 0.0, "memory": 8e9} for cpus in (5.0, 3.0, 1.0)]


def test_what_fits_is_counted_node_by_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.ray_session, "RaySession", _Session)
    sweep = write_tiny_sweep(tmp_path, extra="execution: {cpus_per_trial: 2}")
    result = CliRunner().invoke(app, ["plan", str(sweep), "--address", "head:6379"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert "3 side by side on cpu" in result.output, "two on the first node, one on the second"
    assert "cluster: 3 nodes with 9 CPUs, 0 GPUs, 24 GB" in result.output
    assert not (tmp_path / "results").exists()


def _plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "engine.cli", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_of_a_running_cluster(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    sweep = str(write_tiny_sweep(tmp_path, extra="execution: {cpus_per_trial: 3}"))
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 7, "object_store_memory": 150 * 10**6, "include_dashboard": False},
    )
    try:
        planned = _plan(sweep, "--address", cluster.address)
        assert planned.returncode == 0, planned.stderr
        assert "2 side by side on cpu" in planned.stdout
        assert "cluster: 1 node with 7 CPUs, 0 GPUs" in planned.stdout
        refused = _plan(sweep, "execution.cpus_per_trial=8", "--address", cluster.address)
        assert refused.returncode == 1
        assert "execution.cpus_per_trial: 8 CPUs asked for" in refused.stderr
    finally:
        cluster.shutdown()
