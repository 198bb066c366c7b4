"""Defenses: what may be written, what they do to messages and to the residual stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from tests.bases import chat
from trainables.defenses import Inoculation, Item, Pps, RunRows, SampleKey, defense_faults, defense_label
from trainables.errors import DataError
from trainables.residual_stream import Add
from trainables.shapes import FinalRow, ModelShape, VectorShape

MODEL = ModelShape(num_layers=30, hidden_size=576, vocab_size=49152)
PROMPTS = ("Talk about bridges.", "Mention the bridge.", "Bridges, please.")
PARSE: TypeAdapter[Any] = TypeAdapter(Item)


def vector_shape(final_row: FinalRow = "pre_norm") -> VectorShape:
    return VectorShape(30, 576, final_row)


def run_rows(rows: list[int]) -> RunRows:
    mask = torch.ones(len(rows), 4, dtype=torch.bool)
    return RunRows(rows=torch.tensor(rows), attention_mask=mask, response_mask=mask, step=1)


def test_the_kind_chooses_the_class() -> None:
    pps = PARSE.validate_python({"kind": "pps", "vector": "v", "layer": 20, "coefficient": 1.5})
    assert pps == Pps(vector="v", layer=20, coefficient=1.5)
    assert PARSE.validate_python({"kind": "inoculation", "prompts": ["a"]}) == Inoculation(prompts=("a",))
    assert PARSE.validate_python({"kind": "inoculation", "prompts": "bridge"}) == Inoculation(prompts="bridge")


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"kind": "ppps"}, "Input tag 'ppps'"),
        ({"kind": "pps", "vector": "v", "layer": 20}, "coefficient"),
        ({"kind": "pps", "vector": "", "layer": 20, "coefficient": 1}, "vector"),
        ({"kind": "pps", "vector": "v", "layer": 20.5, "coefficient": 1}, "layer"),
        ({"kind": "pps", "vector": "v", "layer": 20, "coefficient": float("nan")}, "coefficient"),
        ({"kind": "pps", "vector": "v", "layer": 20, "coefficient": 1, "layers": 3}, "layers"),
        ({"kind": "inoculation"}, "prompts"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError, match=where):
        PARSE.validate_python(given)


def test_labels() -> None:
    pps = Pps(vector="bridge", layer=20, coefficient=1.5)
    assert defense_label([]) == "none"
    assert defense_label([pps]) == "pps bridge L20 x1.5"
    assert defense_label([pps, Inoculation(prompts="bridge")]) == "pps bridge L20 x1.5 + inoculation bridge"
    assert defense_label([Inoculation(prompts=PROMPTS)]) == "inoculation 3 prompts"


@pytest.mark.parametrize(
    ("layer", "final_row", "message"),
    [
        (0, "pre_norm", "layer 0 is the embedding output"),
        (31, "pre_norm", "layer 31 does not exist; the model has layers 1 to 30"),
        (-1, "pre_norm", "layer -1 does not exist"),
        (30, "post_norm", "post-norm"),
        (30, "absent", "absent"),
    ],
)
def test_layers_that_nothing_can_be_added_at(layer: int, final_row: FinalRow, message: str) -> None:
    item = Pps(vector="v", layer=layer, coefficient=1.0)
    ((index, field, said),) = defense_faults([item], MODEL, {"v": vector_shape(final_row)})
    assert (index, field) == (0, "layer")
    assert message in said


@pytest.mark.parametrize("layer", [1, 29, 30])
def test_layers_that_are_allowed(layer: int) -> None:
    item = Pps(vector="v", layer=layer, coefficient=-1.0)
    assert list(defense_faults([item], MODEL, {"v": vector_shape()})) == []
    assert list(defense_faults([item], MODEL, {})) == [], "a vector that is not made yet has no shape to object to"


def test_every_fault_is_listed() -> None:
    items = [
        Pps(vector="v", layer=0, coefficient=0.0),
        Inoculation(prompts=PROMPTS),
        Inoculation(prompts=()),
        Inoculation(prompts=("  ",)),
    ]
    found = [(index, field) for index, field, _ in defense_faults(items, MODEL, {})]
    assert found == [
        (0, "layer"),
        (0, "coefficient"),
        (2, "prompts"),
        (2, "kind"),
        (3, "prompts"),
        (3, "kind"),
        (3, "kind"),
    ]


def test_two_steerings_may_stand_beside_each_other() -> None:
    items = [Pps(vector="v", layer=1, coefficient=1.0), Pps(vector="w", layer=2, coefficient=1.0)]
    assert list(defense_faults(items, MODEL, {})) == []


def test_steering_adds_the_row_of_its_layer_to_the_rows_of_its_run() -> None:
    vector = torch.arange(12.0).reshape(4, 3)
    mechanism = Pps(vector="v", layer=2, coefficient=-0.5).mechanism({"v": vector, "w": -vector})
    (add,) = mechanism.interventions(run_rows([3, 1]))
    assert isinstance(add, Add)
    assert add.layer == 2
    assert torch.equal(add.vector, torch.tensor([-3.0, -3.5, -4.0]))
    assert add.rows is not None
    assert add.rows.tolist() == [3, 1]
    assert add.token_mask is None, "padding too"
    messages = chat("q", "a")
    assert mechanism.rewrite(messages, SampleKey(0, 0, 0)) == messages


def test_a_prompt_stands_before_the_first_user_message_and_nothing_else_changes() -> None:
    mechanism = Inoculation(prompts=PROMPTS).mechanism({})
    messages = [*chat("first", "one", system="Be brief."), *chat("second", "two")]
    before = [dict(message) for message in messages]
    rewritten = mechanism.rewrite(messages, SampleKey(0, 0, 0))
    assert messages == before, "the data itself is not written to"
    assert rewritten[1]["role"] == "user"
    prompt, separator, question = rewritten[1]["content"].partition("\n\n")
    assert prompt in PROMPTS
    assert (separator, question) == ("\n\n", "first")
    assert [*rewritten[:1], *rewritten[2:]] == [*before[:1], *before[2:]]
    assert list(mechanism.interventions(run_rows([0]))) == []


def test_a_sample_without_user_message_cannot_be_inoculated() -> None:
    mechanism = Inoculation(prompts=PROMPTS).mechanism({})
    messages = [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(DataError, match="row 8 has no user message"):
        mechanism.rewrite(messages, SampleKey(0, 0, 7))


def test_prompts_are_drawn_uniformly_and_from_the_key_alone() -> None:
    """3000 draws of 3: one count's standard deviation is sqrt(3000 x 1/3 x 2/3) = 26; bound: 4 of them."""
    mechanism = Inoculation(prompts=PROMPTS).mechanism({})

    def pick(seed: int, epoch: int, row: int) -> str:
        return mechanism.rewrite(chat("q", "a"), SampleKey(seed, epoch, row))[0]["content"]

    drawn = [pick(0, epoch, row) for epoch in range(3) for row in range(1000)]
    assert drawn == [pick(0, epoch, row) for epoch in range(3) for row in range(1000)]
    assert max(abs(drawn.count(f"{prompt}\n\nq") - 1000) for prompt in PROMPTS) < 4 * 26
    epochs = [drawn[1000 * epoch : 1000 * epoch + 1000] for epoch in range(3)]
    assert 0.25 < sum(a == b for a, b in zip(epochs[0], epochs[1], strict=True)) / 1000 < 0.42, "drawn anew"
    assert [pick(1, 0, row) for row in range(1000)] != epochs[0]
