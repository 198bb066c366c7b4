"""The reference: complete, true to the models, and readable."""

from __future__ import annotations

import io
import re
from typing import Annotated, Any, Literal, get_args

import pytest
import typer.main
from pydantic import Field
from rich.console import Console
from typer.testing import CliRunner

from analysis.judges import MetricConfig
from analysis.tables import describe
from engine.cli import app
from engine.reference import REQUIRED, Section, _value, find_sections, sweep_sections, trait_sections
from engine.reference_pages import commands_page, reference_view, sweep_page, tables_page, trait_page
from engine.sweep_models import SweepFile
from trainables.config import Config
from trainables.defenses import Item
from trainables.errors import ConfigError

SECTIONS = (*sweep_sections(), *trait_sections())


def _section(title: str) -> Section:
    (section,) = [one for one in sweep_sections() if one.title == title]
    return section


def _kinds(union: Any) -> set[str]:
    """What the members of a union of configs call themselves."""
    models = get_args(get_args(union)[0])
    return {str(field.default) for model in models for field in model.model_fields.values() if _is_tag(field)}


def _is_tag(field: Any) -> bool:
    return get_args(field.annotation) == (field.default,)


class TestEveryKeyIsDescribed:
    @pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.title or "top")
    def test_by_the_text_under_its_field(self, section: Section) -> None:
        """Write what a field means as a string under it, and what a section is as its model's docstring."""
        undescribed = [key.name for key in section.keys if len(key.meaning) < 10]
        assert not undescribed, f"no text under {', '.join(undescribed)} in the model of {section.title or 'the file'}"
        assert len(section.meaning) > 10, f"no docstring of the model of {section.title or 'the file'}"

    def test_commands_too(self) -> None:
        commands: Any = typer.main.get_command(app)
        silent = [
            f"{name} {parameter.name}"
            for name, command in commands.commands.items()
            for parameter in command.params
            if not parameter.help
        ]
        assert silent == []


class TestSections:
    def test_every_top_level_key_is_there(self) -> None:
        assert [key.name for key in sweep_sections()[0].keys] == list(SweepFile.model_fields)

    def test_every_defense_and_judge_is_there(self) -> None:
        titles = {section.title for section in sweep_sections()}
        assert {f"runs.defense: {kind}" for kind in _kinds(Item)} <= titles
        assert {f"evaluation.metrics.<name>: {kind}" for kind in _kinds(MetricConfig)} <= titles
        assert len(_kinds(Item)) >= 2 <= len(_kinds(MetricConfig))

    def test_a_key_says_what_may_stand_there(self) -> None:
        keys = {key.name: key for key in _section("training").keys}
        assert (keys["epochs"].value, keys["epochs"].default) == ("number, above 0", "`1`")
        assert (keys["learning_rate"].value, keys["learning_rate"].default) == ("number, above 0", REQUIRED)
        assert keys["schedule"].value == "`linear`, `cosine` or `constant`"
        assert (keys["max_steps"].value, keys["max_steps"].default) == ("whole number, at least 1, or null", "`null`")
        assert keys["lora"].sections == ("training.lora",)

    def test_what_a_block_needs_is_not_what_a_cell_needs(self) -> None:
        keys = {key.name: key for key in _section("runs").keys}
        assert [name for name, key in keys.items() if key.default == REQUIRED] == ["defense"]
        assert keys["defense"].sections[0].startswith("runs.defense: ")

    def test_a_key_that_chooses_a_kind_has_to_be_written(self) -> None:
        kind = _section("runs.defense: pps").keys[0]
        assert (kind.name, kind.value, kind.default) == ("kind", "`pps`", REQUIRED)

    def test_vectors_are_told_apart_by_their_key(self) -> None:
        kinds = [section.kind for section in sweep_sections() if section.path == "vectors.<name>"]
        first = ["difference", "random_like", "file", "prompt_difference", "combine", "extract", "mean"]
        assert kinds == [*first, "leading_difference", "contrastive", "logistic"]

    def test_sections_are_told_apart_by_their_titles(self) -> None:
        for sections in (sweep_sections(), trait_sections()):
            assert len({section.title for section in sections}) == len(sections)


class _Inner(Config):
    """An inner one."""


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (str, "text"),
        (bool, "true or false"),
        (int | None, "whole number or null"),
        (Annotated[float, Field(gt=0, le=2)], "number, above 0, at most 2"),
        (Annotated[int, Field(ge=0, lt=2**63)], "whole number, at least 0, below 2^63"),
        (Literal["auto"] | Annotated[int, Field(ge=1)], "`auto` or whole number, at least 1"),
        (Literal[0, 1, 2], "`0`, `1` or `2`"),
        (str | tuple[str, ...], "text or list of texts"),
        (dict[str, _Inner] | None, "mapping or null"),
        (tuple[_Inner, ...], "list of mappings"),
        (str | _Inner, "text or mapping"),
    ],
)
def test_values_in_words(annotation: Any, words: str) -> None:
    assert _value(annotation) == words


def test_a_type_without_words_is_an_error() -> None:
    with pytest.raises(TypeError, match="no words"):
        _value(complex)


class TestFind:
    @pytest.mark.parametrize(
        ("word", "titles"),
        [
            ("training", ["training", "training.lora", "training.watch"]),
            ("lora", ["training.lora"]),
            ("pps", ["runs.defense: pps"]),
            ("warmup_ratio", ["training"]),
            ("training.warmup_ratio", ["training"]),
        ],
    )
    def test_by_path_kind_or_key(self, word: str, titles: list[str]) -> None:
        assert [section.title for section in find_sections(word)] == titles

    def test_a_key_comes_alone(self) -> None:
        (section,) = find_sections("warmup_ratio")
        assert [key.name for key in section.keys] == ["warmup_ratio"]

    def test_an_unknown_word_is_answered_with_the_nearest(self) -> None:
        with pytest.raises(ConfigError, match="did you mean warmup_ratio"):
            find_sections("warmupratio")


class TestPages:
    @pytest.mark.parametrize("page", [sweep_page, trait_page])
    def test_anchors_are_unique_and_links_lead_to_them(self, page: Any) -> None:
        text = page()
        anchors = re.findall(r"\{ #(\S+) \}", text)
        assert len(anchors) == len(set(anchors)) > 10
        assert set(re.findall(r"\]\(#(\S+?)\)", text)) <= set(anchors)

    def test_tables(self) -> None:
        text = tables_page()
        for column in describe():
            assert f"| `{column.name}` |" in text

    def test_commands(self) -> None:
        text = commands_page()
        commands: Any = typer.main.get_command(app)
        for name in commands.commands:
            assert f"\n## `shiftgrad {name}`" in text
        assert "<span" not in text

    def test_in_a_terminal(self) -> None:
        printed = io.StringIO()
        Console(file=printed, width=80).print(reference_view(sweep_sections()))
        lines = printed.getvalue().splitlines()
        assert max(map(len, lines)) <= 80
        assert "`" not in printed.getvalue()
        assert any(line.startswith("learning_rate") and "required" in line for line in lines)

    def test_the_command(self) -> None:
        result = CliRunner().invoke(app, ["reference", "pps"], env={"COLUMNS": "80"})
        assert result.exit_code == 0
        assert "coefficient  number or list of numbers; required" in result.output
