"""Two drivers, one sweep."""

from __future__ import annotations

import datetime
import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import engine.lease
from engine.lease import Holder, Lease, LeaseHeldError, current_holder
from engine.store import Store
from trainables.errors import StoreError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "results", create=True)


def lease(store: Store) -> Lease:
    return Lease(store, "sweep", lost=lambda who: pytest.fail(f"lost to {who}"))


def put(store: Store, number: int, **changes: object) -> Holder:
    holder = Holder.of_this_process().model_copy(update=changes)
    store.publish(f"sweeps/sweep/lease/{number}.json", holder.model_dump_json().encode())
    return holder


def test_a_held_lease_is_refused_and_says_who_holds_it(store: Store) -> None:
    with lease(store):
        with pytest.raises(LeaseHeldError, match=f"process {os.getpid()} on "), lease(store):
            pass
        holder = current_holder(store, "sweep")
        assert holder is not None
        assert holder.pid == os.getpid()
    assert current_holder(store, "sweep") is None


def test_a_released_lease_can_be_taken_again_and_old_ones_are_cleared(store: Store) -> None:
    for _ in range(4):
        with lease(store):
            pass
    assert store.names("sweeps/sweep/lease") == ["4.json"]


def test_a_lease_is_released_after_an_error(store: Store) -> None:
    with pytest.raises(RuntimeError, match="no luck"), lease(store):
        raise RuntimeError("no luck")
    with lease(store):
        pass


def test_a_lease_of_a_dead_process_is_taken_over(store: Store) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    put(store, 1, pid=gone.pid)
    assert current_holder(store, "sweep") is None
    with lease(store) as taken:
        assert taken.number == 2


def test_a_lease_of_an_earlier_process_with_the_same_number_is_taken_over(store: Store) -> None:
    put(store, 1, process_started=12345.0)
    with lease(store) as taken:
        assert taken.number == 2


@pytest.mark.parametrize(("age_s", "over"), [(1.0, False), (119.0, False), (121.0, True)])
def test_a_lease_of_another_machine_is_over_when_it_was_not_renewed(store: Store, age_s: float, over: bool) -> None:
    renewed = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age_s)
    holder = put(store, 1, host="elsewhere", renewed_utc=renewed)
    assert holder.is_over() is over


def test_a_renewed_lease_keeps_its_number_and_moves_its_time(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.lease, "RENEW_EVERY_S", 0.01)
    with lease(store) as held:
        first = current_holder(store, "sweep")
        written = threading.Event()

        def write(*, released: bool) -> None:
            Lease._write(held, released=released)
            written.set()

        monkeypatch.setattr(held, "_write", write)
        assert written.wait(20)
        later = current_holder(store, "sweep")
        assert first is not None
        assert later is not None
        assert later.renewed_utc > first.renewed_utc
        assert later.taken_utc == first.taken_utc


def test_a_driver_whose_lease_was_taken_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.lease, "RENEW_EVERY_S", 0.01)
    told: list[str] = []
    heard = threading.Event()

    def lost(who: str) -> None:
        told.append(who)
        heard.set()

    held = Lease(store, "sweep", lost)
    with held:
        put(store, 2, host="elsewhere")
        assert heard.wait(20)
    assert "on elsewhere" in told[0]
    holder = current_holder(store, "sweep")
    assert holder is not None, "the loser does not release what it no longer holds"
    assert holder.host == "elsewhere"


def test_only_one_of_many_takes_the_next_number(store: Store) -> None:
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda number=number: results.append(store.create("sweeps/x/1.json", b"%d" % number)))
        for number in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False] * 15 + [True]


def test_one_error_of_the_store_does_not_end_the_renewing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.lease, "RENEW_EVERY_S", 0.01)
    held = lease(store)
    written = threading.Event()
    tries: list[int] = []

    def write(*, released: bool) -> None:
        tries.append(1)
        if len(tries) < 3:
            raise StoreError("the disk is full")
        Lease._write(held, released=released)
        written.set()

    monkeypatch.setattr(held, "_write", write)
    with held:
        assert written.wait(20)


def test_a_store_that_stays_away_loses_the_lease(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.lease, "RENEW_EVERY_S", 0.01)
    monkeypatch.setattr(engine.lease, "STALE_AFTER_S", 0.05)
    told: list[str] = []
    heard = threading.Event()

    def lost(why: str) -> None:
        told.append(why)
        heard.set()

    held = Lease(store, "sweep", lost)

    def write(*, released: bool) -> None:
        raise StoreError(f"no disk (released {released})")

    monkeypatch.setattr(held, "_write", write)
    with held:
        assert heard.wait(20)
    assert "no disk" in told[0]


def test_without_hard_links_a_key_is_still_created_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert store.create("sweeps/x/1.json", b"one")
    assert not store.create("sweeps/x/1.json", b"two")
    assert store.read("sweeps/x/1.json") == b"one"
