"""status, show, diff, doctor on a finished sweep, without a model or Ray."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from analysis.results import Results, load
from engine import Sweep
from engine.doctor import Finding, examine
from engine.lease import Lease
from engine.look import diff_view, find_run, show_view, status_view
from engine.machine import read_machine
from engine.prepare import prepare
from engine.progress import make_progress
from engine.run import _Watcher
from engine.store import Store
from tests.engine.finished import write_finished
from tests.engine.tiny_sweep import write_tiny_sweep
from trainables.errors import ConfigError


def text_of(view: RenderableType) -> str:
    file = io.StringIO()
    Console(file=file, width=100).print(view)
    return file.getvalue()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    prepared = prepare(write_tiny_sweep(tmp_path_factory.mktemp("look")), (), read_machine())
    store = write_finished(prepared, failed="none")
    return load(store.root / "sweeps" / "tiny")


def test_a_run_is_found_by_label_and_by_the_beginning_of_its_id(results: Results) -> None:
    none = find_run(results, "none")
    assert none.label == "none"
    assert find_run(results, none.run_id[:6]) == none


@pytest.mark.parametrize("text", ["nonesuch", ""])
def test_an_unknown_run_lists_those_that_there_are(results: Results, text: str) -> None:
    with pytest.raises(ConfigError, match=r"no run is called .*'none' \(\w{12}\)"):
        find_run(results, text)


def test_status_says_how_far_each_run_is_and_who_runs_the_sweep(results: Results) -> None:
    text = text_of(status_view(results))
    assert "nobody runs it now" in text
    assert "failed" in text
    assert text.count("done") >= 3
    with Lease(Store.open(results.root), results.name, lost=lambda who: pytest.fail(who)):
        assert "being run by process" in text_of(status_view(results))


def test_show_has_settings_results_and_answers(results: Results) -> None:
    entry = next(entry for entry in results.manifest.runs if "inoculation" in entry.label)
    text = text_of(show_view(results, entry))
    for part in (entry.run_id, "training.learning_rate", "plain_loss", "first answers", "How are you?"):
        assert part in text


def test_show_works_for_a_run_that_failed(results: Results) -> None:
    assert "failed" in text_of(show_view(results, find_run(results, "none")))


def test_diff_shows_just_the_settings_that_differ(results: Results) -> None:
    one, other = (entry for entry in results.manifest.runs if entry.label.startswith("pps"))
    settings, outcome = text_of(diff_view(results, one, other)).split("results")
    assert "defense.vector" in settings
    assert "learning_rate" not in settings
    assert "trait" in outcome


def test_doctor_reports_what_fails_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.doctor._ray", lambda: "not started in this test")
    blocked = tmp_path / "a file"
    blocked.write_text("")
    findings = {finding.name: finding for finding in examine(str(blocked))}
    assert isinstance(findings["store"], Finding)
    assert not findings["store"].ok
    assert str(blocked) in findings["store"].detail
    assert all(finding.ok for name, finding in findings.items() if name != "store")
    assert "torch" in findings["versions"].detail


def test_a_sweep_from_python_is_the_sweep_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: Results
) -> None:
    asked = []

    def run_sweep(path: Path, overrides: tuple[str, ...], *, address: str | None) -> object:
        asked.append((path, overrides, address))
        return type("Outcome", (), {"results": results})

    monkeypatch.setattr("engine.run.run_sweep", run_sweep)
    path = write_tiny_sweep(tmp_path)
    assert Sweep.from_yaml(path, "training.max_steps=1").run() is results
    assert asked == [(path, ("training.max_steps=1",), None)]


def test_a_run_that_fails_after_its_training_is_reported_with_the_reason(tmp_path: Path) -> None:
    prepared = prepare(write_tiny_sweep(tmp_path), (), read_machine())
    store = write_finished(prepared)
    entries = [entry for entry in prepared.manifest.runs if entry.label in ("base", "none")]
    watcher = _Watcher(prepared, store, make_progress(Console(file=io.StringIO())))
    for entry in entries:
        store.remove(f"tables/generations/{entry.sample_id}.parquet")
        watcher.failed(entry.run_id, "out of memory in sampling")
    found = load(store.root / "sweeps" / "tiny")
    runs = found.runs().set_index("run")
    assert runs.loc[["base", "none"], "status"].tolist() == ["failed", "failed"]
    assert runs.loc[["base", "none"], "reason"].tolist() == ["out of memory in sampling"] * 2
    failures = found.failures()
    assert failures["run"].tolist() == ["base", "none"]
    assert failures["task"].tolist() == ["sample", "sample"]
