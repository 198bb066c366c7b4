"""The command line where less than the whole is asked for: ``--only``, ``--smoke``, and ``init`` to begin with."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import engine.cli
import engine.run
from analysis.results import load
from engine.cli import app
from engine.ray_session import RaySession
from tests.engine.finished import write_outputs
from tests.engine.tiny_prepare import TinySweep, tiny_model_folder

PPS, RANDOM = "pps topic L2 x1.5", "pps random L2 x1.5"
ALL = ["none", PPS, RANDOM, "inoculation topic"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory)


@pytest.fixture
def sweep(tmp_path: Path, model: Path) -> TinySweep:
    made = TinySweep(tmp_path / "a sweep", model)
    made.prepare()
    return made


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Labels of the jobs of every time that work began, which is done without Ray or a model here."""
    begun: list[list[str]] = []

    def work(prepared: Any, store: Any, jobs: Any, unjudged: Any, *rest: Any) -> None:
        del prepared, rest
        begun.append([job.label for job in jobs.values()])
        write_outputs(store, jobs.values(), unjudged.values())

    monkeypatch.setattr(engine.run, "_work", work)
    monkeypatch.setattr(RaySession, "start", lambda *_: None)
    monkeypatch.setattr(engine.run, "publish_report", lambda *_: None)  # figures take seconds
    return begun


def _invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "80", "TERM": "dumb"})


def _statuses(store: Path) -> dict[str, str]:
    summary = load(store / "sweeps" / "tiny").summary()
    return dict(zip(summary["run"], summary["status"], strict=True))


class TestOnly:
    def test_does_a_part_and_the_plain_command_the_rest(self, sweep: TinySweep, worked: list[list[str]]) -> None:
        result = _invoke("run", sweep.file, "--only", "defense.vector == 'random'")
        assert result.exit_code == 0, result.output
        assert worked == [["vector topic", "vector random", "base", RANDOM]]
        missing = {label: "missing" for label in ALL}
        assert _statuses(sweep.folder / "results") == missing | {"base": "done", RANDOM: "done"}
        rest = f"3 of 4 runs were not asked for (--only). All: shiftgrad run {shlex.quote(str(sweep.file))}\n"
        assert rest in result.output

        result = _invoke("run", sweep.file)
        assert result.exit_code == 0, result.output
        assert worked[1:] == [["none", PPS, "inoculation topic"]]
        assert "4 of 7 jobs were done before." in result.output
        assert "--only" not in result.output
        assert set(_statuses(sweep.folder / "results").values()) == {"done"}

    def test_again_does_nothing(self, sweep: TinySweep, worked: list[list[str]]) -> None:
        assert _invoke("run", sweep.file, "--only", "none").exit_code == 0
        result = _invoke("run", sweep.file, "--only", "none")
        assert result.exit_code == 0
        assert worked == [["base", "none"]]
        assert "2 of 2 jobs were done before." in result.output

    def test_says_the_whole_command(self, sweep: TinySweep, worked: list[list[str]]) -> None:
        result = _invoke(
            "run", sweep.file, "--only", "'none'", "training.max_steps=1", "evaluation.system_prompt=Be brief."
        )
        expected = (
            f"shiftgrad run {shlex.quote(str(sweep.file))} training.max_steps=1 'evaluation.system_prompt=Be brief.'\n"
        )
        assert expected in result.output
        assert len(worked) == 1
        record = json.loads((sweep.folder / "results" / "sweeps" / "tiny" / "provenance.json").read_text())
        assert record["arguments"][2:] == [
            "training.max_steps=1",
            "evaluation.system_prompt=Be brief.",
            "--only",
            "'none'",
        ]

    def test_a_failure_of_what_is_asked_for_is_partial_success(
        self, sweep: TinySweep, monkeypatch: pytest.MonkeyPatch, worked: list[list[str]]
    ) -> None:
        def work(prepared: Any, store: Any, jobs: Any, unjudged: Any, watcher: Any, *rest: Any) -> None:
            del prepared, store, unjudged, rest
            watcher.failed(list(jobs)[-1], "it broke")

        monkeypatch.setattr(engine.run, "_work", work)
        result = _invoke("run", sweep.file, "--only", "none", "--smoke")
        assert result.exit_code == 3
        assert "it broke" in result.output
        assert "3 of 4 runs were not asked for" in result.output
        assert "This was a smoke run" in result.output
        assert not worked

    @pytest.mark.parametrize("command", ["run", "plan"])
    def test_faults(
        self,
        sweep: TinySweep,
        command: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        worked: list[list[str]],
    ) -> None:
        arguments = ["shiftgrad", command, str(sweep.file), "--only", "sed == 0 or seed == 'x'"]
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as ended:
            engine.cli.main()
        printed = capsys.readouterr()
        assert ended.value.code == 1
        assert printed.out == ""
        lines = printed.err.splitlines()
        assert lines[0] == "2 faults found; nothing was started:"
        assert lines[1].startswith("  - --only: no column sed (a text is written in quotes); did you mean seed?")
        assert lines[2].startswith("  - --only: seed == 'x': seed is a number, 'x' is text")
        assert len(lines) == 3
        assert not worked
        assert not (sweep.folder / "results").exists()

    def test_plan_shows_what_run_would_do(self, sweep: TinySweep, worked: list[list[str]]) -> None:
        output = _invoke("plan", sweep.file, "--only", "random").output
        assert "tiny: 4 jobs" in output
        assert RANDOM in output
        assert PPS not in output
        assert "3 of 4 runs not asked for (--only)" in output
        total = next(line for line in output.splitlines() if line.startswith("all "))
        assert total.split()[1:] == [
            "2",
            *next(line for line in output.splitlines() if RANDOM in line).split()[-3:-2],
            "16",
            "32",
        ]
        _invoke("run", sweep.file, "--only", "random")
        output = _invoke("plan", sweep.file, "--only", "random").output
        assert " no " not in output
        assert " no " in _invoke("plan", sweep.file).output
        assert len(worked) == 1


class TestSmoke:
    def test_goes_to_a_store_of_its_own(self, sweep: TinySweep, worked: list[list[str]]) -> None:
        result = _invoke("run", sweep.file, "training.epochs=3", "--smoke")
        assert result.exit_code == 0, result.output
        assert worked == [["vector topic", "vector random", "base", *ALL]]
        store = sweep.folder / "results-smoke"
        assert set(_statuses(store).values()) == {"done"}
        assert not (sweep.folder / "results").exists()
        assert f"Tables: {store}/sweeps/tiny" in result.output
        assert "This was a smoke run (at most 2 optimizer steps per training, 2 questions, one answer" in result.output
        assert result.output.endswith(f"The real one: shiftgrad run {shlex.quote(str(sweep.file))} training.epochs=3\n")
        record = json.loads((store / "sweeps" / "tiny" / "provenance.json").read_text())
        assert record["arguments"] == ["run", "sweep.yaml", "training.epochs=3", "--smoke"]

        result = _invoke("run", sweep.file, "training.epochs=3", "--smoke")
        assert "To prove everything anew, remove this store first." in result.output
        assert len(worked) == 1

        assert _invoke("run", sweep.file).exit_code == 0
        assert worked[1:] == [["vector topic", "vector random", "base", *ALL]], "nothing of it counts for the real one"

    def test_twins_are_both_in_the_tables(self, sweep: TinySweep, worked: list[list[str]]) -> None:
        overrides = ["training.max_steps=null", "axes={training.epochs: {grid: [1, 2]}}"]
        result = _invoke("run", sweep.file, *overrides, "--smoke", "--only", "defense == 'none'")
        assert result.exit_code == 0, result.output
        assert worked == [["base", "none epochs=1.0"]]
        results = load(sweep.folder / "results-smoke" / "sweeps" / "tiny")
        summary = results.summary().set_index("run")
        twins = ["none epochs=1.0", "none epochs=2.0"]
        assert set(summary.loc[twins, "status"]) == {"done"}
        assert summary.loc[twins, "trait"].nunique(dropna=False) == 1
        assert results.training().groupby("run").size().to_dict() == dict.fromkeys(twins, 2)
        assert "The real one: shiftgrad run" in result.output
        assert "--only 'defense == '\"'\"'none'\"'\"''" in result.output

    def test_plan_shows_what_run_would_do(self, sweep: TinySweep, worked: list[list[str]]) -> None:
        output = _invoke("plan", sweep.file, "--smoke").output
        assert "tiny (smoke): 7 jobs" in output
        assert "results-smoke" in "".join(output.split())
        total = next(line for line in output.splitlines() if line.startswith("all "))
        assert total.split()[-2:] == ["10", "20"]
        assert not worked


class TestInit:
    def test_says_what_it_wrote_and_what_comes_next(self, tmp_path: Path) -> None:
        target = tmp_path / "my study"
        result = _invoke("init", target, "--name", "mine")
        assert result.exit_code == 0, result.output
        written = {str(path) for path in target.rglob("*") if path.is_file()}
        assert {line.strip() for line in result.output.splitlines() if line.startswith("  /")} == written
        assert f"Next: shiftgrad plan '{target}/sweep.yaml'\n" in result.output
        assert f"shiftgrad run '{target}/sweep.yaml' --smoke\n" in result.output

    def test_refuses_with_the_files_that_are_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "sweep.yaml").write_text("mine")
        monkeypatch.setattr("sys.argv", ["shiftgrad", "init", str(tmp_path)])
        with pytest.raises(SystemExit) as ended:
            engine.cli.main()
        assert ended.value.code == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("1 fault found; nothing was written:\n")
        assert f"{tmp_path}/sweep.yaml: is there already and is not overwritten" in printed.err
        assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]

    def test_needs_a_folder(self) -> None:
        assert _invoke("init").exit_code == 2


@pytest.mark.parametrize("command", ["run", "plan", "init"])
def test_help(command: str) -> None:
    output = " ".join(_invoke(command, "--help").output.replace("│", " ").split())
    assert f"Example: shiftgrad {command}" in output
    assert all(option in output for option in (["--name"] if command == "init" else ["--only", "--smoke"]))
