"""The Ray that a sweep runs on: one of our own on this machine, a cluster, or the one that the caller has started."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from engine.machine import read_machine
from engine.stopping import Stopped
from engine.watchdog import VARIABLE, Watchdog, own_mark
from trainables.errors import ConfigError, Fault

OBJECT_STORE_BYTES = 200 * 10**6  # only ids, configs and small rows pass through it
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a trial that asked for no GPU sees none
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the store has the tables
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep at once, not after Tune has saved its own state
}


class RaySession:
    """A context: ``start`` makes Ray ready when it is first needed, leaving shuts down what was started here.

    ``address``: a running cluster, joined at once, because what it offers decides what can be planned. Ray that the
    caller has initialised is used as it is and left running. Otherwise Ray starts on this machine, never joining
    another one that happens to run here, and none of its processes outlives this one (see ``engine.watchdog``).
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = address
        self._ours = False
        self._watchdog: Watchdog | None = None

    def __enter__(self) -> RaySession:
        if self.address is not None:
            self.start(threads=1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Shut down what was started here; doing it twice does nothing."""
        try:
            if self._ours:
                import ray

                ray.shutdown()
                self._ours = False
        finally:
            if self._watchdog is not None:
                self._watchdog.close()
                self._watchdog = None

    def nodes(self) -> list[dict[str, float]] | None:
        """What each living node of the cluster, or of the Ray that the caller started, offers; None if there is
        none yet and Ray will start on this machine."""
        if "ray" not in sys.modules:
            return None
        import ray

        if not ray.is_initialized():
            return None
        return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]

    def start(self, threads: int) -> None:
        """Make Ray ready for trials of ``threads`` threads; doing it twice does nothing."""
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        import ray

        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what fails is reported by us, in one line
        if ray.is_initialized():
            return
        environment = {
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        runtime_env: dict[str, object] = {"env_vars": environment}
        self._ours = True
        machine = read_machine()
        if self.address is not None:
            try:
                with _own_signals():
                    ray.init(address=self.address, runtime_env=runtime_env, log_to_driver=False)
            except ConnectionError as error:
                reason = str(error).strip().splitlines()[0]
                raise ConfigError([Fault("--address", f"no cluster answers at {self.address!r}: {reason}")]) from error
        else:
            if shlex.quote(sys.executable) != sys.executable:
                # Ray 2.60 puts the interpreter's path into a shell command as it is: with a space in it no worker
                # ever starts, and nothing says so
                runtime_env["py_executable"] = shlex.quote(sys.executable)
            self._watchdog = Watchdog(own_mark())
            with _own_signals(), _mark_for_children(own_mark()):
                ray.init(
                    address="local",
                    num_cpus=machine.num_cpus,
                    # else Ray offers what is free right now, and a trial that the plan allows could wait for ever
                    _memory=int(machine.memory_gb * 1e9),
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                    runtime_env=runtime_env,
                )


@contextmanager
def _mark_for_children(mark: str) -> Iterator[None]:
    """What is started meanwhile inherits the mark; what the caller starts later does not."""
    # SPT_NOENV: Ray's agents write their titles over their environment, and over the mark, without it
    wanted = {VARIABLE: mark, "SPT_NOENV": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _own_signals() -> Iterator[None]:
    """Put the caller's SIGTERM handler back: ``ray.init`` sets one that ends the process with exit status 15."""
    before: Any = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as end:
        if end.code == signal.SIGTERM:  # by Ray's own handler, while it starts
            raise Stopped(signal.SIGTERM) from None
        raise
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)
