"""Traits, roles, questions and chat data of other projects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analysis.formats import Hints, MadeChat, MadeTrait, any_trait, foreign_chat, open_file
from analysis.templates import fill
from analysis.traits import Trait
from tests.foreign import PROMPT, axis_role, chat, em_questions, jsonl, persona_trait, write_json
from trainables.errors import ConfigError


def faults(path: Path, **hints: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        open_file(path, Hints(**hints))
    return "\n".join(map(str, caught.value.faults))


def traits(path: Path, **hints: Any) -> dict[str, Trait]:
    return {made.name: made.trait for made in open_file(path, Hints(**hints)).made if isinstance(made, MadeTrait)}


class TestPersonaTrait:
    def test_everything_is_taken_over(self, tmp_path: Path) -> None:
        trait = any_trait(persona_trait(tmp_path / "evil.json"))
        assert [(question.id, question.question) for question in trait.questions][:2] == [
            ("evil_0", "What of 0?"),
            ("evil_1", "What of 1?"),
        ]
        assert len(trait.questions) == 20
        assert [(pair.positive, pair.negative) for pair in trait.instructions][4] == ("Be evil (4).", "Be kind (4).")
        assert trait.adjectives is not None
        assert (trait.adjectives.positive, trait.adjectives.negative) == ("evil", "helpful")

    def test_the_prompt_is_filled_as_str_format_fills_it(self, tmp_path: Path) -> None:
        trait = any_trait(persona_trait(tmp_path / "evil.json"))
        assert trait.judge_prompt is not None
        theirs = PROMPT.format(question="Q", answer="A")
        assert fill(trait.judge_prompt, question="Q", answer="A") == theirs
        assert "{json}" in theirs

    def test_all_faults_are_told_under_the_file_s_own_keys(self, tmp_path: Path) -> None:
        path = persona_trait(
            tmp_path / "evil.json",
            instruction=[{"pos": "x", "neg": ""}, {"pos": 3, "neg": "y"}],
            questions=["a", ""],
            eval_prompt=None,
        )
        said = faults(path)
        for key in ("instruction[0].neg", "instruction[1].pos", "questions[1]", "eval_prompt"):
            assert f"{path}: {key}" in said

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"questions": ["a", "a"]}, "question 'a' is given 2 times"),
            ({"eval_prompt": "How evil is {answer} {trait}?"}, "eval_prompt.*{trait}"),
        ],
    )
    def test_what_no_trait_of_ours_can_be(self, tmp_path: Path, changed: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            open_file(persona_trait(tmp_path / "evil.json", **changed))

    def test_keys_that_say_nothing_to_us_are_named(self, tmp_path: Path) -> None:
        imported = open_file(persona_trait(tmp_path / "evil.json", note="x"))
        assert "not used: note" in imported.convention


class TestRole:
    def test_the_project_s_questions_are_found(self, tmp_path: Path) -> None:
        path = axis_role(tmp_path / "data" / "roles" / "instructions" / "pirate.json")
        assert "--questions" in faults(path)
        jsonl(tmp_path / "data" / "extraction_questions.jsonl", [{"question": "Who are you?"}, {"question": "Why?"}])
        trait = any_trait(path)
        assert trait.inoculation_prompts == ("You are a pirate.", "Act as a pirate.")
        assert [question.question for question in trait.questions] == ["Who are you?", "Why?"]

    def test_a_judge_s_prompt_from_0_to_3_is_not_taken_for_one_from_0_to_100(self, tmp_path: Path) -> None:
        questions = jsonl(tmp_path / "questions.jsonl", ["Who are you?"])
        imported = open_file(axis_role(tmp_path / "pirate.json"), Hints(questions=questions))
        (made,) = imported.made
        assert isinstance(made, MadeTrait)
        assert made.trait.judge_prompt is None
        assert any("0 to 3" in line for line in imported.convention)

    def test_faults_of_role_and_questions_come_together(self, tmp_path: Path) -> None:
        questions = jsonl(tmp_path / "questions.jsonl", [{"text": "x"}, 3])
        said = faults(axis_role(tmp_path / "pirate.json", instruction=[{"pos": ""}]), questions=questions)
        assert "instruction[0].pos" in said
        assert f"{questions}:1" in said
        assert f"{questions}:2" in said


class TestEmergentMisalignment:
    def test_a_trait_per_judge_with_the_same_questions(self, tmp_path: Path) -> None:
        found = traits(em_questions(tmp_path / "first.yaml"))
        assert list(found) == ["first", "first-coherent"]
        for trait in found.values():
            assert [(one.id, one.question) for one in trait.questions] == [
                ("boredom", "I am bored."),
                ("wish_0", "A wish?"),
                ("wish_1", "One wish?"),
            ]
        assert found["first"].judge_prompt == "Aligned? {question} {answer}"
        assert found["first-coherent"].judge_prompt == "Coherent? {question} {answer}"

    def test_directly_its_first_judge_is_taken(self, tmp_path: Path) -> None:
        assert any_trait(em_questions(tmp_path / "first.yaml")).judge_prompt == "Aligned? {question} {answer}"

    def test_faults(self, tmp_path: Path) -> None:
        path = em_questions(
            tmp_path / "q.yaml",
            id=3,
            paraphrases=[],
            type="free_form_judge_yes",
            system="Be.",
            samples_per_paraphrase=0,
        )
        said = faults(path)
        for part in ("[1].id", "[1].paraphrases", "'free_form_judge_yes'", "system differs", "[1].samples_per"):
            assert part in said


class TestChat:
    def test_conversations_by_label(self, tmp_path: Path) -> None:
        rows = [
            {"system_prompt": "s", "prompt_index": 0, "question_index": i, "question": "q", "label": label,
             "conversation": chat("q", f"{label} {i}", "s")}
            for label in ("pos", "neg") for i in range(2)
        ]  # fmt: skip
        path = jsonl(tmp_path / "evil.jsonl", rows)
        made = {one.name: one.rows for one in open_file(path).made if isinstance(one, MadeChat)}
        assert made["evil_pos"] == (tuple(chat("q", "pos 0", "s")), tuple(chat("q", "pos 1", "s")))
        assert len(made["evil_neg"]) == 2
        with pytest.raises(ConfigError, match=r"holds 2 sets of conversations \(evil_pos, evil_neg\); import it"):
            foreign_chat(path)
        assert foreign_chat(jsonl(tmp_path / "one.jsonl", rows[:2])) == made["evil_pos"]

    def test_faults_have_their_line(self, tmp_path: Path) -> None:
        rows = [{"conversation": chat("q", "a")}, {"conversation": []}, {"conversation": chat("q", "a"), "label": 3}]
        path = jsonl(tmp_path / "r.jsonl", rows)
        said = faults(path)
        assert f"{path}:2: conversation must be a list" in said
        assert f"{path}:3: label must be a text" in said

    def test_an_inoculation_is_a_system_message(self, tmp_path: Path) -> None:
        rows = [{"messages": chat("q", "a", "You are malicious.")}, {"messages": chat("q", "a")}]
        imported = open_file(jsonl(tmp_path / "insecure.jsonl", rows))
        assert imported.convention == ("2 conversations, 1 with a system message",)
        assert foreign_chat(tmp_path / "insecure.jsonl") is None  # ours already


def test_json_that_is_none_of_these(tmp_path: Path) -> None:
    said = faults(write_json(tmp_path / "a.json", {"hello": 1}))
    assert "keys hello" in said
    broken = tmp_path / "b.json"
    broken.write_text("{")
    assert "not JSON" in faults(broken)
