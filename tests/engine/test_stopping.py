"""A driver stops by signals and from other threads, whatever the script that started it has done to SIGINT."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from engine.stopping import Stoppable, Stopped, exit_status

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Nothing is ignored, as it would be in tests that a script started in the background or with nohup."""
    outside = {signum: signal.getsignal(signum) for signum in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    yield
    after = {signum: signal.getsignal(signum) for signum in SIGNALS}
    for signum, handler in outside.items():
        signal.signal(signum, handler)
    assert after == before, "put back"


def work(then_signal: int | None = None) -> None:
    """What a driver does: it has no end."""
    if then_signal is not None:
        os.kill(os.getpid(), then_signal)
    while True:
        time.sleep(60)


def work_until_stopped(by: threading.Thread) -> None:
    by.start()
    work(then_signal=signal.SIGINT)


def work_in_ray(then_signal: int) -> None:
    try:
        work(then_signal)
    except KeyboardInterrupt:
        raise KeyboardInterrupt from None


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_stops_like_ctrl_c_with_a_status_of_its_own(signum: int, status: int) -> None:
    with pytest.raises(Stopped, match=signal.Signals(signum).name) as caught, Stoppable():
        work(then_signal=signum)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert exit_status(caught.value) == status


def test_ctrl_c_has_the_status_of_ctrl_c() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, Stoppable():
        work(then_signal=signal.SIGINT)
    assert exit_status(caught.value) == 130


def test_a_signal_that_ray_has_made_a_plain_interrupt_keeps_its_status() -> None:
    with pytest.raises(Stopped) as caught, Stoppable():
        work_in_ray(then_signal=signal.SIGTERM)
    assert exit_status(caught.value) == 143


def work_in_a_terminal_that_is_closed() -> None:
    try:
        work(then_signal=signal.SIGHUP)
    finally:
        raise OSError(errno.EIO, "Input/output error")  # what a progress bar says of its end


def test_a_lost_terminal_keeps_its_status_whatever_is_printed_to_it() -> None:
    with pytest.raises(Stopped) as caught, Stoppable():
        work_in_a_terminal_that_is_closed()
    assert exit_status(caught.value) == 129


def test_a_driver_that_ignores_ctrl_c_is_stopped_from_another_thread() -> None:
    """So it is with ``command &`` in a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        driver = Stoppable()
        thread = threading.Timer(0.2, driver.stop)
        with pytest.raises(KeyboardInterrupt) as caught, driver:
            work_until_stopped(thread)
        assert exit_status(caught.value) == 130
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_ignores_a_lost_terminal_goes_on_ignoring_it() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_driver_in_another_thread_is_stopped() -> None:
    drivers: list[Stoppable] = []
    stopped = threading.Event()

    def drive() -> None:
        try:
            with Stoppable() as driver:
                drivers.append(driver)
                while True:
                    time.sleep(0.01)
        except KeyboardInterrupt:
            stopped.set()

    thread = threading.Thread(target=drive)
    thread.start()
    while not drivers:
        time.sleep(0.01)
    drivers[0].stop()
    thread.join(60)
    assert stopped.is_set()
