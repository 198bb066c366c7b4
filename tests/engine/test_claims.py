"""Claims on work that two sweeps share."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import engine.disk
from engine.store import Store

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "results", create=True)


@pytest.fixture(autouse=True)
def _claims_are_tried_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.disk, "CLAIM_RETRY_S", 0.001)


def test_a_claim_is_held_by_one_at_a_time_and_leaves_nothing(store: Store) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            with Store(store.root).claimed("0123456789ab", lambda: None):
                inside.append(number)
                most.append(len(inside))
                time.sleep(0.001)
                inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 20
    assert list((store.root / ".tmp").iterdir()) == []


def test_a_claim_waits_for_a_living_process_and_not_for_a_dead_one(store: Store) -> None:
    code = (
        "import sys, time; from engine.store import Store\n"
        "with Store.open(sys.argv[1]).claimed('0123456789ab', lambda: None): print(flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(store.root)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    waited: list[bool] = []

    def waiting() -> None:
        waited.append(True)
        if len(waited) == 2:
            holder.kill()
            holder.wait()

    with store.claimed("0123456789ab", waiting):
        assert len(waited) == 2


def test_without_locks_a_claim_is_given_to_all(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("engine.file_lock.fcntl.flock", refuse)
    waiting = pytest.fail
    with store.claimed("a", waiting), store.claimed("a", waiting):
        pass
