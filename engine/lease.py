"""The lease on a sweep: keeps two drivers from running one sweep at a time, and says who holds it.

Leases of a sweep are numbered files; the highest number holds. Taking the lease is creating the next number, which
only one process can do, so that of two that find a stale lease one gets it. A held lease is renewed while the driver
lives; it is stale when its process is gone (same machine) or when it was not renewed for ``STALE_AFTER_S``.
"""

from __future__ import annotations

import datetime
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil
from pydantic import ValidationError

from analysis.manifest import sweep_key
from engine.store import Store
from engine.watchdog import end_marked, own_mark
from trainables.config import Config
from trainables.errors import StoreError

RENEW_EVERY_S = 15.0
STALE_AFTER_S = 120.0
CLOCK_TOLERANCE_S = 5.0


class LeaseHeldError(StoreError):
    """Another driver is running this sweep."""


class Holder(Config):
    """Who holds a lease: a process of a machine (``boot`` tells one start of it from the next)."""

    host: str
    boot: str
    pid: int
    process_started: float  # seconds since the epoch: a later process with the same number is another one
    taken_utc: datetime.datetime
    renewed_utc: datetime.datetime
    released: bool = False
    mark: str = ""  # what the processes of its Ray carry; "" in leases of versions that had no marks

    @staticmethod
    def of_this_process() -> Holder:
        now = _now()
        return Holder(
            host=socket.gethostname(),
            boot=_boot(),
            pid=os.getpid(),
            process_started=psutil.Process().create_time(),
            taken_utc=now,
            renewed_utc=now,
            mark=own_mark(),
        )

    def is_here(self) -> bool:
        """Whether it was taken in this start of this machine."""
        return (self.host, self.boot) == (socket.gethostname(), _boot())

    def is_over(self) -> bool:
        """Whether nobody works under this lease any more."""
        if self.released:
            return True
        if self.is_here():
            try:
                # the kernel counts ticks since its start; when the clock is set, what they mean moves with it
                return abs(psutil.Process(self.pid).create_time() - self.process_started) > CLOCK_TOLERANCE_S
            except psutil.NoSuchProcess:
                return True
        return (_now() - self.renewed_utc).total_seconds() > STALE_AFTER_S

    def describe(self) -> str:
        since = self.taken_utc.isoformat(timespec="seconds")
        return f"process {self.pid} on {self.host} since {since}"


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _boot() -> str:
    """Identity of this start of this machine, and of the container whose process numbers we see."""
    path = Path("/proc/sys/kernel/random/boot_id")
    if not path.exists():
        return str(psutil.boot_time())
    return f"{path.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def current_holder(store: Store, sweep: str) -> Holder | None:
    """Who runs the sweep now; None if nobody does."""
    number = _highest(store, sweep)
    if number == 0:
        return None
    holder = _read(store, sweep, number)
    return None if holder is None or holder.is_over() else holder


class Lease:
    """A context: holds the lease on one sweep. Entering raises LeaseHeldError if a living driver holds it.

    ``lost`` is called with the reason, from another thread, if the lease is lost: another driver took it while this
    machine slept, or the store could not be written to for as long as a lease lasts.
    """

    def __init__(self, store: Store, sweep: str, lost: Callable[[str], None]) -> None:
        self.store = store
        self.sweep = sweep
        self.lost = lost
        self.number = 0
        self._stop = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        while True:
            highest = _highest(self.store, self.sweep)
            held = _read(self.store, self.sweep, highest) if highest else None
            if held is not None and not held.is_over():
                raise LeaseHeldError(
                    f"sweep {self.sweep!r} is being run by {held.describe()}; wait for it or stop it, "
                    "or give this sweep another name"
                )
            if held is not None and not held.released:
                _end_what_is_left_of(held)
            self._holder = Holder.of_this_process()
            if self.store.create(_key(self.sweep, highest + 1), self._content(self._holder)):
                self.number = highest + 1
                break
        for old in range(max(1, self.number - 5), self.number):
            self.store.remove(_key(self.sweep, old))
        self._renewing.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._renewing.join()
        with suppress(StoreError):  # unreleased it is over all the same once this process ends
            if _highest(self.store, self.sweep) == self.number:
                self._write(released=True)

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self._stop.wait(RENEW_EVERY_S):
            try:
                highest = _highest(self.store, self.sweep)
                if highest != self.number:
                    holder = _read(self.store, self.sweep, highest)
                    self.lost(f"taken by {holder.describe() if holder is not None else 'another driver'}")
                    return
                self._write(released=False)
                renewed = time.monotonic()
            except StoreError as error:  # a full disk or a network that is away: the next try may go through
                if time.monotonic() - renewed > STALE_AFTER_S:
                    self.lost(f"not renewed for {STALE_AFTER_S:.0f} s: {error}")
                    return

    def _write(self, *, released: bool) -> None:
        holder = self._holder.model_copy(update={"renewed_utc": _now(), "released": released})
        self.store.publish(_key(self.sweep, self.number), self._content(holder))

    @staticmethod
    def _content(holder: Holder) -> bytes:
        return (holder.model_dump_json(indent=2) + "\n").encode()


def _end_what_is_left_of(dead: Holder) -> None:
    """End the processes of a driver that was killed: none of its trials may write beside those of the next driver.

    Its watchdog does so within a second; this is for a driver that comes sooner, or whose watchdog was killed too.
    """
    if dead.is_here() and dead.mark:
        left = end_marked(dead.mark)
        if left:
            raise StoreError(
                f"processes of {dead.describe()}, which is gone, cannot be ended: {left}; end them, then run again"
            )


def _key(sweep: str, number: int) -> str:
    return sweep_key(sweep, f"lease/{number}.json")


def _highest(store: Store, sweep: str) -> int:
    numbers = [int(name.removesuffix(".json")) for name in store.names(sweep_key(sweep, "lease"))]
    return max(numbers, default=0)


def _read(store: Store, sweep: str, number: int) -> Holder | None:
    """The holder of a number; None if its driver released it and the next one has just cleared it away."""
    key = _key(sweep, number)
    if not store.exists(key):
        return None
    try:
        return Holder.model_validate_json(store.read(key))
    except ValidationError as error:
        raise StoreError(f"{key}: not a lease; if nobody runs this sweep, remove it and run again") from error
