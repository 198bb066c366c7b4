"""The store in an object store: the same tables, the same promises."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

import analysis.remote
import engine.objects
from analysis.judges import Reply
from analysis.remote import Remote, local_copy, location_of
from analysis.results import READERS, load
from engine.cli import app
from engine.collect import find_garbage, find_left_overs
from engine.lease import Lease, LeaseHeldError, current_holder
from engine.reply_log import ReplyIndex, ReplyLog
from engine.run import pending_jobs, pending_judge_tasks
from engine.store import Store
from tests.engine.finished import write_finished
from tests.engine.tiny_prepare import TinySweep, tiny_model_folder
from tests.object_store import s3
from trainables.errors import StoreError
from trainables.failpoints import ENVIRONMENT_VARIABLE

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3() as url:
        yield url


@pytest.fixture
def url(bucket: str, request: pytest.FixtureRequest) -> str:
    return f"{bucket}/{request.node.name.replace('[', '-').replace(']', '')}"


@pytest.fixture
def store(url: str) -> Store:
    return Store.open(url, create=True)


def folder(path: Path, **texts: str) -> Path:
    (path / "sub").mkdir(parents=True)
    for name, text in texts.items():
        (path / name).write_text(text)
        (path / "sub" / name).write_text(text)
    return path


def keys(store: Store) -> set[str]:
    """Every object under the store."""
    assert isinstance(store.location, Remote)
    fs, path = store.location.opened()
    return {name.removeprefix(f"{path}/") for name in fs.find(path)}


def refuse(monkeypatch: pytest.MonkeyPatch, store: Store, error: Exception) -> None:
    """Every write fails with ``error``."""
    assert isinstance(store.location, Remote)
    fs, _ = store.location.opened()

    def fail(*args: Any, **options: Any) -> None:
        del args, options
        raise error

    monkeypatch.setattr(fs, "pipe_file", fail)


def test_files_come_back_and_a_store_pickles(store: Store, url: str) -> None:
    store.publish("tables/x", b"\0\1")
    copy = pickle.loads(pickle.dumps(Store.open(f"{url}/")))
    assert copy == store
    assert copy.read("tables/x") == b"\0\1"
    assert [store.exists(key) for key in ("tables/x", "tables", "tables/y")] == [True, False, False]
    assert store.path("tables/x").read_bytes() == b"\0\1"
    assert store.sizes("tables") == {"x": 2}
    assert store.names("nothing") == []
    digest = store.put_input(b"text")
    assert store.read_input(digest) == b"text"
    for attempt in (store.read, store.read_json, store.path):
        with pytest.raises(StoreError, match=r"runs/a/run\.json: not in the store .* run the sweep"):
            attempt("runs/a/run.json")
    for _ in range(2):  # again is a no-op
        store.remove("tables/x")
        assert not store.exists("tables/x")


def test_a_directory_is_replaced_in_one_step_and_nothing_stays(store: Store, tmp_path: Path) -> None:
    key = "runs/0123456789ab/checkpoint"
    store.publish(key, folder(tmp_path / "old", weights="old", more="old"))
    old = store.path(key)
    store.publish(key, folder(tmp_path / "new", weights="new"))
    copy = store.path(key)
    files = sorted(str(file.relative_to(copy)) for file in copy.rglob("*") if file.is_file())
    assert files == ["sub/weights", "weights"]
    assert (store.path(key) / "sub" / "weights").read_text() == "new"
    assert (old / "weights").read_text() == "old", "a copy that somebody reads stays as it was"
    assert len(keys(store)) == 1 + 3, "the marker, two files and their manifest"
    assert store.num_bytes(key) > 6
    store.remove(key)
    assert not store.exists(key)
    assert keys(store) == {"store.json"}


@pytest.mark.parametrize(("point", "content"), [("before_publish", "old"), ("during_publish", "new")])
def test_a_kill_leaves_the_old_directory_or_the_new_one(
    store: Store, url: str, tmp_path: Path, point: str, content: str
) -> None:
    key = "runs/0123456789ab/adapter"
    store.publish(key, folder(tmp_path / "old", weights="old"))
    new = folder(tmp_path / "new", weights="new")
    code = (
        "import pathlib, sys; from engine.store import Store;"
        "Store.open(sys.argv[1]).publish(sys.argv[2], pathlib.Path(sys.argv[3]))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, url, key, str(new)],
        env=os.environ | {ENVIRONMENT_VARIABLE: f"{point}:adapter", "PYTHONPATH": str(PROJECT)},
        timeout=120,
    )
    assert process.returncode == -signal.SIGKILL
    assert (store.path(key) / "weights").read_text() == content
    store.publish(key, folder(tmp_path / "newer", weights="newer"))
    assert (store.path(key) / "weights").read_text() == "newer"


def test_a_reader_whose_files_are_taken_away_reads_the_new_ones(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "runs/0123456789ab/checkpoint"
    old, new = (folder(tmp_path / name, weights=name) for name in ("old", "new"))
    store.publish(key, old)
    read = Remote.read_bytes

    def racing(place: Remote) -> bytes:
        content = read(place)
        if place.name == "MANIFEST.json":
            monkeypatch.setattr(Remote, "read_bytes", read)
            Store(store.location).publish(key, new)
        return content

    monkeypatch.setattr(Remote, "read_bytes", racing)
    assert (store.path(key) / "weights").read_text() == "new"


def test_a_damaged_file_of_a_directory_is_refused(store: Store, tmp_path: Path) -> None:
    store.publish("runs/a/adapter", folder(tmp_path / "source", weights="abc"))
    damaged = next(key for key in keys(store) if key.endswith("/sub/weights"))
    store.publish(damaged, b"ab")
    with pytest.raises(StoreError, match="sub/weights: damaged"):
        store.path("runs/a/adapter")


def test_copies_do_not_heap_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis.remote, "NUM_COPIES", 5)
    monkeypatch.setattr(analysis.remote, "COPIES_BYTES", 6)
    for number in range(8):
        store.publish("vectors/x", f"{number}".encode())
        path = store.path("vectors/x")
        assert path.read_text() == f"{number}"
    assert len(list(path.parents[1].iterdir())) == 5


def test_of_many_that_create_a_key_one_succeeds(store: Store) -> None:
    made: list[bool] = []
    threads = [
        threading.Thread(target=lambda n=n: made.append(store.create("sweeps/x/lease/1.json", f"{n}".encode())))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False] * 5 + [True]


def test_a_lease_keeps_two_drivers_apart(store: Store) -> None:
    with Lease(store, "sweep", lost=pytest.fail):
        with pytest.raises(LeaseHeldError, match=f"process {os.getpid()} on "), Lease(store, "sweep", pytest.fail):
            pass
        assert current_holder(store, "sweep") is not None
    assert current_holder(store, "sweep") is None
    with Lease(store, "sweep", lost=pytest.fail):
        assert "2.json" in store.names("sweeps/sweep/lease")


def test_a_service_without_conditional_writes_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would give one lease to two drivers."""
    assert isinstance(store.location, Remote)
    fs, _ = store.location.opened()
    put = fs.pipe_file
    monkeypatch.setattr(fs, "pipe_file", lambda path, value, **_: put(path, value))
    with pytest.raises(StoreError, match="cannot keep two drivers apart"):
        Store.open(store.location, create=True)


def test_log_lines_of_several_processes_are_joined(store: Store, url: str) -> None:
    store.append_line("runs/a/log.txt", "one")
    code = "import sys; from engine.store import Store; Store.open(sys.argv[1]).append_line('runs/a/log.txt', 'two')"
    subprocess.run([sys.executable, "-c", code, url], check=True, cwd=PROJECT, timeout=120)
    store.append_line("runs/a/log.txt", "three\n")
    assert sorted(store.read_log("runs/a/log.txt").splitlines()) == ["one", "three", "two"]
    assert store.read_log("runs/b/log.txt") == ""


def test_replies_are_found_across_parts_and_read_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.objects, "PART_BYTES", 300)
    log, index = ReplyLog(store), ReplyIndex(store)
    wanted = [f"{number:024x}" for number in range(8)]
    for number, request in enumerate(wanted):
        asyncio.run(log.commit(request, Reply("ok", f"reply {number}")))
        assert set(index.find(wanted)) == set(wanted[: number + 1])
    assert {name: reply.text for name, reply in ReplyIndex(store).find(wanted).items()} == {
        request: f"reply {number}" for number, request in enumerate(wanted)
    }
    sizes = store.sizes("judgements").values()
    assert len(sizes) > 1
    assert max(sizes) <= 300


def test_lines_that_could_not_be_written_are_not_there_later(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    log = ReplyLog(store)
    asyncio.run(log.commit("0" * 24, Reply("ok", "one")))
    with monkeypatch.context() as patch:
        refuse(patch, store, OSError("gone"))
        with pytest.raises(StoreError, match="gone; what was there is untouched"):
            asyncio.run(log.commit("1" * 24, Reply("ok", "two")))
    asyncio.run(log.commit("2" * 24, Reply("ok", "three")))
    assert set(ReplyIndex(store).find(["0" * 24, "1" * 24, "2" * 24])) == {"0" * 24, "2" * 24}


def test_faults_say_what_to_do(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = Store(Remote(f"{bucket}/elsewhere"))
    elsewhere.publish("notes.txt", b"x")
    newer = Remote(f"{bucket}/newer")
    fs, path = newer.opened()
    fs.pipe_file(f"{path}/store.json", b'{"format": 2}')
    expected = {
        "s3://bucket": "give a path in the bucket, such as s3://bucket/results",
        "s3://nobody/results": "no bucket 'nobody'",
        "s3://bucket/elsewhere": r"holds notes\.txt but no store\.json",
        "s3://bucket/newer": "unknown format 2",
        "zz://bucket/x": "Protocol not known: zz",
        "gs://bucket/x": "gcsfs",
    }
    for location, message in expected.items():
        (fault,) = Store.faults(location)
        assert fault.startswith(location)
        with pytest.raises(StoreError, match=message):
            Store.open(location, create=True)
    assert Store.faults(f"{bucket}/new") == []
    with pytest.raises(StoreError, match="there is no store here"):
        Store.open(f"{bucket}/new")
    assert location_of(Path("s3://bucket/results/")) == Remote("s3://bucket/results")
    monkeypatch.setattr(fs, "pipe_file", _refused)
    with pytest.raises(StoreError, match=r"store\.json: refused .*ask for the right"):
        Store.open(f"{bucket}/new", create=True)


def _refused(*args: Any, **options: Any) -> None:
    del args, options
    raise PermissionError("Access Denied")


def test_missing_credentials_are_said() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull, "HOME": os.devnull}
    code = "from engine.store import Store; print(Store.faults('s3://bucket/results'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=PROJECT, capture_output=True, text=True, timeout=120
    )
    assert "no credentials" in done.stdout, done
    assert "AWS_ACCESS_KEY_ID" in done.stdout


@pytest.fixture(scope="module")
def both(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Store]:
    """One finished sweep on a disk and in the bucket."""
    sweep = TinySweep(tmp_path_factory.mktemp("both"), tiny_model_folder(tmp_path_factory))
    on_disk = write_finished(sweep.prepare())
    in_bucket = write_finished(sweep.prepare(f"results={bucket}/both"))
    assert not pending_jobs(sweep.prepare(f"results={bucket}/both"), in_bucket)
    assert not pending_judge_tasks(sweep.prepare(f"results={bucket}/both"), in_bucket)
    return on_disk, in_bucket


def test_every_table_is_the_same_as_on_a_disk(both: tuple[Store, Store]) -> None:
    on_disk, in_bucket = (load(store.sweep("tiny")) for store in both)
    num_rows = 0
    for name in READERS:
        pd.testing.assert_frame_equal(in_bucket.table(name), on_disk.table(name))
        num_rows += len(on_disk.table(name))
    assert num_rows > 20
    assert on_disk.run("none").record == in_bucket.run("none").record


def test_commands_read_a_url(both: tuple[Store, Store]) -> None:
    _, in_bucket = both
    runner = CliRunner()
    place = f"{in_bucket.location}/sweeps/tiny"
    for command in (["table", place, "summary", "--csv"], ["status", place], ["show", place, "none"]):
        done = runner.invoke(app, command)
        assert done.exit_code == 0, done.output
        assert "none" in done.output
    wrong = runner.invoke(app, ["status", f"{in_bucket.location}/sweeps/other"])
    assert isinstance(wrong.exception, StoreError)
    assert "not a sweep (no manifest.json)" in str(wrong.exception)
    assert [item.key for item in find_garbage(in_bucket)] == []
    in_bucket.publish("runs/0123456789ab/run.json", b"{}")
    assert [item.key for item in find_garbage(in_bucket)] == ["runs/0123456789ab"]
    assert find_left_overs(in_bucket) == []
    in_bucket.remove("runs/0123456789ab")
    assert find_garbage(in_bucket) == []


def test_a_sweep_is_fetched_whole(both: tuple[Store, Store], tmp_path: Path) -> None:
    on_disk, _ = both
    run_id = next(entry.run_id for entry in load(on_disk.sweep("tiny")).manifest.runs if entry.kind == "run")
    for store in both:
        store.publish(f"runs/{run_id}/adapter", folder(tmp_path / f"{store is on_disk}", weights="w"))
        store.append_line(f"runs/{run_id}/log.txt", "a line")
    for source in both:
        target = tmp_path / f"copy {source is on_disk}"
        done = CliRunner().invoke(app, ["fetch", str(source.sweep("tiny")), str(target)])
        assert done.exit_code == 0, done.output
        found, wanted = load(target / "sweeps" / "tiny"), load(on_disk.sweep("tiny"))
        for name in READERS:
            pd.testing.assert_frame_equal(found.table(name), wanted.table(name))
        run = found.run(run_id)
        assert run.adapter is not None
        assert (run.adapter / "sub" / "weights").read_text() == "w"
        assert run.log == "a line\n"


def test_a_file_that_is_gone_is_not_found(bucket: str) -> None:
    with pytest.raises(FileNotFoundError):
        local_copy(Remote(f"{bucket}/nothing"))
