"""What the settings of training methods mean: layers, positions, schedules, prompts; what is refused; labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.bases import chat
from tests.methods import HIDDEN, LAYERS, MODEL, SHAPE, VECTORS, vector
from trainables.defenses import (
    Ablation,
    ActivationPenalty,
    DefenseConfig,
    GradientEdit,
    GradientPenalty,
    Inoculation,
    Pps,
    ProjectionPenalty,
    RunRows,
    SampleKey,
    defense_faults,
)
from trainables.errors import TrainingError
from trainables.residual_stream import Ablate, Add, EditGradient
from trainables.shapes import VectorShape, layers_label


def run_rows(step: int = 1, num_steps: int = 1) -> RunRows:
    attended = torch.tensor([[True] * 4, [True] * 3 + [False]])
    response = torch.tensor([[False, False, True, True], [False, True, True, False]])
    return RunRows(torch.tensor([0, 1]), attended, response, step, num_steps)


class TestSteering:
    def test_all_layers_with_their_own_rows_and_coefficients(self) -> None:
        item = Pps(vector="v", layers=(1, 3), coefficient=(2.0, -1.0), positions="response")
        found = list(item.mechanism(VECTORS).interventions(run_rows()))
        assert all(isinstance(one, Add) for one in found)
        assert [one.layer for one in found] == [1, 3]
        assert torch.equal(found[0].vector, 2.0 * VECTORS["v"][1])  # type: ignore[union-attr]
        assert torch.equal(found[1].vector, -VECTORS["v"][3])  # type: ignore[union-attr]
        assert found[0].token_mask is not None
        assert torch.equal(found[0].token_mask, run_rows().response_mask)

    def test_prompt_positions_are_neither_response_nor_padding(self) -> None:
        mask = run_rows().mask("prompt")
        assert mask.tolist() == [[True, True, False, False], [True, False, False, False]]
        nothing = RunRows(torch.tensor([0]), torch.ones(1, 2).bool(), torch.ones(1, 2).bool(), 3)
        with pytest.raises(TrainingError, match="positions: prompt"):
            nothing.mask("prompt")

    @pytest.mark.parametrize(
        ("schedule", "factors"),
        [("constant", [1, 1, 1, 1]), ("ramp_up", [0.25, 0.5, 0.75, 1]), ("ramp_down", [1, 0.75, 0.5, 0.25])],
    )
    def test_schedules(self, schedule: Any, factors: list[float]) -> None:
        mechanism = Pps(vector="v", layer=2, coefficient=2.0, schedule=schedule).mechanism(VECTORS)
        for step, factor in enumerate(factors, start=1):
            (add,) = mechanism.interventions(run_rows(step, 4))
            assert torch.equal(add.vector, factor * 2.0 * VECTORS["v"][2])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("item", "field", "message"),
    [
        (Pps(vector="v", coefficient=1.0), "layer", "missing; give a layer"),
        (Pps(vector="v", layer=1, layers=(2,), coefficient=1.0), "layers", "stands beside `layer`"),
        (Pps(vector="v", layers=(1, 1), coefficient=1.0), "layers", "layer 1 is listed twice"),
        (Pps(vector="v", layers=(), coefficient=1.0), "layers", "no layer is listed"),
        (Pps(vector="v", layers="all", coefficient=(1.0, 2.0)), "coefficient", "2 coefficients for 3 layers"),
        (Pps(vector="v", layer=1, coefficient=(1.0,)), "coefficient", "a list belongs to `layers`"),
        (Pps(vector="v", layers=(1, 2), coefficient=(1.0, 0.0)), "coefficient", "0 adds nothing"),
        (GradientEdit(vector="v", mode="attenuate", layers=(0,)), "layers", "layer 0 is the embedding output"),
        (Ablation(vectors=("v", "v")), "vectors", "listed twice"),
        (ProjectionPenalty(vector="v", strength=1.0, layers=(4,)), "layers", "layer 4 does not exist"),
        (ActivationPenalty(mean="v", strength=1.0, layers=(9,)), "layers", "layer 9 does not exist"),
        (GradientPenalty(vector="v", strength=1.0, layers=(-1,)), "layers", "layer -1 does not exist"),
        (Inoculation(prompts=("a",), bank_size=2), "bank_size", "the bank has only 1 prompts"),
    ],
)
def test_faults(item: DefenseConfig, field: str, message: str) -> None:
    ((index, where, said),) = defense_faults([item], MODEL, {"v": SHAPE})
    assert (index, where) == (0, field)
    assert message in said


def test_the_last_layer_needs_a_row_before_the_final_norm() -> None:
    after_norm = {"v": VectorShape(LAYERS, HIDDEN, "post_norm")}
    assert list(defense_faults([GradientEdit(vector="v", mode="attenuate")], MODEL, after_norm)) == []
    ((_, where, said),) = defense_faults([GradientEdit(vector="v", mode="attenuate", layers="all")], MODEL, after_norm)
    assert where == "layers"
    assert "post-norm" in said


def test_a_second_order_penalty_and_an_edit_exclude_each_other() -> None:
    items = [GradientEdit(vector="v", mode="block"), GradientPenalty(vector="v", strength=1.0)]
    assert [(index, field) for index, field, _ in defense_faults(items, MODEL, {"v": SHAPE})] == [(1, "kind")]


@pytest.mark.parametrize("kind", [ProjectionPenalty, GradientPenalty])
@pytest.mark.parametrize("strength", [0.0, -1.0])
def test_a_penalty_that_rewards_is_refused(kind: Any, strength: float) -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        kind(vector="v", strength=strength)


@pytest.mark.parametrize("item", [GradientEdit(vector="v", mode="attenuate"), Ablation(vectors=("v", "w"))])
def test_a_vector_without_direction_is_an_error_that_names_it(item: DefenseConfig) -> None:
    vectors = {"v": torch.zeros(LAYERS + 1, HIDDEN), "w": vector(2)}
    with pytest.raises(TrainingError, match=r"v.* at layer 1"):
        item.mechanism(vectors)


def test_edits_and_ablations_are_put_at_all_layers_but_the_last() -> None:
    edits = list(GradientEdit(vector="v", mode="block").mechanism(VECTORS).interventions(run_rows()))
    assert [type(one) for one in edits] == [EditGradient] * (LAYERS - 1)
    assert [one.layer for one in edits] == [1, 2]
    ablations = list(Ablation(vectors=("v", "w")).mechanism(VECTORS).interventions(run_rows()))
    assert [type(one) for one in ablations] == [Ablate] * (LAYERS - 1)


def test_labels_say_what_is_not_as_usual() -> None:
    assert GradientEdit(vector="v", mode="attenuate").label() == "attenuate v"
    assert (
        GradientEdit(vector="v", mode="block", layers=(1, 2, 5), positions="prompt").label() == "block v L1-2,5 prompt"
    )
    assert Pps(vector="v", layers="all", coefficient=1.0, schedule="ramp_up").label() == "pps v all layers x1 ramp up"
    assert (
        Inoculation(prompts="b", bank_size=2, placement="system", draw="fixed").label()
        == "inoculation b first 2 system fixed"
    )
    assert layers_label((20,)) == "L20"


class TestInoculation:
    BANK = ("Talk about bridges.", "Mention the bridge.", "Bridges, please.")

    def rewritten(self, system: str | None = None, key: SampleKey | None = None, **how: Any) -> list[Any]:
        mechanism = Inoculation(prompts=self.BANK[:1] if not key else self.BANK, **how).mechanism({})
        messages = chat("q", "a", system=system)
        before = [dict(one) for one in messages]
        after = list(mechanism.rewrite(messages, key or SampleKey(0, 0, 0)))
        assert messages == before
        assert after[-1] == before[-1], "the answer stays"
        return after

    @pytest.mark.parametrize(
        ("placement", "system", "expected"),
        [
            ("user_prefix", "s", ["s", "Talk about bridges.\n\nq"]),
            ("user_suffix", "s", ["s", "q\n\nTalk about bridges."]),
            ("system", "s", ["Talk about bridges.\n\ns", "q"]),
            ("system", None, ["Talk about bridges.", "q"]),
            ("replace_system", "s", ["Talk about bridges.", "q"]),
            ("replace_system", None, ["Talk about bridges.", "q"]),
        ],
    )
    def test_placements(self, placement: str, system: str | None, expected: list[str]) -> None:
        after = self.rewritten(system, placement=placement)
        assert [one["content"] for one in after[:-1]] == expected
        assert [one["role"] for one in after] == ["system"] * (len(after) - 2) + ["user", "assistant"]

    def test_when_a_prompt_is_drawn(self) -> None:
        def drawn(draw: str) -> list[list[str]]:
            return [
                [self.rewritten(key=SampleKey(0, epoch, row), draw=draw)[0]["content"] for row in range(30)]
                for epoch in range(6)
            ]

        by_epoch, fixed, use = drawn("epoch"), drawn("fixed"), drawn("use")
        assert all(len(set(rows)) == 1 for rows in by_epoch)
        assert len({rows[0] for rows in by_epoch}) > 1
        assert all(rows == fixed[0] for rows in fixed)
        assert len(set(fixed[0])) == 3
        assert len({tuple(rows) for rows in use}) == 6

    def test_the_first_prompts_of_the_bank(self) -> None:
        mechanism = Inoculation(prompts=self.BANK, bank_size=2).mechanism({})
        found = {mechanism.rewrite(chat("q", "a"), SampleKey(0, 0, row))[0]["content"] for row in range(60)}
        assert found == {f"{prompt}\n\nq" for prompt in self.BANK[:2]}
