"""Ends what a driver's own Ray leaves behind, however the driver ended.

Ray's agents outlive a driver that was killed by a minute, and its trials by seconds. Every process of a Ray that we
start, and every process that these start, inherits a mark in its environment: a name that no other driver has. The
watchdog is a small process beside the driver; when the driver is gone it kills whatever carries the mark. A Ray that
we did not start carries no mark of ours.

``python watchdog.py <mark> <driver's process id>`` is the watchdog itself: the standard library alone, so that it is
small and starts wherever the interpreter does. Where there is no /proc nothing is found and Ray is left to itself.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
from contextlib import suppress

VARIABLE = "SHIFTGRAD_RAY_OF"
LOOK_EVERY_S = 0.5  # the end of the pipe tells at once, unless a fork of the driver still has its other end
KILL_FOR_S = 60.0
_RANDOM = uuid.uuid4().hex


def own_mark() -> str:
    """The mark of this process as a driver; a fork of it has another."""
    return f"{os.getpid()}-{_RANDOM}"


def marked(mark: str) -> list[int]:
    """Ids of the living processes of this machine that carry the mark, as far as this user may see."""
    if not os.path.isdir("/proc/self"):
        return []
    own = os.getpid()
    return [pid for name in os.listdir("/proc") if name.isdigit() and (pid := int(name)) != own and _carries(pid, mark)]


def _carries(pid: int, mark: str) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as environment:
            return f"{VARIABLE}={mark}".encode() in environment.read().split(b"\0")
    except OSError:  # it has just ended, or it is another user's
        return False


def _kill(pid: int, mark: str) -> None:
    """Kill the process if it is still the one that carries the mark."""
    with suppress(ProcessLookupError):
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        except OSError:  # Linux before 5.3
            os.kill(pid, signal.SIGKILL)
            return
        try:
            if _carries(pid, mark):  # looked at again: now the number cannot pass to another process
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)


def end_marked(mark: str, timeout_s: float = KILL_FOR_S) -> list[int]:
    """Kill the processes that carry the mark, and those that they start meanwhile, until none is left.

    Returns the ids of those that are still there after ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    num_empty = 0
    while num_empty < 2:  # a process that is just being started shows no environment for an instant
        left = marked(mark)
        if left and time.monotonic() > deadline:
            return left
        for pid in left:
            _kill(pid, mark)
        num_empty = 0 if left else num_empty + 1
        time.sleep(0.05)
    return []


class Watchdog:
    """Watches over this process until ``close``. One that is killed meanwhile is started again."""

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self.process = self._start()
        self._closing = False
        self._changing = threading.Lock()
        self._keeping = threading.Thread(target=self._keep, name="watchdog", daemon=True)
        self._keeping.start()

    def close(self) -> None:
        """End what still carries the mark, and the watchdog."""
        end_marked(self.mark)
        with self._changing:
            self._closing = True
            self._let_go()
        self._keeping.join()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, self.mark, str(os.getpid())],
            stdin=subprocess.PIPE,
            start_new_session=True,  # the terminal's signals are for the driver
            env={name: value for name, value in os.environ.items() if name != VARIABLE},
        )

    def _keep(self) -> None:
        while True:
            status = self.process.wait()
            with self._changing:
                if self._closing or status >= 0:  # one that fails by itself would do so again, and has said why
                    return
                self._let_go()
                self.process = self._start()

    def _let_go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()


def _watch(mark: str, driver: int) -> None:
    while os.getppid() == driver:
        readable, _, _ = select.select([sys.stdin], [], [], LOOK_EVERY_S)
        if readable:  # nothing is ever written: this is its end
            break
    end_marked(mark)


if __name__ == "__main__":
    _watch(sys.argv[1], int(sys.argv[2]))
