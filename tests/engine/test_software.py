"""A trial on another machine must run on the driver's software; else it ends at its start with one message."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from engine.location import MARKER
from engine.software import PACKAGES, ROOT, Software, check_same, software, source_hash
from engine.store import Store
from engine.work import SweepWork
from trainables.errors import ShiftgradError, VersionError

HERE = Software((("shiftgrad", "0.1.0"), ("torch", "2.9")), "aaaa", "one:/place")


def test_the_same_software_on_another_machine_is_fine() -> None:
    check_same(HERE, replace(HERE, place="two:/elsewhere"))


def test_everything_that_differs_is_said_at_once() -> None:
    there = Software((("shiftgrad", "0.2.0"), ("torch", "2.8")), "bbbb", "two:/place")
    with pytest.raises(VersionError) as caught:
        check_same(HERE, there)
    assert str(caught.value).startswith(
        "machine two has shiftgrad 0.2.0 where the driver has 0.1.0; torch 2.8 where the driver has 2.9; "
        "shiftgrad's source bbbb where the driver has aaaa; install the same"
    )
    assert isinstance(caught.value, ShiftgradError), "which the trial reports without a second attempt"


def test_a_file_edited_while_the_sweep_runs_does_not_end_it() -> None:
    check_same(HERE, replace(HERE, source="bbbb"))


def test_this_process_is_described() -> None:
    found = software()
    versions = dict(found.versions)
    assert set(versions) == {"shiftgrad", "python", "torch", "transformers", "peft", "deepspeed"}
    assert all(versions[name].count(".") == 1 for name in versions if name != "shiftgrad")
    assert str(ROOT) in found.place
    check_same(found, pickle.loads(pickle.dumps(found)))


def test_the_source_hash_sees_a_changed_added_or_renamed_file_and_nothing_else(tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        for package in PACKAGES:
            (tmp_path / name / package / "kinds").mkdir(parents=True)
            (tmp_path / name / package / "kinds" / "method.py").write_text("SEMANTICS = 1\n")
        return tmp_path / name

    original = source_hash(copy("same"))
    changed = copy("changed")
    (changed / "trainables" / "kinds" / "method.py").write_text("SEMANTICS = 2\n")
    added = copy("added")
    (added / "analysis" / "own.py").write_text("")
    renamed = copy("renamed")
    (renamed / "engine" / "kinds" / "method.py").rename(renamed / "engine" / "method.py")
    other = copy("other")
    (other / "engine" / "notes.txt").write_text("not code")
    (other / "tests").mkdir()
    (other / "tests" / "test_own.py").write_text("not installed")
    assert len({original, *(source_hash(folder) for folder in (changed, added, renamed))}) == 4
    assert source_hash(other) == original


def test_a_trial_checks_before_it_does_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(str(tmp_path / "results"), create=True)
    work = SweepWork(store=store, jobs={}, device="cpu", threads=1, zero_stage=0, gradient_checkpointing=False)
    with pytest.raises(KeyError):  # it went on to look for the job
        work.run("none such", lambda **_: None)
    store.path(MARKER).unlink()
    driver, other = work.software, replace(work.software, versions=(("shiftgrad", "9.9"),), place="other:/place")
    monkeypatch.setattr("engine.work.software", lambda: other)
    sent = pickle.loads(pickle.dumps(work))
    assert sent.software == driver
    with pytest.raises(VersionError, match=r"machine other has shiftgrad 9\.9 where the driver has"):
        sent.run("none such", lambda **_: None)
