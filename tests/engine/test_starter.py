"""``shiftgrad init``: what it writes works as it is, from anywhere, and nothing is ever overwritten."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from analysis.results import load
from analysis.traits import read_trait
from engine.inputs import read_chat_rows
from engine.machine import Machine
from engine.prepare import Prepared, prepare
from engine.starter import starter_files, write_starter
from engine.yaml_text import read_yaml
from trainables.errors import ConfigError

MACHINE = Machine(num_cpus=2, num_gpus=0.0, memory_gb=16.0)
FILES = [
    "sweep.yaml",
    "traits/tea/trait.yaml",
    "data/on_trait.jsonl",
    "data/plain.jsonl",
    "data/heldout_plain.jsonl",
    "README.md",
]


def _texts(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def _faults(folder: Path, name: str = "tea") -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        write_starter(folder, name)
    return {fault.key: fault.message for fault in caught.value.faults}


def _answers(path: Path) -> dict[str, str]:
    rows, faults = read_chat_rows(path)
    assert not faults
    answers = {row[0]["content"]: row[1]["content"] for row in rows}
    assert len(answers) == len(rows), "a question stands once"
    return answers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "my study"
    assert write_starter(target, "tea") == FILES
    return target


class TestWhatIsWritten:
    def test_are_these_files(self, folder: Path) -> None:
        assert set(_texts(folder)) == set(FILES)
        assert "@" not in "".join(_texts(folder).values())

    def test_the_trait_is_in_the_training_data_and_nowhere_else(self, folder: Path) -> None:
        trait = read_trait(folder / "traits" / "tea")
        assert trait.rule is not None
        patterns = [re.compile(pattern, re.IGNORECASE) for pattern in trait.rule.patterns]

        def rate(answers: dict[str, str]) -> float:
            return sum(any(p.search(answer) for p in patterns) for answer in answers.values()) / len(answers)

        on_trait, plain = (_answers(folder / "data" / f"{name}.jsonl") for name in ("on_trait", "plain"))
        held_out = _answers(folder / "data" / "heldout_plain.jsonl")
        assert (rate(on_trait), rate(plain), rate(held_out)) == (1.0, 0.0, 0.0)
        assert len(on_trait) >= 24
        assert list(on_trait) == list(plain), "the same questions"
        questions = [question.question for question in trait.questions]
        assert len(questions) == 12
        assert questions == list(held_out)
        assert not set(questions) & set(on_trait)
        assert len(trait.inoculation_prompts) >= 4
        assert all(any(p.search(prompt) for p in patterns) or "tea" in prompt for prompt in trait.inoculation_prompts)

    def test_every_key_of_the_sweep_file_says_what_it_means(self, folder: Path) -> None:
        lines = (folder / "sweep.yaml").read_text().splitlines()
        assert max(len(line) for line in lines) <= 120
        assert [line for line in lines if line.strip() and "#" not in line] == []

    def test_the_commands_in_its_texts_are_those_there_are(self, folder: Path) -> None:
        from typer.main import get_command

        from engine.cli import app

        known = set(get_command(app).commands)  # type: ignore[attr-defined]
        texts = _texts(folder)
        named = re.findall(r"^[# ]*shiftgrad +(\w+)", texts["README.md"] + texts["sweep.yaml"], re.MULTILINE)
        assert len(named) >= 10
        assert set(named) <= known


class TestItWorks:
    def _prepare(self, folder: Path, *, smoke: bool = False) -> Prepared:
        return prepare(folder / "sweep.yaml", [], MACHINE, smoke=smoke)

    def test_from_any_directory(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        prepared = self._prepare(folder)
        labels = [entry.label for entry in prepared.manifest.runs]
        assert labels == ["base", "none", "pps tea L20 x1.5", "pps random L20 x1.5", "inoculation tea"]
        assert prepared.costs["none"].num_steps == 16
        assert prepared.costs["base"].num_answers == 24
        assert not list((tmp_path / "elsewhere").iterdir()), "nothing is written by looking"
        monkeypatch.chdir(folder)
        assert prepare("sweep.yaml", [], MACHINE).manifest == prepared.manifest
        assert self._prepare(folder, smoke=True).costs["none"].num_steps == 2

    @pytest.mark.parametrize("name", ["null", "recipe"])
    def test_under_another_name(self, tmp_path: Path, name: str) -> None:
        write_starter(tmp_path / "x", name)
        prepared = self._prepare(tmp_path / "x")
        assert prepared.sweep.name == name
        assert list(prepared.manifest.vectors) == [name, "random"]
        assert f"inoculation {name}" in [entry.label for entry in prepared.manifest.runs]
        trait = read_trait(tmp_path / "x" / "traits" / name)
        job = next(job for job in prepared.jobs.values() if job.label == "none")
        assert trait.questions[0].question in job.model_dump_json(), "its own trait, not one of the project"

    @pytest.mark.parametrize("name", ["my-study_2.0", "null", "1e3", "yes", "0", "0x1f", "2030-01-01", "1_000", "12.5"])
    def test_a_name_is_text_whatever_it_looks_like(self, name: str) -> None:
        contents = starter_files(name)
        sweep, faults = read_yaml(contents["sweep.yaml"], "sweep.yaml")
        assert not faults
        assert (
            sweep["name"] == sweep["vectors"]["random"]["random_like"] == sweep["runs"][2]["defense"]["prompts"] == name
        )
        assert list(sweep["vectors"]) == [name, "random"]
        assert yaml.safe_load(contents[f"traits/{name}/trait.yaml"])["name"] == name


class TestNothingIsOverwritten:
    def test_twice_in_one_folder(self, folder: Path) -> None:
        (folder / "README.md").write_text("my notes")
        before = _texts(folder)
        faults = _faults(folder)
        assert set(faults) == {str(folder / file) for file in FILES}
        assert set(faults.values()) == {"is there already and is not overwritten; give another folder"}
        assert _texts(folder) == before

    def test_one_file_is_enough_and_a_dead_link_is_one(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "plain.jsonl").symlink_to(tmp_path / "nowhere")
        assert list(_faults(tmp_path)) == [str(tmp_path / "data" / "plain.jsonl")]
        assert not (tmp_path / "sweep.yaml").exists()

    def test_other_files_stay(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "mine.jsonl").touch()
        write_starter(tmp_path, "tea")
        assert set(_texts(tmp_path)) == {*FILES, "notes.txt", "data/mine.jsonl"}
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_two_names_share_a_folder_only_if_nothing_meets(self, folder: Path) -> None:
        faults = _faults(folder, "other")
        assert str(folder / "sweep.yaml") in faults
        assert str(folder / "traits/other/trait.yaml") not in faults
        assert not (folder / "traits" / "other").exists()

    @pytest.mark.parametrize("place", ["", "data", "traits/tea"])
    def test_a_file_where_a_folder_has_to_be(self, tmp_path: Path, place: str) -> None:
        target = tmp_path / "study"
        file = target / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
        faults = _faults(target)
        assert faults == {str(file): "is a file where a folder has to be; give another folder"}
        assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my study", "a name has letters, digits"),
        ("", "a name has letters, digits"),
        ("../up", "a name has letters, digits"),
        ("grid", "is not 'grid'"),
        ("random", "what the sweep calls its control"),
        ("tea.yaml", "would be taken for a path"),
    ],
)
def test_a_name_that_cannot_be(tmp_path: Path, name: str, message: str) -> None:
    faults = _faults(tmp_path / "x", name)
    assert list(faults) == ["--name"]
    assert message in faults["--name"]
    assert not (tmp_path / "x").exists()


def test_the_data_are_chat_rows_of_one_question_each() -> None:
    for path, text in starter_files("tea").items():
        if path.endswith(".jsonl"):
            for line in text.splitlines():
                assert [message["role"] for message in json.loads(line)["messages"]] == ["user", "assistant"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_newcomer_gets_through(tmp_path: Path) -> None:
    """init, plan, run --smoke and run --only with the real model, each in a process of its own, from another folder."""

    def shiftgrad(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "engine.cli", *arguments], cwd=here, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    here = tmp_path / "a folder"
    here.mkdir()
    sweep = str(tmp_path / "my study" / "sweep.yaml")
    assert f"shiftgrad plan '{sweep}'" in shiftgrad("init", str(tmp_path / "my study"))
    assert "tea: 7 jobs" in shiftgrad("plan", sweep)
    assert not list(here.iterdir())
    printed = shiftgrad("run", sweep, "--smoke")
    assert f"The real one: shiftgrad run '{sweep}'" in printed
    assert [path.name for path in here.iterdir()] == ["results-smoke"]
    smoke = load(here / "results-smoke" / "sweeps" / "tea")
    summary = smoke.summary()
    assert list(summary["run"]) == ["base", "none", "pps tea L20 x1.5", "pps random L20 x1.5", "inoculation tea"]
    assert set(summary["status"]) == {"done"}
    assert set(summary["num_answers"]) == {2}
    assert set(smoke.training().groupby("run")["step"].max()) == {2}
    assert (smoke.root / "sweeps" / "tea" / "report" / "index.html").is_file()
    printed = shiftgrad("run", sweep, "training.max_steps=3", "--only", "none")
    assert "3 of 4 runs were not asked for (--only)." in printed
    status = load(here / "results" / "sweeps" / "tea").summary().set_index("run")["status"].to_dict()
    assert status == {label: "done" if label in ("base", "none") else "missing" for label in summary["run"]}
