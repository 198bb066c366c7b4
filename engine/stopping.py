"""Stopping a driver: by a signal, as cleanly as by Ctrl-C, or from another thread when it lost its lease."""

from __future__ import annotations

import ctypes
import errno
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

CTRL_C_STATUS = 128 + signal.SIGINT


class Stopped(KeyboardInterrupt):
    """The driver was told to stop by a signal other than Ctrl-C's."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


def exit_status(stop: KeyboardInterrupt) -> int:
    """The exit status of a driver that was stopped: 128 and the signal's number, as shells have it."""
    return 128 + stop.signum if isinstance(stop, Stopped) else CTRL_C_STATUS


class Stoppable:
    """A context for the driver's thread: meanwhile SIGTERM and SIGHUP raise Stopped in it, and ``stop`` ends it.

    Python gives signals to the main thread alone: in another thread only ``stop`` works. SIGHUP stays ignored where it
    is (nohup).
    """

    def __init__(self) -> None:
        self._thread = threading.current_thread()
        self._before: dict[int, Any] = {}
        self._signum: int | None = None
        self._told = False

    def __enter__(self) -> Stoppable:
        if self._thread is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGHUP):
                before = signal.getsignal(signum)
                # None: a handler that is not Python's and could not be put back
                if before is not None and not (signum == signal.SIGHUP and before == signal.SIG_IGN):
                    self._before[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, before in self._before.items():
            signal.signal(signum, before)
        if self._signum is None or self._told:
            return
        # Ray makes a plain interrupt of what is raised while it waits; and what is printed on the way out to a terminal
        # that is gone is an error of its own
        gone = self._signum == signal.SIGHUP and isinstance(error, OSError) and error.errno == errno.EIO
        if kind is KeyboardInterrupt or gone:
            raise Stopped(self._signum) from None

    def stop(self) -> None:
        """From any thread: raise KeyboardInterrupt in the driver's.

        Not by SIGINT, which is ignored in a driver that a script has started in the background.
        """
        self._told = True
        assert self._thread.ident is not None
        if signal.SIGTERM in self._before:
            signal.pthread_kill(self._thread.ident, signal.SIGTERM)
        else:  # takes effect when the thread is next in Python code
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self._thread.ident), ctypes.py_object(KeyboardInterrupt)
            )

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        del frame
        self._signum = signum
        raise KeyboardInterrupt if self._told else Stopped(signum)
