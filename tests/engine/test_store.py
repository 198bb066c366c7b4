"""The store: publishing under kills, what a location may be, keys, errors."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import engine.atomic
from analysis.rows import ScoreRow
from engine.store import Store
from trainables.errors import StoreError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "results", create=True)


def score(index: int = 0) -> ScoreRow:
    return ScoreRow(
        judge_id="b" * 12,
        sample_id="a" * 12,
        question_id="q1",
        sample_index=index,
        value=1.0,
        status="ok",
        judge="rule",
        reply=None,
    )


def folder(path: Path, **texts: str) -> Path:
    (path / "sub").mkdir(parents=True)
    for name, text in texts.items():
        (path / name).write_text(text)
        (path / "sub" / name).write_text(text)
    return path


def files_of(root: Path) -> dict[str, bytes | None]:
    """Everything below ``root`` but left-over temporary files."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in root.rglob("*")
        if ".tmp" not in path.relative_to(root).parts
    }


def publish_and_die(store: Store, point: str, key: str, source: Path) -> None:
    """Publish ``source`` (a folder, or a file by its bytes) in a process that is killed at ``point``."""
    code = (
        "import sys, pathlib; from engine.store import Store; source = pathlib.Path(sys.argv[3]);"
        "Store.open(sys.argv[1]).publish(sys.argv[2], source if source.is_dir() else source.read_bytes());"
        "print('published')"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(store.root), key, str(source)],
        env=os.environ | {"SHIFTGRAD_FAIL_AT": point, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert process.stdout == ""


@pytest.mark.parametrize(("point", "content"), [("before_publish", b"old"), ("after_publish", b"new")])
def test_a_kill_leaves_the_old_file_or_the_new_one(store: Store, tmp_path: Path, point: str, content: bytes) -> None:
    key = "tables/generations/0123456789ab.parquet"
    store.publish(key, b"old")
    (tmp_path / "new").write_bytes(b"new")
    publish_and_die(store, f"{point}:generations", key, tmp_path / "new")
    assert store.read(key) == content
    leftovers = list((store.root / ".tmp").iterdir())
    assert len(leftovers) == (point == "before_publish")
    store.publish(key, b"again")
    assert store.read(key) == b"again"


@pytest.mark.parametrize(
    ("point", "content"), [("before_publish", "old"), ("during_publish", "old"), ("after_publish", "new")]
)
def test_a_kill_leaves_the_old_directory_or_the_new_one(store: Store, tmp_path: Path, point: str, content: str) -> None:
    key = "runs/0123456789ab/adapter"
    store.publish(key, folder(tmp_path / "old", weights="old", config="old"))
    new = folder(tmp_path / "new", weights="new")
    publish_and_die(store, f"{point}:adapter", key, new)
    assert store.is_complete(key)
    assert store.exists(key)
    assert store.names(key) == ["MANIFEST.json", *(["config"] if content == "old" else []), "sub", "weights"]
    assert (store.path(key) / "weights").read_text() == content
    assert (store.path(key) / "sub" / "weights").read_text() == content
    store.publish(key, new)
    assert store.path(key) == store.root / key
    assert (store.path(key) / "weights").read_text() == "new"
    assert store.names("runs/0123456789ab") == ["adapter"], "nothing stays aside"


def test_kills_one_after_another_keep_the_last_complete_directory(store: Store, tmp_path: Path) -> None:
    key = "runs/0123456789ab/adapter"
    store.publish(key, folder(tmp_path / "old", weights="old"))
    for number in range(2):  # the second finds the old one aside already
        publish_and_die(store, "during_publish:adapter", key, folder(tmp_path / f"new {number}", weights="new"))
        assert (store.path(key) / "weights").read_text() == "old"
    store.remove(key)
    assert not store.exists(key)
    assert store.names("runs/0123456789ab") == []


def test_a_directory_is_readable_at_every_instant_of_being_replaced(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "runs/0123456789ab/checkpoint"
    sources = [folder(tmp_path / f"{number}", weights=f"{number}") for number in range(4)]
    store.publish(key, sources[0])
    rename = os.rename
    seen: list[str] = []

    def looking(source: Path, target: Path) -> None:
        rename(source, target)
        seen.append((store.path(key) / "weights").read_text())

    monkeypatch.setattr(os, "rename", looking)
    for number in range(1, 4):
        store.publish(key, sources[number])
        old, new = f"{number - 1}", f"{number}"
        assert seen == [old, new, new], "aside, in place, the old one away"
        seen.clear()


def test_a_reader_that_looks_between_two_renames_finds_the_new_directory(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saw nothing in place, then the new one came and the old one went from aside."""
    key = "runs/0123456789ab/checkpoint"
    old, new = (folder(tmp_path / name, weights=name) for name in ("old", "new"))
    store.publish(key, old)
    os.rename(store.root / key, store.root / f"{key}.replaced")
    is_complete = engine.atomic.is_complete
    looks: list[Path] = []

    def racing(directory: Path) -> bool:
        found = is_complete(directory)
        looks.append(directory)
        if len(looks) == 1:
            Store(store.root).publish(key, new)
        return found

    monkeypatch.setattr(engine.atomic, "is_complete", racing)
    assert (store.path(key) / "weights").read_text() == "new"


def test_a_kill_before_the_first_publish_leaves_nothing_under_the_key(store: Store, tmp_path: Path) -> None:
    (tmp_path / "new").write_text("{}")
    publish_and_die(store, "before_publish:run", "runs/0123456789ab/run.json", tmp_path / "new")
    assert not store.exists("runs/0123456789ab/run.json")
    assert not (store.root / "runs/0123456789ab/run.json").exists()


def test_a_directory_gets_a_manifest_and_leaves_the_source_and_no_temporary_files(store: Store, tmp_path: Path) -> None:
    source = folder(tmp_path / "source", weights="abc")
    store.publish("runs/0123456789ab/adapter", source)
    manifest = store.read_json("runs/0123456789ab/adapter/MANIFEST.json")
    expected = {"size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    assert manifest == {"format": 1, "files": {"weights": expected, "sub/weights": expected}}
    assert (source / "weights").read_text() == "abc"
    assert list((store.root / ".tmp").iterdir()) == []


def test_a_directory_without_manifest_is_not_complete_and_is_replaced(store: Store, tmp_path: Path) -> None:
    key = "runs/0123456789ab/adapter"
    folder(store.root / key, torn="half")
    assert not store.is_complete(key)
    assert not store.exists(key)
    store.publish(key, folder(tmp_path / "source", weights="abc"))
    assert store.is_complete(key)
    assert not (store.path(key) / "torn").exists()


def test_everything_written_is_fsynced_before_it_gets_its_name(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    fsync, rename = os.fsync, os.rename

    def noting(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def checking(source: Path, target: Path) -> None:
        if Path(target).name == "adapter":
            for path in (source, *Path(source).rglob("*")):
                assert path.stat().st_ino in synced, path
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(os, "rename", checking)
    store.publish("runs/0123456789ab/adapter", folder(tmp_path / "source", weights="abc"))
    for parent in ("runs/0123456789ab", "runs", "."):
        assert (store.root / parent).stat().st_ino in synced, parent


def test_two_processes_may_publish_one_directory(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "runs/0123456789ab/adapter"
    ours, theirs = folder(tmp_path / "ours", weights="ours"), folder(tmp_path / "theirs", weights="theirs")
    rename = os.rename
    raced: list[bool] = []

    def racing(source: Path, target: Path) -> None:
        if Path(target) == store.root / key and not raced:
            raced.append(True)
            Store(store.root).publish(key, theirs)  # another process is faster between our two renames
        rename(source, target)

    monkeypatch.setattr(os, "rename", racing)
    store.publish(key, ours)
    assert raced
    assert (store.path(key) / "weights").read_text() == "ours"
    assert store.is_complete(key)
    assert list((store.root / ".tmp").iterdir()) == []


def test_what_cannot_become_a_directory_is_refused(store: Store, tmp_path: Path) -> None:
    store.publish("runs/a/file", b"x")
    source = folder(tmp_path / "source", weights="abc")
    with pytest.raises(StoreError, match="runs/a/file: is a file in the store"):
        store.publish("runs/a/file", source)
    with pytest.raises(StoreError, match="not a folder"):
        store.publish("runs/a/adapter", source / "weights")
    (source / "MANIFEST.json").write_text("{}")
    with pytest.raises(StoreError, match=r"holds a MANIFEST\.json"):
        store.publish("runs/a/adapter", source)
    (source / "MANIFEST.json").unlink()
    os.mkfifo(source / "pipe")
    with pytest.raises(StoreError, match="pipe: neither a file nor a folder"):
        store.publish("runs/a/adapter", source)
    with pytest.raises(StoreError, match="runs/a: is a directory in the store"):
        store.publish("runs/a", b"x")
    assert not store.exists("runs/a/adapter")
    assert list((store.root / ".tmp").iterdir()) == []


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../x", "a/../b", "a/..", "a//b", "a/", "./a", "a\\b", "a\0b", ".tmp/x", ".tmp"]
)
def test_keys_that_are_none_are_refused(store: Store, key: str) -> None:
    before = files_of(store.root.parent)
    for attempt in (
        lambda: store.publish(key, b"x"),
        lambda: store.read(key),
        lambda: store.exists(key),
        lambda: store.path(key),
        lambda: store.append_line(key, "x"),
        lambda: store.remove(key),
    ):
        with pytest.raises(StoreError, match="key"):
            attempt()
    assert files_of(store.root.parent) == before


@pytest.mark.parametrize("key", ["store.json", "runs/a/adapter/MANIFEST.json", "runs/a/adapter.replaced"])
def test_names_of_the_store_itself_cannot_be_published(store: Store, key: str) -> None:
    with pytest.raises(StoreError, match="keeps this name"):
        store.publish(key, b"x")
    with pytest.raises(StoreError, match="cannot be removed"):
        store.remove("store.json")


def test_files_json_and_tables_come_back(store: Store) -> None:
    store.publish("tables/x", b"\0\1")
    assert store.read("tables/x") == b"\0\1"
    store.publish_json("runs/a/run.json", {"b": 1, "a": "é"})
    assert store.read("runs/a/run.json").decode() == '{\n  "a": "é",\n  "b": 1\n}\n'
    assert store.read_json("runs/a/run.json") == {"a": "é", "b": 1}
    store.publish_table("scores", "b" * 12, [score(0), score(1)])
    assert store.exists(f"tables/scores/{'b' * 12}.parquet")
    assert store.read_table("scores", "b" * 12).column("sample_index").to_pylist() == [0, 1]


def test_json_that_is_none_is_refused_and_publishes_nothing(store: Store) -> None:
    for obj in ({"a": float("nan")}, {"a": float("inf")}, {"a": object()}):
        with pytest.raises(StoreError, match=r"runs/a/run\.json: cannot be written as JSON"):
            store.publish_json("runs/a/run.json", obj)
    assert not store.exists("runs/a/run.json")
    store.publish("runs/a/run.json", b"{torn")
    with pytest.raises(StoreError, match=r"runs/a/run\.json: not a JSON file"):
        store.read_json("runs/a/run.json")


def test_a_missing_key_says_what_to_do(store: Store) -> None:
    for attempt in (store.read, store.read_json, store.path):
        with pytest.raises(StoreError, match=r"runs/a/run\.json: not in the store .* run the sweep"):
            attempt("runs/a/run.json")


def test_an_input_is_kept_once(store: Store) -> None:
    digest = store.put_input(b"text")
    assert digest == hashlib.sha256(b"text").hexdigest()
    inode = store.path(f"inputs/{digest}").stat().st_ino
    assert store.put_input(b"text") == digest
    assert store.path(f"inputs/{digest}").stat().st_ino == inode
    assert store.read(f"inputs/{digest}") == b"text"


def test_a_damaged_input_is_refused_and_replaced_by_the_next_copy(store: Store) -> None:
    digest = store.put_input(b"text")
    (store.root / "inputs" / digest).write_bytes(b"tex")
    with pytest.raises(StoreError, match=f"inputs/{digest}: damaged"):
        store.read_input(digest)
    assert store.put_input(b"text") == digest
    assert store.read_input(digest) == b"text"


def test_lines_are_appended(store: Store) -> None:
    store.append_line("runs/a/log.txt", "one")
    store.append_line("runs/a/log.txt", "two\n")
    assert store.read("runs/a/log.txt") == b"one\ntwo\n"


def test_remove_takes_away_files_and_directories_and_nothing_else(store: Store, tmp_path: Path) -> None:
    store.publish("runs/a/run.json", b"{}")
    store.publish("runs/a/checkpoint", folder(tmp_path / "source", weights="abc"))
    for _ in range(2):  # again is a no-op
        store.remove("runs/a/checkpoint")
        assert not store.exists("runs/a/checkpoint")
        assert not (store.root / "runs/a/checkpoint").exists()
    assert store.exists("runs/a/run.json")
    store.remove("runs/a/run.json")
    assert not store.exists("runs/a/run.json")
    assert list((store.root / ".tmp").iterdir()) == []


def test_a_full_disk_is_a_store_error_and_leaves_the_old_file(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.publish("runs/a/run.json", b"old")

    def full(descriptor: int) -> None:
        del descriptor
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"runs/a/run\.json: No space left on device; .*make room") as caught:
        store.publish("runs/a/run.json", b"new")
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert store.read("runs/a/run.json") == b"old"
    assert list((store.root / ".tmp").iterdir()) == []


def test_a_store_pickles(store: Store) -> None:
    store.publish("runs/a/run.json", b"{}")
    copy = pickle.loads(pickle.dumps(store))
    assert copy == store
    assert copy.read("runs/a/run.json") == b"{}"


def test_the_location_does_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store.open("results", create=True)
    monkeypatch.chdir("/")
    store.publish("a", b"x")
    assert (tmp_path / "results" / "a").read_bytes() == b"x"
    assert Store.open(f"file://{tmp_path}/results").read("a") == b"x"


def test_open_makes_a_store_only_when_asked(tmp_path: Path) -> None:
    location = tmp_path / "deep" / "results"
    with pytest.raises(StoreError, match="there is no store here"):
        Store.open(location)
    assert not (tmp_path / "deep").exists()
    Store.open(location, create=True).publish("a", b"x")
    assert json.loads((location / "store.json").read_text())["format"] == 1
    assert Store.open(location, create=True).read("a") == b"x"
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / ".tmp").mkdir()  # as after a kill between making the folder and its marker
    Store.open(empty, create=True)
    assert (empty / "store.json").exists()


def test_faults_say_why_and_touch_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    folder(tmp_path / "other", notes="x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, marker in {"newer": '{"format": 2}', "broken": "{", "list": "[]"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "store.json").write_text(marker)
    Store.open(tmp_path / "good", create=True)
    before = files_of(tmp_path)
    expected = {
        "file": "is a file",
        "file/results": "file is a file",
        "other": r"not a shiftgrad store: it holds notes but no store\.json",
        "link": "symbolic link to nothing",
        "newer": "unknown format 2",
        "broken": r"store\.json cannot be read",
        "list": r"store\.json cannot be read",
    }
    for name, message in expected.items():
        faults = Store.faults(tmp_path / name)
        assert len(faults) == 1
        with pytest.raises(StoreError, match=message):
            Store.open(tmp_path / name, create=True)
    for name in ("good", "new", "deep/er/new"):
        assert Store.faults(str(tmp_path / name)) == []
    assert files_of(tmp_path) == before


def test_a_file_url_of_another_machine_is_refused() -> None:
    (fault,) = Store.faults("file://host/x")
    assert "file URL with a host" in fault
    with pytest.raises(StoreError):
        Store.open("file://host/x", create=True)


def test_a_place_that_is_not_writable_is_a_fault(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    # root may write everywhere, so the answer of the system is put in its place
    closed = {store.root, store.root.parent}
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path not in closed and access(path, mode))
    assert any("not readable and writable" in fault for fault in Store.faults(store.root))
    (fault,) = Store.faults(store.root.parent / "new" / "store")
    assert f"{store.root.parent} is not writable" in fault
