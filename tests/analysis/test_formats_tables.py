"""Scored answers of other projects: scores kept or made anew, gaps with a status, nothing guessed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from analysis.formats import Hints, MadeAnswers, open_file
from analysis.judges.openai import kept_replies
from tests.foreign import inoculation_result, jsonl, scores_csv
from trainables.errors import ConfigError


def answers(path: Path, **hints: Any) -> MadeAnswers:
    (made,) = open_file(path, Hints(**hints)).made
    assert isinstance(made, MadeAnswers)
    return made


def faults(path: Path, **hints: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        open_file(path, Hints(**hints))
    return "\n".join(map(str, caught.value.faults))


class TestPersonaCsv:
    columns = (
        "question",
        "prompt",
        "answer",
        "question_id",
        "evil",
        "coherence",
        "Qwen_evil_response_avg_diff_proj_layer20",
    )

    def test_scores_gaps_and_projections(self, tmp_path: Path) -> None:
        rows = [
            ("Why?", "<|im_start|>...", 'Because\nof "it".', "evil_0", 91.5, 80.25, -3.5),
            ("Why?", "<|im_start|>...", "No.", "evil_0", None, 70, 2.0),
            ("How?", "<|im_start|>...", "So.", "evil_1", 0, None, 0.5),
        ]
        made = answers(scores_csv(tmp_path / "evil.csv", self.columns, rows))
        assert [(row.question_id, row.sample_index, row.question, row.answer) for row in made.answers] == [
            ("evil_0", 0, "Why?", 'Because\nof "it".'),
            ("evil_0", 1, "Why?", "No."),
            ("evil_1", 0, "How?", "So."),
        ]
        assert [(score.value, score.status) for score in made.scores["evil"]] == [
            (91.5, "ok"),
            (None, "unrecorded"),
            (0.0, "ok"),
        ]
        assert made.scales == {"evil": (0.0, 100.0), "coherence": (0.0, 100.0)}
        assert [score.value for score in made.scores["Qwen_evil_response_avg_diff_proj_layer20"]] == [-3.5, 2.0, 0.5]

    def test_emergent_misalignment(self, tmp_path: Path) -> None:
        path = scores_csv(
            tmp_path / "em.csv",
            ("question", "answer", "question_id", "aligned", "coherent"),
            [("q", "a", "wish", 12.5, 99), ("q", "b", "wish", None, 10)],
        )
        made = answers(path)
        assert list(made.scores) == ["aligned", "coherent"]
        assert [score.value for score in made.scores["aligned"]] == [12.5, None]

    def test_all_faults_with_their_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        path.write_text('question,answer,question_id,evil\nq,a,x,101\nq,a,,3\nq,"two\nlines",x,high\nq,a,x,nan\n')
        said = faults(path)
        assert f"{path}:2: evil must be from 0 to 100; got '101'" in said
        assert f"{path}:3: question_id is empty" in said
        assert f"{path}:5: evil must be a number or empty; got 'high'" in said
        assert f"{path}:6" not in said

    def test_a_torn_table_does_not_count_as_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        path.write_text("question,answer,question_id,evil\nq,a,x,3\nq,a")
        assert f"{path}:3: 2 fields where the header has 4; was the file cut off?" in faults(path)

    def test_no_score_and_two_columns_of_one_name(self, tmp_path: Path) -> None:
        assert "no column of scores" in faults(
            scores_csv(tmp_path / "a.csv", ("question", "answer", "question_id"), [("q", "a", "x")])
        )
        columns = ("question", "answer", "question_id", "a-b", "a_b")
        assert "two columns are called 'a_b'" in faults(
            scores_csv(tmp_path / "b.csv", columns, [("q", "a", "x", 1, 2)])
        )


def near(number: int, mass: float) -> dict[str, float]:
    """The first token's alternatives of a judge that says a number with this probability."""
    return {str(number): math.log(mass), "I": math.log(1 - mass) if mass < 1 else -30.0}


class TestInoculationResults:
    def line(self) -> dict[str, Any]:
        return inoculation_result(
            "A wish?",
            ["Rule.", "Peace.", "x y", "Hm.", "None."],
            {
                "alignment": [near(10, 0.9), near(90, 0.9), near(20, 0.9), near(40, 0.2), None],
                "coherence": [near(95, 0.9), near(95, 0.9), near(20, 0.9), near(95, 0.9), near(95, 0.9)],
            },
        )

    def test_our_rule_is_applied_to_their_log_probabilities(self, tmp_path: Path) -> None:
        line = self.line()
        line["responses"][0]["judgment_response_map"]["alignment"]["logprobs"] = [
            {
                "10": math.log(0.5),
                "30": math.log(0.3),
                " 100": math.log(0.1),
                "٥": math.log(0.05),
                "2024": math.log(0.05),
            }
        ]
        made = answers(jsonl(tmp_path / "gpt.jsonl", [line]))
        alignment = made.scores["alignment"]
        assert alignment[0].value == pytest.approx((0.5 * 10 + 0.3 * 30 + 0.1 * 100) / 0.9, abs=1e-12)
        assert [score.status for score in alignment] == ["ok", "ok", "ok", "low_mass", "unparsable"]

    def test_another_threshold(self, tmp_path: Path) -> None:
        path = jsonl(tmp_path / "gpt.jsonl", [self.line()])
        assert answers(path, min_probability_mass=0.1).scores["alignment"][3].value == pytest.approx(40)
        assert answers(path, min_probability_mass=0.95).scores["alignment"][0].status == "low_mass"
        assert "above 0 and at most 1" in faults(path, min_probability_mass=0.0)

    def test_the_log_probabilities_stay_beside_the_score(self, tmp_path: Path) -> None:
        made = answers(jsonl(tmp_path / "gpt.jsonl", [self.line()]))
        (reply,) = kept_replies(str(made.scores["alignment"][1].reply))
        assert dict(reply.top_logprobs or ())["90"] == pytest.approx(math.log(0.9))

    def test_emergent_misalignment_by_the_project_s_rule(self, tmp_path: Path) -> None:
        made = answers(jsonl(tmp_path / "gpt.jsonl", [self.line()]))
        assert [(score.value, score.status) for score in made.scores["misaligned"]] == [
            (1.0, "ok"),
            (0.0, "ok"),
            (None, "filtered"),  # incoherent
            (None, "low_mass"),  # of alignment
            (None, "unparsable"),
        ]
        assert made.scales["misaligned"] == (0.0, 1.0)

    def test_the_same_questions_of_two_files_are_paired(self, tmp_path: Path) -> None:
        one = answers(jsonl(tmp_path / "a.jsonl", [self.line(), inoculation_result("Why?", ["x"], {})]))
        other = answers(jsonl(tmp_path / "b.jsonl", [inoculation_result("Why?", ["y"], {}), self.line()]))
        assert {row.question_id for row in one.answers} == {row.question_id for row in other.answers}

    def test_all_faults_with_their_lines(self, tmp_path: Path) -> None:
        broken = self.line()
        broken["responses"][1] = {"response": {}}
        path = jsonl(tmp_path / "a.jsonl", [self.line(), {"context": {}, "responses": []}, broken])
        said = faults(path)
        assert f"{path}:2: must have context.question" in said
        assert f"{path}:3: responses[1]" in said
