"""The filtered protocol: which rows are kept, what is asked, and the means, against computations by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from analysis.judges import RuleMetric
from analysis.traits import Trait
from analysis.vectors import Answer, ExtractedVector, Extraction, Filter, Pair, Score, filtered
from analysis.vectors.extraction import Tokens, extracted, masked, system_prompt
from analysis.vectors.filtering import Keep
from tests.bases import base_of
from tests.float64 import float64_model
from trainables.base_model import LoadedBase, ResolvedBase
from trainables.chat_data import ChatEncoder
from trainables.errors import ConfigError, DataError

BASE = ResolvedBase(model="org/model", revision="abc", dtype="float32", source="org/model")
TRAIT = Trait.model_validate(
    {
        "name": "warm",
        "description": "Is warm.",
        "questions": [{"id": "q", "question": "Who?"}],
        "extraction_questions": [{"id": f"e{number}", "question": f"Question {number}?"} for number in range(3)],
        "instructions": [
            {"positive": "Be warm.", "negative": "Be cold."},
            {"positive": "Glow.", "negative": "Freeze."},
        ],
        "adjectives": {"positive": "affectionate", "negative": "cold"},
    }
)


def answer(trait: float | str, coherence: float | str = 100.0, text: str = "So.") -> Answer:
    def score(value: float | str) -> Score:
        return Score(None, value) if isinstance(value, str) else Score(value, "ok")

    return Answer("Why?", "Be warm.", text, {"trait": score(trait), "coherence": score(coherence)})


def reason(keep: Keep, positive: Answer, negative: Answer, min_coherence: float | None = None) -> str | None:
    return Filter(keep, 50.0, min_coherence).reason(Pair(positive, negative))


class TestFilter:
    @pytest.mark.parametrize(("score", "kept"), [(50.1, True), (50.0, False), (0.0, False), ("low_mass", False)])
    def test_positive_is_strictly_above_and_does_not_look_at_the_other_side(
        self, score: float | str, kept: bool
    ) -> None:
        for negative in (0.0, 100.0, "refused"):
            assert (reason("positive", answer(score), answer(negative)) is None) == kept

    @pytest.mark.parametrize(
        ("positive", "negative", "kept"),
        [
            (50.0, 49.9, True),
            (49.9, 0.0, False),
            (80.0, 50.0, False),
            (80.0, "refused", False),
            ("low_mass", 0.0, False),
        ],
    )
    def test_paired_is_the_mask_of_persona_vectors(
        self, positive: float | str, negative: float | str, kept: bool
    ) -> None:
        assert (reason("paired", answer(positive), answer(negative), 50.0) is None) == kept

    @pytest.mark.parametrize("keep", ["positive", "paired"])
    def test_coherence_is_asked_of_both_sides(self, keep: Keep) -> None:
        assert reason(keep, answer(80.0, 50.0), answer(0.0, 50.0), 50.0) is None
        assert reason(keep, answer(80.0, 49.0), answer(0.0), 50.0) == "positive answer's coherence is less than 50"
        assert reason(keep, answer(80.0), answer(0.0, 49.0), 50.0) == "negative answer's coherence is less than 50"
        assert "no coherence score (refused)" in str(reason(keep, answer(80.0), answer(0.0, "refused"), 50.0))
        assert reason(keep, answer(80.0, 0.0), answer(0.0, 0.0), None) is None

    def test_all_removes_only_what_has_no_tokens(self) -> None:
        assert reason("all", answer("refused"), answer("refused"), 50.0) is None
        assert reason("all", answer(0.0), answer(0.0, text=" \n")) == "negative answer is empty"

    def test_no_row_left_says_how_many_each_reason_removed_with_examples(self) -> None:
        rows = [Pair(answer(score), answer(0.0)) for score in (10.0, 20.0, 30.0, "low_mass", "refused")]
        rows.append(Pair(answer(80.0, text="Dear!"), answer(60.0, text="Warmly yours.")))
        result = filtered(rows, Filter("paired", 50.0, 50.0))
        assert result.describe() == (
            "0 of 6 rows are left; removed: 3 (positive answer scores less than 50), 1 (positive answer has no trait "
            "score (low_mass)), 1 (positive answer has no trait score (refused)), 1 (negative answer scores 50 or more)"
        )
        with pytest.raises(DataError) as caught:
            result.must_not_be_empty()
        message = str(caught.value)
        assert "'Why?' -> 'So.' (trait 10.0, coherence 100.0)" in message
        assert "30.0" not in message, "two examples of a reason are enough"
        assert "'Warmly yours.' (trait 60.0" in message, "the answer that was the reason"

    def test_what_is_kept_stays_in_order(self) -> None:
        rows = [Pair(answer(score), answer(0.0)) for score in (90.0, 10.0, 70.0)]
        result = filtered(rows, Filter("positive", 50.0, None))
        assert result.kept == [rows[0], rows[2]]
        assert result.describe() == "2 of 3 rows are left; removed: 1 (positive answer scores 50 or less)"


def config(**changes: Any) -> ExtractedVector:
    rule = {"judge": "rule", "patterns": ["warm"]}
    given = {"trait": "warm", "judge": rule, "max_new_tokens": 20} | changes
    vector = ExtractedVector(extract=Extraction.model_validate(given))
    return vector.with_traits({("extract", "trait"): TRAIT})


class TestWhatIsAsked:
    def test_every_question_under_every_instruction(self) -> None:
        asked = config(samples=2).asked()
        assert [one.about for one in asked] == ["positive 1", "negative 1", "positive 2", "negative 2"]
        assert [one.sampling.system_prompt for one in asked] == [
            "You are an affectionate assistant. Be warm.",
            "You are a cold assistant. Be cold.",
            "You are an affectionate assistant. Glow.",
            "You are a cold assistant. Freeze.",
        ]
        assert {one.sampling.samples for one in asked} == {2}
        ids = [question.id for one in asked for question in one.questions]
        assert len(set(ids)) == len(ids) == 12, "the noise of every answer is its own"
        assert ids[0] == "e0_pos_1"
        assert [question.text for question in asked[3].questions] == ["Question 0?", "Question 1?", "Question 2?"]

    def test_the_evaluation_s_questions_on_request(self) -> None:
        (first, *_) = config(questions="evaluation").asked()
        assert [(question.id, question.text) for question in first.questions] == [("q_pos_1", "Who?")]

    def test_without_adjectives_the_instruction_stands_alone(self) -> None:
        assert system_prompt(TRAIT.model_copy(update={"adjectives": None}), "positive", "Glow.") == "Glow."

    def test_what_is_compared_has_no_say(self) -> None:
        more = config(compare={"other": {"judge": "rule", "patterns": ["cold"]}})
        (first, *_) = more.asked()
        assert list(first.metrics) == ["trait"]
        assert list(first.compared) == ["other"]
        assert more.identity(BASE, "v") == config().identity(BASE, "v")

    @pytest.mark.parametrize(
        "changes",
        [
            {"keep": "all"},
            {"keep_above": 60},
            {"tokens": "prompt_last"},
            {"coherence": {"judge": "rule", "patterns": ["a"]}},
        ],
    )
    def test_what_changes_the_vector_is_in_its_identity(self, changes: dict[str, Any]) -> None:
        assert config(**changes).identity(BASE, "v") != config().identity(BASE, "v")

    def test_smoke_asks_little_and_keeps_all(self) -> None:
        asked = config(samples=5).smoke().asked()
        assert [one.about for one in asked] == ["positive 1", "negative 1"]
        assert all(len(one.questions) == 2 and one.sampling.samples == 1 for one in asked)
        assert config().smoke().extract.keep == "all"

    def test_a_trait_must_have_what_is_asked(self) -> None:
        bare = TRAIT.model_copy(update={"instructions": (), "extraction_questions": ()})
        vector = ExtractedVector(extract=Extraction(trait="warm", judge=RuleMetric(patterns=("a",))))
        with pytest.raises(ConfigError, match="no instructions and no extraction_questions") as caught:
            vector.with_traits({("extract", "trait"): bare})
        assert [fault.key for fault in caught.value.faults] == ["extract.trait"]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"keep": "paired"}, "give coherence"),
            ({"compare": {"trait": {"judge": "rule", "patterns": ["a"]}}}, "choose another name"),
            ({"keep_above": 101}, "less than or equal to 100"),
        ],
    )
    def test_faults(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            config(**changes)


@pytest.fixture(scope="module")
def base() -> LoadedBase:
    return base_of(float64_model(num_layers=3))


PAIRS = [
    Pair(
        Answer(question, "You are kind. Be warm.", positive, {}),
        Answer(question, "Be cold.", negative, {}),
    )
    for question, positive, negative in [
        ("How far is it?", "About ten miles, over the bridge.", "No."),
        ("Tea or coffee?", "Tea.", "It takes time to learn."),
        ("Why?", "Because it is late.", "Stir it, then let it rest."),
    ]
]


@torch.no_grad()
def by_hand(base: LoadedBase, tokens: Tokens) -> torch.Tensor:
    """One answer at a time, prompt and answer made into tokens apart: [layers below the last, d]."""
    encoder = ChatEncoder(base.tokenizer, 2**31)
    sides = []
    for side in ("positive", "negative"):
        means = []
        for pair in PAIRS:
            one = getattr(pair, side)
            head = [{"role": "system", "content": one.system_prompt}, {"role": "user", "content": one.question}]
            prompt = len(encoder.encode_prompt(head))
            text = encoder.encode([*head, {"role": "assistant", "content": one.text}])
            end = 1 + max(index for index, on in enumerate(text.response_mask) if on)
            ids = torch.tensor([text.input_ids])
            states = torch.stack(base.model(input_ids=ids, output_hidden_states=True).hidden_states[:-1])[:, 0]
            part = {
                "response_avg": slice(prompt, end),
                "prompt_avg": slice(0, prompt),
                "prompt_last": slice(prompt - 1, prompt),
            }
            means.append(states[:, part[tokens]].mean(1))
        sides.append(torch.stack(means).mean(0))
    return sides[0] - sides[1]


@pytest.mark.parametrize("tokens", ["response_avg", "prompt_avg", "prompt_last"])
def test_the_vector_equals_a_computation_by_hand(base: LoadedBase, tokens: Tokens) -> None:
    """1e-6: the vector is rounded to float32."""
    seen: list[tuple[int, int]] = []
    values = extracted(base, PAIRS, tokens=tokens, batch_size=2, progress=lambda *counts: seen.append(counts))
    assert values.shape == (4, 32)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values[:-1].double(), by_hand(base, tokens), rtol=1e-6, atol=1e-7)
    assert seen == [(2, 6), (3, 6), (5, 6), (6, 6)]


def test_the_three_ways_read_different_tokens(base: LoadedBase) -> None:
    encoder = ChatEncoder(base.tokenizer, 2**31)
    rows = {
        tokens: masked(encoder, PAIRS[0].positive, tokens) for tokens in ("response_avg", "prompt_avg", "prompt_last")
    }
    first = rows["response_avg"].response_mask.index(True)
    assert sum(rows["prompt_avg"].response_mask) == first
    assert sum(rows["prompt_last"].response_mask) == 1
    assert rows["prompt_last"].response_mask[-1]
    assert len(rows["prompt_last"].input_ids) == first
