"""What carries a driver's mark ends with the driver, and nothing else does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from engine.lease import Holder, Lease
from engine.store import Store
from engine.watchdog import VARIABLE, Watchdog, end_marked, marked, own_mark

ROOT = Path(__file__).resolve().parents[2]
MARK = f"{own_mark()}-test"

# starts a watchdog and one marked process, says who they are, and waits; with an argument it forks first
DRIVER = """
import os, subprocess, sys, time
from engine.watchdog import VARIABLE, Watchdog
mark = sys.argv[1]
watchdog = Watchdog(mark)
child = subprocess.Popen(["sleep", "600"], env={**os.environ, VARIABLE: mark}, start_new_session=True)
fork = os.fork() if len(sys.argv) > 2 else 0
if len(sys.argv) == 2 or fork:
    print(watchdog.process.pid, child.pid, fork, flush=True)
time.sleep(600)
"""


@pytest.fixture
def start() -> Iterator[Callable[[str | None], psutil.Popen]]:
    started: list[psutil.Popen] = []

    def begin(mark: str | None) -> psutil.Popen:
        """A shell that carries the mark, with a child that inherits it."""
        environment = os.environ if mark is None else os.environ | {VARIABLE: mark}
        process = psutil.Popen(["sh", "-c", "sleep 600 & wait"], env=environment, start_new_session=True)
        started.append(process)
        wait_until(lambda: bool(process.children()), "the shell has a child")
        return process

    yield begin
    for process in started:
        with suppress(psutil.NoSuchProcess):
            for each in (*process.children(), process):
                each.kill()
        process.wait()


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_just_what_carries_the_mark_is_ended_with_its_children(start: Callable[[str | None], psutil.Popen]) -> None:
    ours, others, plain = start(MARK), start(f"{MARK}0"), start(None)
    family = {ours.pid, *(child.pid for child in ours.children())}
    assert len(family) == 2
    assert set(marked(MARK)) == family
    assert end_marked(MARK) == []
    assert ours.wait() == -signal.SIGKILL
    assert marked(MARK) == []
    assert others.is_running()
    assert plain.is_running()


def test_what_cannot_be_ended_is_named(
    start: Callable[[str | None], psutil.Popen], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = start(MARK)
    monkeypatch.setattr("engine.watchdog._kill", lambda *_: None)
    assert family.pid in end_marked(MARK, timeout_s=0.0)


@pytest.mark.parametrize("forks", [False, True], ids=["alone", "with a fork that keeps the pipe open"])
def test_a_killed_driver_takes_everything_with_it(forks: bool) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, MARK, *(["fork"] if forks else [])],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    watchdog, child, fork = (int(word) for word in driver.stdout.readline().split())
    watched = [psutil.Process(watchdog), psutil.Process(child)]
    driver.kill()
    driver.wait()
    _, alive = psutil.wait_procs(watched, timeout=60)
    if forks:
        os.kill(fork, signal.SIGKILL)
    assert not alive


def test_a_watchdog_that_is_killed_is_started_again(start: Callable[[str | None], psutil.Popen]) -> None:
    process = start(MARK)
    watchdog = Watchdog(MARK)
    first = watchdog.process
    first.kill()
    wait_until(lambda: watchdog.process is not first, "another one")
    second = watchdog.process
    assert second.poll() is None
    assert process.is_running()
    watchdog.close()
    assert process.wait() == -signal.SIGKILL
    assert second.returncode == 0


def test_a_fork_has_a_mark_of_its_own() -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, own_mark().encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1000).decode() not in ("", own_mark())
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(
    ("changes", "ended"),
    [({}, True), ({"released": True}, False), ({"host": "elsewhere"}, False), ({"boot": "earlier"}, False)],
    ids=["killed", "released", "of another machine", "before a restart"],
)
def test_the_next_driver_ends_what_a_killed_one_left_before_it_holds_the_lease(
    tmp_path: Path, start: Callable[[str | None], psutil.Popen], changes: dict[str, object], ended: bool
) -> None:
    store = Store.open(tmp_path / "results", create=True)
    gone = subprocess.Popen([sys.executable, "-I", "-S", "-c", ""])
    gone.wait()
    process = start(MARK)
    long_ago = Holder.of_this_process().renewed_utc.replace(year=2000)
    holder = Holder.of_this_process().model_copy(
        update={"pid": gone.pid, "mark": MARK, "renewed_utc": long_ago, **changes}
    )
    store.publish("sweeps/sweep/lease/1.json", holder.model_dump_json().encode())
    at_taking: list[list[int]] = []

    class Looking(Store):
        def create(self, key: str, data: bytes) -> bool:
            at_taking.append(marked(MARK))
            return super().create(key, data)

    with Lease(Looking(store.root), "sweep", lost=pytest.fail):
        pass
    assert [bool(left) for left in at_taking] == [not ended]
    assert process.is_running() is not ended or process.status() == psutil.STATUS_ZOMBIE
