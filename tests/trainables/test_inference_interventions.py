"""Interventions at inference: their bounds, their faults, and answers under them against single rows by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from tests.float64 import float64_model
from tests.trainables.test_sample import KEYS, PROMPTS, TOKENIZER, by_hand
from trainables.errors import DataError
from trainables.interventions import (
    Bound,
    Capping,
    InferenceSteering,
    Interventions,
    Reference,
    interventions_faults,
    interventions_label,
)
from trainables.randomness import generator
from trainables.residual_stream import Cap, ReadValue, residual_stream
from trainables.sample import Question, SamplingConfig, _placed, generate, sample_answers
from trainables.shapes import ModelShape, VectorShape

ITEMS: TypeAdapter[Any] = TypeAdapter(Interventions)
SHAPE = ModelShape(num_layers=4, hidden_size=32, vocab_size=300)
VECTORS = {"axis": VectorShape(4, 32, "pre_norm"), "other": VectorShape(4, 32, "post_norm")}
AXIS = torch.randn(5, 32, generator=generator("test axis"), dtype=torch.float64)
PROJECTIONS = {layer: torch.randn(101, generator=generator("reference", layer)) + layer for layer in (1, 2)}


def projections(reference: Reference) -> Mapping[int, torch.Tensor]:
    assert (reference.content, reference.vector) == ("hash", "axis")
    return {layer: PROJECTIONS[layer] for layer in reference.layers}


def capping(**fields: Any) -> Capping:
    return Capping.model_validate({"kind": "capping", "vector": "axis", "layers": [1, 2], **fields})


def caps(**fields: Any) -> list[Cap]:
    found = capping(**fields).at_work({"axis": AXIS}, projections)
    assert all(isinstance(one, Cap) for one in found)
    return found  # type: ignore[return-value]


def bounds(**fields: Any) -> list[tuple[Any, Any]]:
    return [(one.floor, one.ceiling) for one in caps(**fields)]


def test_given_bounds_are_those_of_the_clamp() -> None:
    assert bounds(tau=0.4) == [(-0.4, 0.4)] * 2
    assert bounds(ceiling=-1.0) == [(None, -1.0)] * 2
    assert bounds(floor=0.5, ceiling=2.0) == [(0.5, 2.0)] * 2
    assert [one.layer for one in caps(tau=0.4)] == [1, 2]
    torch.testing.assert_close(caps(tau=0.4)[1].direction, AXIS[2], rtol=0, atol=0)


def test_calibrated_bounds_are_percentiles_of_each_layer() -> None:
    values = {layer: PROJECTIONS[layer].double().numpy() for layer in (1, 2)}
    found = bounds(floor={"percentile": 10}, ceiling={"percentile": 90}, reference="hash")
    for layer, (floor, ceiling) in zip((1, 2), found, strict=True):
        assert floor == pytest.approx(np.percentile(values[layer], 10))
        assert ceiling == pytest.approx(np.percentile(values[layer], 90))
    ((low, high), _) = bounds(tau={"percentile": 75, "stretch": 2}, reference="hash")
    assert high == -low == pytest.approx(2 * np.percentile(np.abs(values[1]), 75))
    (_, (_, stretched)) = bounds(ceiling={"percentile": 90, "stretch": 3}, reference="hash")
    middle, at = np.percentile(values[2], [50, 90])
    assert stretched == pytest.approx(middle + 3 * (at - middle))


def test_a_calibrated_ceiling_below_a_given_floor_names_the_layer() -> None:
    with pytest.raises(DataError, match=r"layer 1: the ceiling, .*, lies below the floor, 9; nothing is between them"):
        bounds(floor=9, ceiling={"percentile": 50}, reference="hash")


def test_an_axis_without_a_direction_is_refused() -> None:
    with pytest.raises(DataError, match="the axis axis has length 0 at layer 1"):
        capping(tau=1.0).at_work({"axis": torch.zeros(5, 32)}, projections)


@pytest.mark.parametrize(
    ("fields", "path", "message"),
    [
        ({}, (0, "tau"), "missing; give tau, or a ceiling or a floor or both"),
        ({"tau": 1, "floor": 0.5}, (0, "tau"), "stands beside floor"),
        ({"floor": 2, "ceiling": 1}, (0, "ceiling"), "1 lies below the floor, 2"),
        ({"ceiling": {"percentile": 99}}, (0, "reference"), "missing; ceiling is a percentile of it"),
        ({"tau": 1, "reference": "a.jsonl"}, (0, "reference"), "would do nothing, because no bound is a percentile"),
        (
            {"floor": {"percentile": 60}, "ceiling": {"percentile": 99}, "reference": "a.jsonl"},
            (0, "ceiling", "percentile"),
            "percentiles 60 and 99: the floor's must be at most 50",
        ),
        ({"tau": 1, "layers": [0]}, (0, "layers"), "layer 0 is the embedding output"),
        ({"tau": 1, "layers": [4], "vector": "other"}, (0, "layers"), "this vector's last row is post-norm"),
    ],
)
def test_what_cannot_be_meant_is_a_fault(fields: dict[str, Any], path: tuple[object, ...], message: str) -> None:
    ((where, said),) = interventions_faults([capping(**fields)], SHAPE, VECTORS)
    assert where == path
    assert message in said


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"tau": -0.1}, "tau"),
        ({"ceiling": {"percentile": 101}}, "percentile"),
        ({"ceiling": {"percentile": 99, "stretch": 0}}, "stretch"),
        ({"tao": 1}, "tao"),
    ],
)
def test_what_no_number_can_mean_is_refused_as_it_is_read(fields: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError) as raised:
        capping(**fields)
    assert any(key in fault["loc"] for fault in raised.value.errors())


def test_labels_say_everything() -> None:
    cap = {"kind": "capping", "vector": "axis", "layers": [1, 2, 3], "ceiling": {"percentile": 99, "stretch": 1.5}}
    steer = {"kind": "steering", "vector": "axis", "layers": [2], "coefficient": 2}
    both = ITEMS.validate_python([steer, cap])
    assert interventions_label(both) == "steer axis L2 x2 + cap axis L1-3 at most p99 x1.5"
    assert interventions_label(()) == "none"
    assert capping(tau=0.4).label() == "cap axis L1-2 within 0.4"
    assert capping(floor=-1, ceiling=2).label() == "cap axis L1-2 at least -1 and at most 2"


def test_answers_under_a_cap_equal_single_rows_by_hand_and_stay_below_it() -> None:
    model = float64_model("llama")
    config = SamplingConfig(max_new_tokens=8)
    attack = InferenceSteering(vector="axis", layers=(1,), coefficient=3.0)
    cap = capping(ceiling=0.05, floor=-0.05, first_token=True)
    changes = [change for item in (attack, cap) for change in item.at_work({"axis": AXIS}, projections)]
    sizes: list[float] = []
    axis_d = AXIS[1] / AXIS[1].norm()

    def read(layer: int, hidden_btd: torch.Tensor) -> None:
        assert layer == 1
        sizes.append(float((hidden_btd @ axis_d).abs().max()))

    with residual_stream(model, changes, [ReadValue(1, read)]):
        found = generate(model, TOKENIZER, PROMPTS, KEYS, config)
    hand = [by_hand(model, prompt, key, config, changes) for prompt, key in zip(PROMPTS, KEYS, strict=True)]
    assert found == hand
    assert found != generate(model, TOKENIZER, PROMPTS, KEYS, config)
    assert max(sizes) == pytest.approx(0.05)  # the attack pushes beyond it, at every step
    assert len(sizes) >= 8


def test_rows_of_one_batch_are_sampled_each_under_its_own_cap() -> None:
    model = float64_model("qwen2")
    config = SamplingConfig(max_new_tokens=8)
    ceilings = torch.tensor([-2.0, float("inf"), -0.5, -1.0], dtype=torch.float64)
    with residual_stream(model, [Cap(2, AXIS[2], ceiling=ceilings)]):
        together = generate(model, TOKENIZER, PROMPTS, KEYS, config)
    for index, ceiling in enumerate(ceilings.tolist()):
        own = [] if ceiling == float("inf") else [Cap(2, AXIS[2], ceiling=ceiling)]
        assert together[index] == by_hand(model, PROMPTS[index], KEYS[index], config, own)


def test_a_bound_keeps_the_order_of_its_stretch() -> None:
    values = PROJECTIONS[1]
    found = [Bound(percentile=90, stretch=stretch).of(values) for stretch in (0.5, 1, 2)]
    assert found == sorted(found)
    assert Bound(percentile=50).of(values) == pytest.approx(float(values.double().median()))


def test_a_spared_position_keeps_its_values_and_no_other_does() -> None:
    hidden_btd = torch.randn(2, 4, 32, generator=generator("spared"), dtype=torch.float64)
    cap = Cap(1, AXIS[1], ceiling=0.0, floor=0.0, spared=torch.tensor([0, 2]))
    axis_d = AXIS[1] / AXIS[1].norm()
    for change, places in ((cap, [0, 2]), (replace(cap, spared=1), [1, 1])):
        after = change.apply(hidden_btd)
        left = (after @ axis_d).abs() > 1e-12
        assert left.nonzero().tolist() == [[0, places[0]], [1, places[1]]]
        assert all(torch.equal(after[row, place], hidden_btd[row, place]) for row, place in enumerate(places))
    alone = hidden_btd[:, :1]
    assert float((cap.apply(alone) @ axis_d).abs().max()) < 1e-12, "a step of a generation has no first token"


def test_the_first_token_is_spared_where_it_stands_whatever_the_padding() -> None:
    model = float64_model("llama")
    questions = [Question("a", "Why?"), Question("b", "What is the best way to cook rice, and how long does it take?")]

    def answers(batch_size: int, **fields: Any) -> list[str]:
        changes = capping(floor=30.0, **fields).at_work({"axis": AXIS}, projections)
        how: dict[str, Any] = {"sample_id": "s", "noise_key": "n", "batch_size": batch_size, "interventions": changes}
        found = sample_answers(model, TOKENIZER, questions, SamplingConfig(max_new_tokens=8), **how)
        return [row.answer for batch in found for row in batch]

    assert answers(2) == answers(1)
    assert answers(2, first_token=True) == answers(1, first_token=True)
    spares, all_of_them = caps(tau=0.0)[0], caps(tau=0.0, first_token=True)[0]
    (placed, same) = _placed([spares, all_of_them], [3, 7])  # of prompts that are padded on the left
    assert isinstance(placed, Cap)
    assert isinstance(placed.spared, torch.Tensor)
    assert placed.spared.tolist() == [4, 0]
    assert same is all_of_them
    assert (spares.spared, all_of_them.spared) == (0, None)
