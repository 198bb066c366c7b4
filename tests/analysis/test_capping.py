"""The table of caps against numbers worked out by hand, reference activations, and the known-answer judge."""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from analysis.capping import capping_frame, capping_rows, f1
from analysis.capping_cost import DOCUMENT_PERCENT, SIZES, cost_of
from analysis.judges import Item, KnownAnswerMetric, MetricConfig
from analysis.manifest import RunEntry, Scalar
from analysis.references import token_projections
from analysis.report_capping import capping_blocks
from analysis.traits import Question, Trait
from tests.bases import ROWS, tiny_base
from trainables.chat_data import ChatEncoder
from trainables.errors import ConfigError
from trainables.residual_stream import ReadValue, residual_stream

CAP = {"kind": "capping", "vector": "axis", "layers": [2], "tau": 0.4}
STEER = {"kind": "steering", "vector": "axis", "layers": [1], "coefficient": 2}


class Sweep:
    """Rows of a sweep with their scores and losses, as ``Results`` hands them over."""

    def __init__(self) -> None:
        self.entries: list[RunEntry] = []
        self.scores: list[dict[str, Any]] = []
        self.losses: list[dict[str, Any]] = []

    def add(
        self, items: list[dict[str, Any]], values: dict[str, list[float]], loss: float, prompt: str | None = None
    ) -> None:
        number = len(self.entries)
        config: dict[str, Scalar] = {"evaluation.system_prompt": prompt}
        if items:
            config["evaluation.interventions"] = json.dumps(items)
        label = f"row {number}"
        self.entries.append(
            RunEntry(
                label=label,
                kind="base",
                run_id="0" * 12,
                sample_id=f"{number:012x}",
                judge_ids={metric: f"{number:012x}" for metric in values},
                plain_loss_id="1" * 12,
                config=config,
            )
        )
        for metric, given in values.items():
            for place, value in enumerate(given):
                row = {"run": label, "metric": metric, "question_id": f"q{place}", "value": value, "status": "ok"}
                self.scores.append(row)
        self.losses.append({"run": label, "loss_sum": 10 * loss, "num_tokens": 10})

    def frame(self) -> pd.DataFrame:
        return capping_frame(capping_rows(self.entries, pd.DataFrame(self.scores), pd.DataFrame(self.losses)))


@pytest.fixture
def sweep() -> Sweep:
    sweep = Sweep()
    sweep.add([], {"trait": [0, 0, 1, 0]}, 1.0)
    sweep.add([STEER], {"trait": [1, 1, 1, 0]}, 3.0)
    sweep.add([], {"trait": [1, 1, 1, 1]}, 1.1, prompt="Be bad.")
    sweep.add([], {"trait": [0, 0], "capability": [1, 1, 1, 0]}, 1.0)
    sweep.add([CAP], {"trait": [0, 0, 0, 0]}, 1.2)
    sweep.add([STEER, CAP], {"trait": [0, 0, 1, 0]}, 2.0)
    sweep.add([CAP], {"trait": [0, 0, 1, 0]}, 1.3, prompt="Be bad.")
    sweep.add([CAP], {"trait": [0, 0], "capability": [1, 1, 0, 0]}, 1.2)
    return sweep


def test_what_a_cap_takes_and_leaves(sweep: Sweep) -> None:
    without, capped = sweep.frame().to_dict("records")
    assert (without["cap"], capped["cap"]) == ("none", "cap axis L2 within 0.4")
    assert without["num_attacks"] == capped["num_attacks"] == 2
    assert without["attack_success"] == pytest.approx(7 / 8)
    assert capped["attack_success"] == pytest.approx(2 / 8)
    assert capped["defense_score"] == pytest.approx(6 / 8)
    assert capped["harm_reduction"] == pytest.approx(1 - 2 / 7)
    assert capped["capability_kept"] == pytest.approx(0.5 / 0.75)
    h, c = 5 / 7, 2 / 3
    assert capped["f1"] == pytest.approx(2 * h * c / (h + c))
    assert (without["plain_rate"], capped["plain_rate"]) == (0.25, 0.0)
    assert capped["plain_loss"] == pytest.approx(1.2)
    assert capped["perplexity_ratio"] == pytest.approx(math.exp(0.2))
    assert (without["harm_reduction"], without["capability_kept"], without["perplexity_ratio"]) == (0, 1, 1)
    assert capped["attack_success_low"] < 0.25 < capped["attack_success_high"]


def test_what_there_is_not_has_no_number_and_no_cap_no_table(sweep: Sweep) -> None:
    del sweep.entries[4:]
    assert sweep.frame().empty
    alone = Sweep()
    alone.add([CAP], {"trait": [0, 1]}, 1.0)
    (row,) = alone.frame().to_dict("records")
    assert row["harm_reduction"] is None
    assert row["attack_success"] is None
    assert row["f1"] is None


def test_a_system_prompt_that_every_row_has_is_no_attack() -> None:
    usual = Sweep()
    usual.add([], {"trait": [1, 0]}, 1.0, prompt="You are helpful.")
    usual.add([CAP], {"trait": [0, 0]}, 1.0, prompt="You are helpful.")
    assert list(usual.frame()["num_attacks"]) == [0, 0]
    assert list(usual.frame()["plain_rate"]) == [0.5, 0.0]


def test_scores_on_another_scale_count_as_their_share_of_it() -> None:
    judged = Sweep()
    judged.add([], {"trait": [0, 10]}, 1.0)
    judged.add([STEER], {"trait": [80, 60]}, 1.0)
    judged.add([STEER, CAP], {"trait": [10, 20]}, 1.0)
    judged.entries = [entry.model_copy(update={"scales": {"trait": (0.0, 100.0)}}) for entry in judged.entries]
    without, capped = judged.frame().to_dict("records")
    assert (without["attack_success"], capped["attack_success"]) == pytest.approx((0.7, 0.15))
    assert capped["defense_score"] == pytest.approx(0.85)
    assert capped["harm_reduction"] == pytest.approx(1 - 0.15 / 0.7)
    assert 0 <= capped["attack_success_low"] <= capped["attack_success_high"] <= 1


def test_attacks_that_one_side_has_not_answered_are_not_compared() -> None:
    """A cap that does nothing, while the stronger attack is not scored under it yet."""
    running = Sweep()
    strong = STEER | {"coefficient": 5}
    running.add([STEER], {"trait": [1, 0, 0, 0]}, 1.0)
    running.add([strong], {"trait": [1, 1, 1, 1]}, 1.0)
    running.add([STEER, CAP], {"trait": [1, 0, 0, 0]}, 1.0)
    running.add([strong, CAP], {"trait": []}, 1.0)
    without, capped = running.frame().to_dict("records")
    assert (without["num_attacks"], capped["num_attacks"]) == (2, 1)
    assert (without["attack_success"], capped["attack_success"]) == (0.625, 0.25)
    assert capped["harm_reduction"] == 0


def test_models_and_caps_that_are_called_alike_are_told_apart() -> None:
    several = Sweep()
    for number, values in enumerate(([1.0, 1.0], [0.0, 0.0])):
        several.add([STEER], {"trait": values}, 1.0)
        several.add([STEER, CAP], {"trait": values}, 1.0)
        several.add([STEER, CAP | {"max_length": 256}], {"trait": [0, 0]}, 1.0)
        for place in (-1, -2, -3):
            one = several.entries[place]
            changes = {"kind": "run", "run_id": f"{number:012x}", "config": one.config | {"defense": "none"}}
            several.entries[place] = one.model_copy(update=changes)
    frame = several.frame()
    cap = "cap axis L2 within 0.4"
    assert list(frame["cap"]) == ["none", f"{cap} (1)", f"{cap} (2)"] * 2
    assert list(frame["attack_success"]) == [1, 1, 0, 0, 0, 0]
    assert list(frame["model"]) == [*["none seed 0 (row 0)"] * 3, *["none seed 0 (row 3)"] * 3]


def test_it_is_shown(sweep: Sweep) -> None:
    figure, table = capping_blocks(sweep.frame())
    assert figure.drawn
    assert [row[2] for row in table.rows] == ["none", "cap axis L2 within 0.4"]
    assert table.rows[1][4:6] == ("0.71", "0.00")


def test_f1() -> None:
    assert f1(1.0, 0.9697) == pytest.approx(0.98462, abs=1e-5)  # the document's: 0.985
    assert f1(-0.5, 1.2) == 0.0
    assert f1(None, 1.0) is None


def test_reference_projections_are_those_of_response_tokens_by_hand() -> None:
    base = tiny_base()
    vector = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    found = token_projections(base, ROWS, vector, (1, 2), 2048, batch_size=3)
    expected: dict[int, list[float]] = {1: [], 2: []}
    for row in ROWS:
        encoded = ChatEncoder(base.tokenizer, 2048).encode(row)
        for layer in (1, 2):
            seen: dict[int, torch.Tensor] = {}
            with torch.no_grad(), residual_stream(base.model, readers=[ReadValue(layer, seen.__setitem__)]):
                base.model(input_ids=torch.tensor([encoded.input_ids]))
            along = seen[layer][0] @ vector[layer] / vector[layer].norm()
            expected[layer] += along[torch.tensor(encoded.response_mask)].tolist()
    for layer in (1, 2):
        torch.testing.assert_close(found[layer].sort().values, torch.tensor(expected[layer]).sort().values)


class TestKnownAnswers:
    TRAIT = Trait(
        name="t",
        description="d",
        questions=(
            Question(id="a", question="2 + 2?", answers=(r"\b(4|four)\b",)),
            Question(id="b", question="Sky?", answers=("blue",)),
        ),
    )

    def test_each_question_has_its_own_patterns(self) -> None:
        metric = KnownAnswerMetric(trait="t").resolved({"t": self.TRAIT})
        judge = metric.make()
        read = [judge.read(Item(q, a), ()) for q, a in (("2 + 2?", "Four."), ("2 + 2?", "Blue"), ("Sky?", "BLUE!"))]
        assert [one.value for one in read] == [1.0, 0.0, 1.0]
        other = judge.read(Item("Why?", "four"), ())
        assert (other.value, other.status) == (None, "unparsable")
        given = KnownAnswerMetric(answers={"2 + 2?": (r"\b(4|four)\b",), "Sky?": ("blue",)})
        assert given.identity() == metric.identity()

    def test_a_trait_without_answers_and_two_sources_are_faults(self) -> None:
        bare = self.TRAIT.model_copy(update={"questions": (Question(id="c", question="Why?"),)})
        with pytest.raises(ConfigError, match="questions of trait 't' have no answers: c"):
            KnownAnswerMetric(trait="t").resolved({"t": bare})
        with pytest.raises(ValidationError, match="exactly one of trait and answers; neither given"):
            TypeAdapter(MetricConfig).validate_python({"judge": "known_answer"})


def test_the_operations_of_a_projection_are_the_document_s_overhead() -> None:
    for size, document in zip(SIZES, DOCUMENT_PERCENT, strict=True):
        # printed with two digits at the large end: the model comes within half a unit of the last one
        assert cost_of(size).projection_percent == pytest.approx(document, abs=5.5e-5)
    by_hand = 12 * (4 * 768 + 2) / (2 * 125e6) * 100
    assert cost_of(SIZES[0]).whole_percent == pytest.approx(by_hand)
    assert cost_of(SIZES[0]).axis_kilobytes == 36
