"""Collecting garbage: only what no sweep names, and only on request."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.cli import app
from engine.collect import find_garbage, find_left_overs
from engine.lease import Lease
from engine.machine import read_machine
from engine.prepare import prepare
from engine.store import Store
from tests.engine.finished import write_finished
from tests.engine.tiny_sweep import write_tiny_sweep
from trainables.errors import StoreError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return write_finished(prepare(write_tiny_sweep(tmp_path), (), read_machine()))


def add_garbage(store: Store) -> set[str]:
    (run, *_) = (name for name in store.names("runs") if store.exists(f"runs/{name}/run.json"))
    store.publish(f"runs/{run}/checkpoint/state", b"old")
    store.publish("runs/000000000000/log.txt", b"12345")
    store.publish("vectors/000000000000.safetensors", b"123")
    store.publish("tables/scores/000000000000.parquet", b"1")
    return {
        f"runs/{run}/checkpoint",
        "runs/000000000000",
        "vectors/000000000000.safetensors",
        "tables/scores/000000000000.parquet",
    }


def files(store: Store) -> set[Path]:
    return {path for path in store.root.rglob("*") if path.is_file()}


def test_a_finished_sweep_has_no_garbage(store: Store) -> None:
    assert find_garbage(store) == []


def test_what_no_sweep_names_is_found_with_its_size(store: Store) -> None:
    wanted = add_garbage(store)
    found = {garbage.key: garbage for garbage in find_garbage(store)}
    assert set(found) == wanted
    assert found["runs/000000000000"].num_bytes == 5


def test_nothing_is_touched_without_delete_and_just_the_garbage_with_it(store: Store) -> None:
    clean = files(store)
    add_garbage(store)
    dirty = files(store)
    runner = CliRunner()
    assert "4 things" in runner.invoke(app, ["gc", str(store.root)]).output
    assert files(store) == dirty
    assert runner.invoke(app, ["gc", str(store.root), "--delete"]).exit_code == 0
    assert files(store) == clean


def test_nothing_is_collected_while_a_sweep_runs(store: Store) -> None:
    with Lease(store, "tiny", lost=lambda who: pytest.fail(who)), pytest.raises(StoreError, match="is being run by"):
        find_garbage(store)


def test_only_old_left_overs_are_found(store: Store) -> None:
    folder = store.root / ".tmp"
    folder.mkdir(exist_ok=True)
    for name, age_s in (("young", 10), ("old", 4000)):
        (folder / name).write_text("")
        os.utime(folder / name, (time.time() - age_s,) * 2)
    assert [path.name for path in find_left_overs(store)] == ["old"]


def test_an_old_directory_is_left_over_only_when_the_new_one_is_in_place(store: Store, tmp_path: Path) -> None:
    """After a kill while a checkpoint was being replaced the old one is the only one."""
    (tmp_path / "state").mkdir()
    key = "runs/000000000000/checkpoint"
    store.publish(key, tmp_path / "state")
    os.rename(store.root / key, store.root / f"{key}.replaced")
    os.utime(store.root / f"{key}.replaced", (time.time() - 4000,) * 2)
    assert find_left_overs(store) == []
    assert store.is_complete(key)
    shutil.copytree(store.root / f"{key}.replaced", store.root / key)  # what a kill just before the end leaves
    assert find_left_overs(store) == [store.root / f"{key}.replaced"]
