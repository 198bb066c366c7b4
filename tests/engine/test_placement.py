"""One GPU for trials and for a judge: neither waits for ever for the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import ray

from engine.scheduler import Placement, run_graph
from tests.engine.test_scheduler import job, judged_job
from trainables.tune_trainable import Report

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@dataclass(frozen=True)
class _Nothing:
    """Work that is none."""

    threads: int = 1

    def run(self, job_id: str, report: Report, note: str = "") -> None:
        del job_id, report, note

    def train_pack(self, job_ids: Sequence[str], note: str, report: Report) -> Mapping[str, float | str | int]:
        raise AssertionError(f"no pack was asked for: {job_ids} {note} {report}")


@ray.remote(num_gpus=1, num_cpus=0)
class _Judge:
    def judge(self) -> str:
        return "judged"


class _Watcher:
    """Has answers judged by an actor that needs the only GPU, once they are there."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.judge: Any = None
        self.judging: list[Any] = []

    def started(self, job_id: str) -> None:
        del job_id

    def figures(self, job_id: str, figures: Mapping[str, Any]) -> None:
        del job_id, figures

    def done(self, job_id: str) -> None:
        self.ended.append(job_id)
        if job_id == "answers":
            self.judge = _Judge.remote()  # type: ignore[attr-defined]
            self.judging = [self.judge.judge.remote()]

    def failed(self, job_id: str, reason: str) -> None:
        raise AssertionError(f"{job_id}: {reason}")

    def remark(self, text: str, *, ok: bool = True) -> None:
        del text, ok

    def skipped(self, job_id: str, reason: str) -> None:
        raise AssertionError(f"{job_id}: {reason}")

    def unjudged(self, job_id: str) -> bool | str:
        del job_id
        self.wait_for_judgement(0)
        return bool(self.judging)

    def wait_for_judgement(self, timeout_s: float | None) -> None:
        if self.judging and ray.wait(self.judging, timeout=timeout_s)[0]:
            self.judging = []
            ray.kill(self.judge)  # a pool of its own would keep it; here a trial is to have the GPU again


@pytest.fixture
def one_gpu() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=1,
        include_dashboard=False,
        object_store_memory=100 * 10**6,
        logging_level="ERROR",
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.mark.usefixtures("one_gpu")
def test_a_judge_gets_the_gpu_of_trials_that_have_ended() -> None:
    watcher = _Watcher()
    jobs = {each.id: each for each in (job("answers"), judged_job("vector", "answers"))}
    placement = Placement(num_trials=1, cpus_per_trial=1, gpus_per_trial=1, memory_bytes_per_trial=None, max_retries=0)
    run_graph(jobs, _Nothing(), placement, watcher)
    assert watcher.ended == ["answers", "vector"]
