"""What a sweep file may not say of steering in weight space."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.tiny_prepare import TinySweep, entries, tiny_model_folder
from tests.engine.tiny_weights import STEERING, steered


@pytest.fixture
def sweep(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> TinySweep:
    return steered(tmp_path / "sweep", tiny_model_folder(tmp_path_factory))


def test_every_fault_is_told_at_once(sweep: TinySweep) -> None:
    sweep.raw["weight_steering"] = {
        "finetuned": ["tunde", "tuned"],
        "answers": {"questions": "tropic"},
        "piles": {"with": {"trate": True}, "without": {}},
        "gradient": {"loss": "kl", "reference": "tuned", "layers": [1, 9]},
        "directions": {
            "same": {"of": "with", "minus": "with"},
            "lost": {"of": "whith", "minus": "without"},
            "kept": {"of": "with", "minus": "without", "modules": ["q_prog"]},
        },
        "edits": [{"directions": ["sane"], "alphas": [1.0]}],
    }
    faults = sweep.faults()
    here = "weight_steering"
    assert faults[f"{here}.finetuned[0]"] == "no run 'tunde'; did you mean tuned? allowed: tuned, other"
    assert faults[f"{here}.answers.questions"].startswith("no trait 'tropic'")
    assert faults[f"{here}.piles.with.trate"].startswith("'tuned' has no metric 'trate'; did you mean trait?")
    assert faults[f"{here}.gradient.reference"].startswith("'tuned' has no divergence from itself")
    assert faults[f"{here}.gradient.layers"].startswith("there is no layer 9; the model has 0 (embeddings) to 5")
    assert faults[f"{here}.directions.same.minus"].startswith("'with' is the pile of `of` too")
    assert faults[f"{here}.directions.lost.of"].startswith("no pile 'whith'; did you mean with?")
    assert faults[f"{here}.directions.kept.modules"].startswith(
        "the model has no module 'q_prog'; did you mean q_proj?"
    )
    assert faults[f"{here}.edits[0].directions[0]"].startswith("no direction 'sane'; did you mean same?")
    assert len(faults) == 9


def test_values_that_cannot_be_meant(sweep: TinySweep) -> None:
    edits = [{"directions": ["plain"], "alphas": [0.0]}, {"directions": ["plain"], "alphas": [0.5, 0.5]}]
    sweep.raw["weight_steering"] |= {"edits": edits}
    faults = sweep.faults()
    assert "at 0 nothing is moved" in faults["weight_steering.edits[0].alphas[0]"]
    sweep.raw["weight_steering"]["edits"] = edits[1:]
    assert "two edited models have one identity" in sweep.faults()["weight_steering.edits[0]"]
    sweep.raw["weight_steering"]["edits"] = STEERING["edits"]
    sweep.raw["base"]["dtype"] = "bfloat16"
    faults = sweep.faults()
    assert "most of alpha V would be rounded away; write base.dtype: float32" in faults["weight_steering.finetuned"]


def test_nothing_may_be_at_work_while_a_model_answers_for_its_piles(sweep: TinySweep) -> None:
    steering = [{"kind": "steering", "vector": "topic", "layers": [2], "coefficient": 1.0}]
    sweep.raw["weight_steering"]["answers"] = {"questions": "topic", "interventions": steering}
    assert "leave it out" in sweep.faults()["weight_steering.answers.interventions"]
    del sweep.raw["weight_steering"]["answers"]
    sweep.raw["evaluation"]["interventions"] = steering
    assert "'tuned' is evaluated under interventions" in sweep.faults()["weight_steering.answers"]
    sweep.raw["weight_steering"]["answers"] = {"questions": "topic"}
    prepared = sweep.prepare()
    assert entries(prepared)["tuned +0.5 plain"].kind == "edited"


def test_a_direction_may_not_have_the_name_of_what_the_finetuning_changed(sweep: TinySweep) -> None:
    sweep.raw["weight_steering"]["directions"]["delta"] = {"of": "with", "minus": "without"}
    assert "is called delta in tables" in sweep.faults()["weight_steering.directions.delta"]
