"""A store that fails: a full disk, a read-only folder, a third of all writes. The next run continues."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import engine.disk
from analysis.remote import Remote
from analysis.results import load
from analysis.tables import table_key
from engine.judging import judge_task
from engine.prepare import Prepared
from engine.run import pending_jobs, pending_judge_tasks, write_sweep
from engine.store import Store
from tests.engine.tiny_prepare import TinySweep, tiny_model_folder
from tests.engine.tiny_work import work_on
from tests.object_store import s3
from trainables.checkpoint import CheckpointSettings
from trainables.errors import StoreError

TABLES = ("training", "generations", "scores", "losses", "summary")
TIMES = ["seconds", "seconds_training", "started_utc", "finished_utc"]
MOST_INVOCATIONS = 40


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    sweep = TinySweep(tmp_path_factory.mktemp("sweep"), tiny_model_folder(tmp_path_factory))
    sweep.raw["runs"] = [{"defense": {"kind": "pps", "vector": "topic", "layer": 2, "coefficient": 1.5}}]
    return sweep.prepare("training.max_steps=2", "evaluation.samples=1", "evaluation.max_new_tokens=2")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3() as url:
        yield url


def invoke(prepared: Prepared, location: str) -> list[str]:
    """Do what is missing, as the driver and its trials and judges do, without Ray; returns what failed."""
    failed = []
    try:
        store = Store.open(location, create=True)
        write_sweep(prepared, store)
    except StoreError as error:
        return [str(error)]
    work = work_on(prepared, store, checkpoints=CheckpointSettings(every_steps=1))
    for job_id in pending_jobs(prepared, store):
        try:
            work.run(job_id, lambda **_: None)
        except StoreError as error:
            failed.append(str(error))
    for task in pending_judge_tasks(prepared, store).values():
        if not store.exists(table_key("generations", task.sample_id)):
            continue
        try:
            asyncio.run(judge_task(store, task))
        except StoreError as error:
            failed.append(str(error))
    return failed


def tables(location: str) -> dict[str, pd.DataFrame]:
    results = load(f"{location}/sweeps/tiny")
    return {name: results.table(name).drop(columns=TIMES, errors="ignore") for name in TABLES}


@pytest.fixture(scope="module")
def undisturbed(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    location = str(tmp_path_factory.mktemp("undisturbed") / "results")
    assert invoke(prepared, location) == []
    return tables(location)


def until_done(prepared: Prepared, location: str) -> list[str]:
    """Invocations until nothing fails; all that failed on the way."""
    failed: list[str] = []
    for _ in range(MOST_INVOCATIONS):
        now = invoke(prepared, location)
        failed += now
        if not now:
            return failed
    raise AssertionError(f"never done: {failed[-5:]}")


def assert_same(location: str, wanted: dict[str, pd.DataFrame]) -> None:
    for name, table in tables(location).items():
        pd.testing.assert_frame_equal(table, wanted[name])


def fail_fsync(monkeypatch: pytest.MonkeyPatch, number: int, is_bad: Callable[[], bool]) -> None:
    """The system refuses to make anything last, with this error number, while ``is_bad``."""
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        if is_bad():
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)


def test_a_third_of_all_writes_to_a_disk_fails(
    prepared: Prepared, undisturbed: dict[str, pd.DataFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws, is_bad = random.Random(0), False  # exactly every third would fail the same one in every invocation
    with monkeypatch.context() as patch:
        for name in ("put_bytes", "put_directory"):
            original = getattr(engine.disk.DiskFiles, name)

            def drawing(self: Any, *given: Any, original: Any = original) -> None:
                nonlocal is_bad
                is_bad = draws.random() < 1 / 3
                try:
                    original(self, *given)
                finally:
                    is_bad = False

            patch.setattr(engine.disk.DiskFiles, name, drawing)
        fail_fsync(patch, errno.ENOSPC, lambda: is_bad)
        failed = until_done(prepared, str(tmp_path / "results"))
    assert len(failed) > 3
    assert all("No space left on device; what was there is untouched; make room and run again" in one for one in failed)
    assert_same(str(tmp_path / "results"), undisturbed)
    assert list((tmp_path / "results" / ".tmp").iterdir()) == []


def test_writes_to_a_bucket_that_fail_now_and_then(
    prepared: Prepared, undisturbed: dict[str, pd.DataFrame], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = f"{bucket}/failing"
    fs, _ = Remote(location).opened()
    put, draws = fs.pipe_file, random.Random(0)

    def failing(*given: Any, **options: Any) -> None:
        if draws.random() < 1 / 8:  # a line of a log is a write there too
            raise TimeoutError("the service is away")
        put(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(fs, "pipe_file", failing)
        failed = until_done(prepared, location)
    assert len(failed) > 3
    assert all("TimeoutError: the service is away; what was there is untouched" in one for one in failed)
    assert_same(location, undisturbed)


def test_a_folder_that_became_read_only_is_said_and_left_as_it_is(
    prepared: Prepared, undisturbed: dict[str, pd.DataFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = tmp_path / "results"
    store = Store.open(location, create=True)
    write_sweep(prepared, store)
    before = {path: path.read_bytes() for path in location.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        fail_fsync(patch, errno.EROFS, lambda: True)
        (message,) = invoke(prepared, str(location))
        assert "Read-only file system; give this user the right to write there, or choose another folder" in message
    assert {path: path.read_bytes() for path in location.rglob("*") if path.is_file()} == before
    assert invoke(prepared, str(location)) == []
    assert_same(str(location), undisturbed)
