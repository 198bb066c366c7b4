"""status, show, diff, doctor on a finished sweep, without a model or Ray."""

from __future__ import annotations

import datetime
import io
import re
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from analysis.manifest import log_key
from analysis.results import Results, load
from engine import Sweep
from engine.doctor import Finding, examine
from engine.lease import Lease
from engine.look import diff_view, find_run, show_view, status_view
from engine.machine import read_machine
from engine.prepare import prepare
from engine.progress import make_progress
from engine.run import write_sweep
from engine.store import Store
from engine.watching import SweepWatcher
from tests.engine.finished import write_finished
from tests.engine.tiny_sweep import write_tiny_sweep
from trainables.errors import ConfigError


def text_of(view: RenderableType, width: int = 100) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(view)
    return file.getvalue()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    prepared = prepare(write_tiny_sweep(tmp_path_factory.mktemp("look")), (), read_machine())
    store = write_finished(prepared, failed="none")
    return load(store.root / "sweeps" / "tiny")


@pytest.fixture
def begun(tmp_path: Path) -> Results:
    """A sweep of which nothing is done yet."""
    prepared = prepare(write_tiny_sweep(tmp_path), (), read_machine())
    store = Store.open(prepared.sweep.results, create=True)
    write_sweep(prepared, store)
    return load(store.root / "sweeps" / "tiny")


def test_a_run_is_found_by_label_and_by_the_beginning_of_its_id(results: Results) -> None:
    none = find_run(results, "none")
    assert none.label == "none"
    assert find_run(results, none.run_id[:6]) == none


@pytest.mark.parametrize("text", ["nonesuch", ""])
def test_an_unknown_run_lists_those_that_there_are(results: Results, text: str) -> None:
    with pytest.raises(ConfigError, match=r"(?s)no run is called .*\n +'none' \(\w{12}\)"):
        find_run(results, text)


def test_status_says_how_far_each_run_is_and_who_runs_the_sweep(results: Results) -> None:
    text = text_of(status_view(results))
    assert "nobody runs it now\n4 done, 1 failed\nvectors: random (done), topic (done)" in text
    assert "TrainingError: run x, step 2" in text
    with Lease(Store.open(results.root), results.name, lost=lambda who: pytest.fail(who)):
        assert "being run by process" in text_of(status_view(results))


def test_status_of_a_sweep_that_has_just_begun(begun: Results) -> None:
    text = text_of(status_view(begun))
    assert "nobody runs it now\n5 missing\nvectors: random (missing), topic (missing)" in text
    assert "ago" not in text, "nothing has a log yet"


def test_status_tells_running_from_waiting_and_from_stopped(begun: Results) -> None:
    """Of two runs with a log, one was begun under an earlier driver."""
    store = Store.open(begun.root)
    one, other, *_ = (entry.run_id for entry in begun.manifest.runs if entry.kind == "run")
    store.append_line(log_key(one), "2020-01-01T00:00:00+00:00 step 1/2 loss [5]")
    store.append_line(log_key(other), "not a line of ours")
    assert "5 missing" in text_of(status_view(begun))
    with Lease(store, begun.name, lost=lambda who: pytest.fail(who)):
        assert "5 missing" in text_of(status_view(begun))
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        store.append_line(log_key(one), f"{now} step 2/2 loss [4]")
        text = text_of(status_view(begun))
    assert "4 missing, 1 running" in text
    (line,) = [line for line in text.splitlines() if one in line]
    assert re.search(r"running +step 2/2 loss \[4\] \(\d+s ago\)", line)
    (line,) = [line for line in text.splitlines() if other in line]
    assert line.rstrip().endswith("not a line of ours")


def test_show_has_settings_results_and_answers(results: Results) -> None:
    entry = next(entry for entry in results.manifest.runs if "inoculation" in entry.label)
    text = text_of(show_view(results, entry))
    for part in (entry.run_id, "training.learning_rate", "plain loss", "first answers", "How are you?"):
        assert part in text
    (line,) = [line for line in text.splitlines() if line.startswith("trait")]
    assert re.match(r"trait +0\.50 +0\.20 to 0\.80 +8", line)
    assert "num_questions" not in text, "names of columns are for tables"


@pytest.mark.parametrize("width", [80, 200])
def test_what_is_shown_fits(results: Results, begun: Results, width: int) -> None:
    for found in (results, begun):
        first, second, *_ = found.manifest.runs
        for view in (status_view(found), show_view(found, second), diff_view(found, first, second)):
            lines = text_of(view, width).splitlines()
            assert max(len(line) for line in lines) <= width
            assert not any("…" in line for line in lines), "nothing is cut off"


def test_show_of_a_run_that_failed_and_of_one_that_has_not_begun(results: Results, begun: Results) -> None:
    text = text_of(show_view(results, find_run(results, "none")))
    assert "): failed\nTrainingError: run x, step 2: the loss is [nan]\n" in text
    assert "nothing was measured yet" in text
    assert "nothing was measured yet" in text_of(show_view(begun, find_run(begun, "none")))


def test_diff_shows_just_the_settings_that_differ(results: Results) -> None:
    one, other = (entry for entry in results.manifest.runs if entry.label.startswith("pps"))
    settings, outcome = text_of(diff_view(results, one, other)).split("results")
    assert "defense.vector" in settings
    assert "learning_rate" not in settings
    assert re.search(r"trait +0\.50 +0\.50 *\n +0\.20 to 0\.80 +0\.20 to 0\.80", outcome)
    assert text_of(diff_view(results, one, one)).startswith("no setting differs\n")


def test_diff_with_a_run_without_results_leaves_its_side_empty(results: Results) -> None:
    outcome = text_of(diff_view(results, find_run(results, "none"), find_run(results, "base"))).split("results")[1]
    assert re.search(r"status +failed +done", outcome)
    assert re.search(r"trait +– +0\.50", outcome)


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

    def run_sweep(path: Path, overrides: tuple[str, ...], **options: object) -> object:
        asked.append((path, overrides, options))
        return type("Outcome", (), {"results": results})

    monkeypatch.setattr("engine.run.run_sweep", run_sweep)
    path = write_tiny_sweep(tmp_path)
    assert Sweep.from_yaml(path, "training.max_steps=1").run() is results
    nothing_said = {"address": None, "only": None, "smoke": False}
    assert asked.pop() == (path, ("training.max_steps=1",), nothing_said)
    Sweep.from_yaml(path).run("auto", only="pps", smoke=True)
    assert asked == [(path, (), {"address": "auto", "only": "pps", "smoke": True})]


def test_a_run_that_fails_after_its_training_is_reported_with_the_reason(tmp_path: Path) -> None:
    prepared = prepare(write_tiny_sweep(tmp_path), (), read_machine())
    store = write_finished(prepared)
    entries = [entry for entry in prepared.manifest.runs if entry.label in ("base", "none")]
    watcher = SweepWatcher(prepared, store, make_progress(Console(file=io.StringIO())))
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
