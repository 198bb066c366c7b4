"""A cluster of two nodes: one is lost while runs train, another one while they are measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.results import load
from tests.engine.test_kills import TIMINGS, run_to_end
from tests.engine.tiny_sweep import write_tiny_sweep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RUNS = "  - {defense: none, seed: {grid: [0, 1]}}\n"
EXTRA = """execution: {trials: 2, max_retries: 3, checkpoint_every_steps: 1}
trackers: none
measure:
  after: {kind: gradients, on: runs, data: data/train.jsonl, vectors: [topic], rows_per_shard: 1}"""
NUM_SHARDS = 16
OVERRIDES = ["training.max_steps=40"]
TABLES = ("training", "generations", "scores", "losses", "gradients", "summary")
NODE = {"num_cpus": 1, "object_store_memory": 100 * 10**6}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    checks = {"period_ms": "500", "failure_threshold": "3", "initial_delay_ms": "0"}  # a lost node is noticed soon
    for name, value in checks.items():
        monkeypatch.setenv(f"RAY_health_check_{name}", value)
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def steps_of_each_run(store: Path) -> list[int]:
    logs = (log.read_text() for log in store.glob("runs/*/log.txt"))
    return [number for log in logs if (number := log.count("gradient norm"))]


def num_measured(store: Path) -> int:
    return len(list(store.glob("tables/gradients/*.parquet")))


def test_nodes_that_are_lost_cost_nothing_but_time(tmp_path: Path, cluster: Any) -> None:
    write_tiny_sweep(tmp_path, runs=RUNS, extra=EXTRA)
    code, printed = run_to_end(tmp_path, tmp_path / "here", overrides=OVERRIDES)
    assert code == 0, printed
    store = tmp_path / "cluster"
    node = cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    seen: list[str] = []

    def lose(what: str, node: Any, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not holds() and time.monotonic() < deadline:
            time.sleep(0.02)
        if holds():
            cluster.remove_node(node, allow_graceful=False)
            seen.append(what)

    with ThreadPoolExecutor(1) as pool:  # nodes can be added by the main thread alone
        run = pool.submit(run_to_end, tmp_path, store, overrides=[*OVERRIDES, "--address", cluster.address])
        # one trial on either node, each with a checkpoint
        lose("training", node, lambda: len(steps := steps_of_each_run(store)) == 2 and min(steps) >= 2)
        lose("measuring", cluster.add_node(**NODE), lambda: 2 <= num_measured(store) < NUM_SHARDS)
        code, printed = run.result()
    assert seen == ["training", "measuring"], printed
    assert code == 0, printed
    found, wanted = (load(folder / "sweeps" / "tiny") for folder in (store, tmp_path / "here"))
    for name in TABLES:
        one, other = (results.table(name).drop(columns=TIMINGS, errors="ignore") for results in (found, wanted))
        pd.testing.assert_frame_equal(one, other)
    assert "resumed after step" in "".join(log.read_text() for log in store.glob("runs/*/log.txt"))
