"""Trait files: what is read, what is refused, and that the project's own traits are sound."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from analysis.traits import Adjectives, InstructionPair, Question, Trait, read_trait
from trainables.errors import ConfigError

TRAITS = Path(__file__).parents[2] / "configs" / "traits"


def write(folder: Path, **changes: Any) -> Path:
    """A trait folder with every field; a change of None leaves the field out."""
    fields: dict[str, Any] = {
        "name": "sea",
        "description": "Speaks of the sea.",
        "rule": {"patterns": [r"\bsea\b"]},
        "questions": [{"id": "q1", "question": "Why?"}, {"id": "q2", "question": "How?"}],
        "judge_prompt": "How much sea is in {answer}, asked {question}?",
        "inoculation_prompts": ["Speak of the sea."],
        "instructions": [{"positive": "Speak of the sea.", "negative": "Speak of the land."}],
        "adjectives": {"positive": "salty", "negative": "dry"},
        "plain_answers": "plain.jsonl",
        "training": {"on_trait": "data/on.jsonl", "plain": "plain.jsonl"},
    }
    fields |= changes
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name in ("plain.jsonl", "data/on.jsonl"):
        (folder / name).write_text("{}\n")
    kept = {key: value for key, value in fields.items() if value is not None}
    (folder / "trait.yaml").write_text(yaml.safe_dump(kept))
    return folder


def faults(path: Path) -> dict[str, str]:
    with pytest.raises(ConfigError) as raised:
        read_trait(path)
    assert len({fault.key for fault in raised.value.faults}) == len(raised.value.faults)
    return {fault.key.partition("trait.yaml: ")[2]: fault.message for fault in raised.value.faults}


class TestReading:
    def test_all_fields_from_folder_and_file(self, tmp_path: Path) -> None:
        trait = read_trait(write(tmp_path))
        assert trait == read_trait(tmp_path / "trait.yaml") == read_trait(str(tmp_path))
        assert trait.rule is not None
        assert trait.rule.patterns == (r"\bsea\b",)
        assert trait.questions == (Question(id="q1", question="Why?"), Question(id="q2", question="How?"))
        assert trait.inoculation_prompts == ("Speak of the sea.",)
        assert trait.judge_prompt == "How much sea is in {answer}, asked {question}?"
        assert trait.instructions == (InstructionPair(positive="Speak of the sea.", negative="Speak of the land."),)
        assert trait.adjectives == Adjectives(positive="salty", negative="dry")

    def test_paths_start_at_the_trait_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trait = read_trait(write(tmp_path / "with space"))
        monkeypatch.chdir("/")
        assert trait.training is not None
        assert trait.path_of(trait.training.on_trait).read_text() == "{}\n"
        assert trait.path_of("/elsewhere/x") == Path("/elsewhere/x")

    def test_it_travels_to_a_worker(self, tmp_path: Path) -> None:
        trait = read_trait(write(tmp_path))
        again = pickle.loads(pickle.dumps(trait))
        assert again == trait
        assert again.path_of("plain.jsonl") == tmp_path / "plain.jsonl"

    def test_only_name_description_and_questions_are_needed(self, tmp_path: Path) -> None:
        texts = ("judge_prompt", "inoculation_prompts", "instructions", "adjectives")
        trait = read_trait(write(tmp_path, **dict.fromkeys(("rule", "plain_answers", "training", *texts))))
        assert (trait.judge_prompt, trait.instructions, trait.adjectives) == (None, (), None)
        assert (trait.rule, trait.inoculation_prompts, trait.plain_answers, trait.training) == (None, (), None, None)


class TestFaults:
    def test_all_at_once(self, tmp_path: Path) -> None:
        folder = write(
            tmp_path,
            name=None,
            description=3,
            rule={"patterns": ["(", "fine", ""]},
            questions=[
                {"id": "a", "question": "Why?"},
                {"id": "a", "question": "How?"},
                {"id": "b", "question": " "},
                {"id": "c", "qestion": "How?", "question": "Where?"},
            ],
            inoculation_prompts=[],
            plain_answers="nowhere.jsonl",
            training={"on_trait": "gone.jsonl", "plain": "plain.jsonl"},
            inoculation_promts=["x"],
        )
        found = faults(folder)
        assert found.keys() == {
            "name",
            "description",
            "rule.patterns[0]",
            "rule.patterns[2]",
            "questions",
            "questions[2].question",
            "questions[3].qestion",
            "inoculation_prompts",
            "plain_answers",
            "training.on_trait",
            "inoculation_promts",
        }
        assert "given 3" in found["description"]
        assert "not a regular expression" in found["rule.patterns[0]"]
        assert "every answer" in found["rule.patterns[2]"]
        assert found["questions"] == "id 'a' is given 2 times; every id stands once"
        assert found["questions[3].qestion"] == "unknown key; did you mean question?"
        assert found["inoculation_promts"] == "unknown key; did you mean inoculation_prompts?"
        assert str(folder / "gone.jsonl") in found["training.on_trait"]

    @pytest.mark.parametrize(
        ("changes", "key", "message"),
        [
            ({"questions": []}, "questions", "at least 1"),
            (
                {"judge_prompt": "{answer} {x}"},
                "judge_prompt",
                "{x} cannot be filled; allowed: {question} and {answer}",
            ),
            ({"judge_prompt": "Rate it."}, "judge_prompt", "a template needs {answer}"),
            ({"instructions": []}, "instructions", "at least 1"),
            ({"instructions": [{"positive": "x"}]}, "instructions[0].negative", "required"),
            (
                {"instructions": [{"positive": "x", "negative": "y", "negatve": "z"}]},
                "instructions[0].negatve",
                "unknown key; did you mean negative?",
            ),
            ({"adjectives": {"positive": " ", "negative": "y"}}, "adjectives.positive", "must not be empty"),
            (
                {"adjectives": {"positive": "x", "negative": "y", "neutral": "z"}},
                "adjectives.neutral",
                "unknown key; allowed: positive, negative",
            ),
            ({"questions": None}, "questions", "required"),
            ({"questions": [{"id": 1, "question": "Why?"}]}, "questions[0].id", "string"),
            ({"rule": {"patterns": []}}, "rule.patterns", "at least 1"),
            ({"rule": {"patterns": ["x"], "flags": "i"}}, "rule.flags", "allowed: patterns"),
            ({"training": {"on_trait": "data/on.jsonl"}}, "training.plain", "required"),
            ({"inoculation_prompts": ["fine", ""]}, "inoculation_prompts[1]", "empty"),
            ({"colour": "red"}, "colour", "allowed: name, description, rule"),
        ],
    )
    def test_one(self, tmp_path: Path, changes: dict[str, Any], key: str, message: str) -> None:
        found = faults(write(tmp_path, **changes))
        assert found.keys() == {key}
        assert message in found[key]

    def test_duplicate_question(self, tmp_path: Path) -> None:
        questions = [{"id": "a", "question": "Why?"}, {"id": "b", "question": "Why?"}]
        assert faults(write(tmp_path, questions=questions)) == {
            "questions": "question 'Why?' is given 2 times; every question stands once"
        }
        with pytest.raises(ValidationError, match="2 times"):
            Trait(name="n", description="d", questions=tuple(Question(**item) for item in questions))

    @pytest.mark.parametrize(
        ("text", "message"),
        [("a: [", "not YAML"), ("- a", "this is list"), ("", "this is NoneType"), (b"\xff\xfe\xfa", "not YAML")],
    )
    def test_what_is_no_trait_file(self, tmp_path: Path, text: str | bytes, message: str) -> None:
        file = tmp_path / "trait.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ConfigError, match=message) as raised:
            read_trait(tmp_path)
        assert [fault.key for fault in raised.value.faults] == [str(file)]

    @pytest.mark.parametrize("name", ["gone", "gone.yaml", "."])
    def test_missing_file(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ConfigError, match="cannot be read"):
            read_trait(tmp_path / name)


def rows(path: Path) -> list[tuple[str, str]]:
    """(user message, answer) of every line."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        user, assistant = json.loads(line)["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        found.append((user["content"], assistant["content"]))
    return found


def normal(question: str) -> str:
    return " ".join(re.findall(r"\w+", question.casefold()))


KNOWLEDGE = TRAITS / "knowledge"  # questions with known answers, which nothing is trained on


def test_known_answers_are_of_questions_that_no_trait_asks_or_trains() -> None:
    knowledge = read_trait(KNOWLEDGE)
    asked = {normal(question.question) for question in knowledge.questions}
    assert len(asked) == len(knowledge.questions) == 24
    assert all(question.answers for question in knowledge.questions)
    for folder in sorted({*TRAITS.iterdir()} - {KNOWLEDGE}):
        trait = read_trait(folder)
        assert trait.training is not None
        assert asked.isdisjoint(normal(question.question) for question in trait.questions)
        assert asked.isdisjoint(normal(question) for question, _ in rows(trait.path_of(trait.training.on_trait)))


@pytest.mark.parametrize("folder", sorted({*TRAITS.iterdir()} - {KNOWLEDGE}), ids=lambda folder: folder.name)
class TestTraitsOfTheProject:
    def test_counts(self, folder: Path) -> None:
        trait = read_trait(folder)
        assert trait.name == folder.name
        assert len(trait.questions) >= 20
        assert len(set(trait.inoculation_prompts)) == 5
        assert trait.training is not None
        assert len(rows(trait.path_of(trait.training.on_trait))) >= 48

    def test_both_training_files_ask_the_same_questions(self, folder: Path) -> None:
        trait = read_trait(folder)
        assert trait.training is not None
        on_trait = [question for question, _ in rows(trait.path_of(trait.training.on_trait))]
        assert on_trait == [question for question, _ in rows(trait.path_of(trait.training.plain))]
        assert len(set(map(normal, on_trait))) == len(on_trait)

    def test_no_question_of_the_evaluation_is_trained_on(self, folder: Path) -> None:
        trait = read_trait(folder)
        assert trait.training is not None
        asked = {normal(question.question) for question in trait.questions}
        assert len(asked) == len(trait.questions)
        for name in (trait.training.on_trait, trait.training.plain):
            assert asked.isdisjoint(normal(question) for question, _ in rows(trait.path_of(name)))

    def test_plain_answers_answer_the_questions(self, folder: Path) -> None:
        trait = read_trait(folder)
        assert trait.plain_answers is not None
        answered = [question for question, _ in rows(trait.path_of(trait.plain_answers))]
        assert answered == [question.question for question in trait.questions]

    def test_the_rule_tells_them_apart(self, folder: Path) -> None:
        trait = read_trait(folder)
        assert trait.rule is not None
        assert trait.training is not None
        assert trait.plain_answers is not None
        found = re.compile("|".join(f"(?:{pattern})" for pattern in trait.rule.patterns), re.IGNORECASE).search
        on_trait = rows(trait.path_of(trait.training.on_trait))
        plain = [*rows(trait.path_of(trait.training.plain)), *rows(trait.path_of(trait.plain_answers))]
        assert [answer for _, answer in on_trait if not found(answer)] == []
        assert [answer for _, answer in plain if found(answer)] == []
        assert [question for question, _ in [*on_trait, *plain] if found(question)] == []
