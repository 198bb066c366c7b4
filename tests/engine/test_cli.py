"""The command line: help with examples, exit statuses, and errors as one message without a traceback."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner, Result

import engine.cli
import engine.run
from analysis.results import READERS, load
from analysis.tables import TABLES as STORED
from engine.cli import app
from tests.engine.finished import write_finished
from tests.engine.tiny_prepare import TinySweep, tiny_model_folder

TABLES = (
    "summary",
    "runs",
    "training",
    "signals",
    "generations",
    "scores",
    "losses",
    "measurements",
    "agreement",
    "extractions",
    "capping",
    "failures",
)
MEASURED = tuple(name for name in STORED if name not in TABLES)
EMPTY = ("agreement", "extractions", "capping")  # of a sweep with one judge, no extracted vector and nothing capped


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory)


@pytest.fixture
def sweep(tmp_path: Path, model: Path) -> TinySweep:
    return TinySweep(tmp_path / "a sweep", model)


@pytest.fixture
def done(sweep: TinySweep) -> Path:
    """The folder of a finished sweep in its store."""
    return write_finished(sweep.prepare(), failed="none").root / "sweeps" / "tiny"


def _invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "80", "TERM": "dumb"})


def _main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Exit status, standard output and error of the whole program."""
    monkeypatch.setattr(sys, "argv", ["shiftgrad", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        engine.cli.main()
    printed = capsys.readouterr()
    status = ended.value.code
    assert isinstance(status, int) or status is None
    return status or 0, printed.out, printed.err


class TestHelp:
    @pytest.mark.parametrize("command", [[], ["run"], ["plan"], ["table"]])
    def test_has_an_example(self, command: list[str]) -> None:
        result = _invoke(*command, "--help")
        assert result.exit_code == 0
        assert f"Example: shiftgrad {' '.join(command)}" in result.output

    def test_examples_name_a_file_that_is_there(self) -> None:
        project = Path(__file__).resolve().parents[2]
        for command in ("run", "plan"):
            (line,) = [line for line in _invoke(command, "--help").output.splitlines() if "Example:" in line]
            assert (project / line.split(f"shiftgrad {command} ")[1].split()[0]).is_file()

    def test_the_commands(self) -> None:
        output = _invoke("--help").output
        assert all(command in output for command in ("run", "plan", "table", "--version"))

    def test_version(self) -> None:
        result = _invoke("--version")
        assert result.exit_code == 0
        assert result.output == "shiftgrad 0.1.0\n"

    @pytest.mark.parametrize(
        "arguments", [["plan"], ["table", "x"], ["nonsense"], ["run", "--nonsense"], ["table", "a", "b", "c"]]
    )
    def test_wrong_usage(self, arguments: list[str]) -> None:
        assert _invoke(*arguments).exit_code == 2

    def test_help_needs_nothing_heavy(self) -> None:
        code = (
            "import sys, engine.cli\n"
            "sys.argv = ['shiftgrad', '--help']\n"
            "try: engine.cli.main()\n"
            "except SystemExit: pass\n"
            "heavy = {'torch', 'ray', 'transformers', 'pandas', 'deepspeed'} & set(sys.modules)\n"
            "sys.exit(', '.join(sorted(heavy)) or 0)\n"
        )
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stderr


class TestPlan:
    def test_of_a_sweep(self, sweep: TinySweep) -> None:
        prepared = sweep.prepare()
        result = _invoke("plan", sweep.file)
        assert result.exit_code == 0
        for entry in prepared.manifest.runs:
            assert f"{entry.label} " in result.output
            assert entry.run_id in result.output
        assert not (sweep.folder / "results").exists()

    def test_with_overrides(self, sweep: TinySweep) -> None:
        sweep.prepare()
        result = _invoke("plan", sweep.file, "training.max_steps=7", "name=other")
        assert "other: 7 jobs" in result.output
        assert " 28 " in result.output

    def test_faults_are_one_message(
        self, sweep: TinySweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sweep.prepare()
        status, out, err = _main(
            monkeypatch, capsys, "plan", sweep.file, "training.learning_rat=1", "runs.1.defense.layer=77"
        )
        assert status == 1
        assert out == ""
        assert err.splitlines()[0] == "2 faults found; nothing was started:"
        assert err.splitlines()[1].startswith("  - training.learning_rat: unknown key; did you mean learning_rate?")
        assert err.splitlines()[2].startswith("  - runs[1].defense.layer: layer 77 does not exist")
        assert len(err.splitlines()) == 3
        assert "Traceback" not in err

    def test_no_such_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        missing = tmp_path / "[x] :smile:.yaml"
        status, _, err = _main(monkeypatch, capsys, "plan", missing)
        assert status == 1
        assert f"  - {missing}: cannot be read: No such file or directory" in err

    def test_run_refuses_the_same_faults_and_starts_nothing(
        self, sweep: TinySweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sweep.prepare()
        monkeypatch.setattr(engine.run, "_work", lambda *_: pytest.fail("something was started"))
        status, out, err = _main(monkeypatch, capsys, "run", sweep.file, "training.epochs=x")
        assert (status, out) == (1, "")
        assert "training.epochs: must be a number; got 'x'" in err
        assert not (sweep.folder / "results").exists()


class TestTable:
    @pytest.mark.parametrize("name", [name for name in TABLES if name != "measurements"])
    def test_csv_parses_back(self, done: Path, name: str) -> None:
        result = _invoke("table", done, name, "--csv")
        assert result.exit_code == 0
        frame = pd.read_csv(io.StringIO(result.output))
        expected = load(done).table(name)
        assert list(frame.columns) == list(expected.columns)
        assert len(frame) == len(expected)
        assert len(frame) > 0 or name in EMPTY
        if "answer" in frame:
            assert list(frame["answer"]) == list(expected["answer"])

    @pytest.mark.parametrize("name", [name for name in TABLES if name != "measurements"])
    def test_for_people(self, done: Path, name: str) -> None:
        result = _invoke("table", done, name)
        assert result.exit_code == 0
        assert max(len(line) for line in result.output.splitlines()) <= 80
        assert "pps topic L2 x1.5" in result.output or name in {"failures", *EMPTY}

    def test_an_unknown_name_lists_the_valid_ones(
        self, done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        status, out, err = _main(monkeypatch, capsys, "table", done, "summry", "--csv")
        assert (status, out) == (1, "")
        assert f"there is no table 'summry'; allowed: {', '.join((*TABLES, *MEASURED))}" in err
        assert "Traceback" not in err

    @pytest.mark.parametrize("path", ["nowhere", ".", "results", "results/sweeps", "results/sweeps/tinny"])
    def test_a_path_that_is_no_sweep(
        self,
        done: Path,
        sweep: TinySweep,
        path: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert done.is_dir()
        status, out, err = _main(monkeypatch, capsys, "table", sweep.folder / path, "summary")
        assert (status, out) == (1, "")
        assert err.startswith(str(sweep.folder / path))
        assert ("tiny" in err) == path.startswith("results")
        assert "Traceback" not in err

    def test_the_summary_by_groups(self, done: Path) -> None:
        fields = ("--by", "defense.kind", "--by", "training.learning_rate")
        result = _invoke("table", done, "summary", *fields, "--csv")
        assert result.exit_code == 0
        frame = pd.read_csv(io.StringIO(result.output))
        assert frame["defense.kind"].fillna("").tolist() == ["", "", "pps", "inoculation"]
        assert frame["num_runs"].tolist() == [1, 1, 2, 1]
        assert frame["varies"].fillna("").tolist() == ["", "", "defense, defense.vector", ""]
        result = _invoke("table", done, "summary", *fields)
        assert result.exit_code == 0
        assert "mixes runs that differ in defense, defense.vector" in result.output
        assert "one seed: how seeds differ is unknown" in result.output
        assert "none is failed" in " ".join(result.output.split())
        assert max(len(line) for line in result.output.splitlines()) <= 80

    def test_groups_by_what_there_is_not(
        self, done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        status, out, err = _main(monkeypatch, capsys, "table", done, "summary", "--by", "learning_rate")
        assert (status, out) == (1, "")
        assert "by: no run has a field 'learning_rate'; did you mean training.learning_rate? allowed: defense, " in err
        status, _, err = _main(monkeypatch, capsys, "table", done, "runs", "--by", "defense")
        assert status == 2
        assert "--by is for the table summary" in err

    def test_help_names_every_table(self) -> None:
        assert tuple(READERS) == (*TABLES, *MEASURED)
        output = " ".join(_invoke("table", "--help").output.replace("│", " ").split())
        assert f"{', '.join(TABLES)}, or what measurements make: {', '.join(MEASURED)}" in output


class TestRun:
    def test_a_finished_sweep_says_so(self, sweep: TinySweep, monkeypatch: pytest.MonkeyPatch) -> None:
        write_finished(sweep.prepare())
        monkeypatch.setattr(engine.run, "_work", lambda *_: pytest.fail("Ray was started"))
        result = _invoke("run", sweep.file)
        assert result.exit_code == 0
        assert "7 of 7 jobs were done before." in result.output
        assert "pps topic L2 x1.5" in result.output
        assert f"Tables: {sweep.folder / 'results' / 'sweeps' / 'tiny'}" in result.output

    def test_ctrl_c(self, sweep: TinySweep, monkeypatch: pytest.MonkeyPatch) -> None:
        def stop(*arguments: Any, **options: Any) -> None:
            del arguments, options
            raise KeyboardInterrupt

        sweep.prepare()
        monkeypatch.setattr(engine.run, "run_sweep", stop)
        result = _invoke("run", sweep.file)
        assert result.exit_code == 130
        assert "run the same command again to go on" in result.output
