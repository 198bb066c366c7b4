"""Activation projections against transformers' own hidden states; float64, 1e-10."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch

from analysis.conditions import NOTHING, Condition, Steering
from analysis.projections import projection_differences, projection_rows, with_answers
from tests.bases import ROWS, base_of, chat, tiny_base
from tests.float64 import float64_model
from tests.tiny import ModelKind
from trainables.chat_data import ChatEncoder
from trainables.lora import LoraSettings, adapter_parameters, add_adapter

VECTORS = {
    name: torch.randn(5, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for seed, name in enumerate("ab")
}
LAYERS = [0, 2, 3]


def projections(base: Any, model: Any, rows: Any = ROWS, **rest: Any) -> dict[Any, tuple[float, float, int]]:
    found = projection_rows(base, model, rows, VECTORS, LAYERS, measure_id="m", max_length=512, **rest)
    return {
        (row.row, row.condition, row.layer, row.vector): (row.projection, row.activation_norm, row.num_tokens)
        for row in found
    }


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_equal_hidden_states_of_transformers(kind: ModelKind) -> None:
    base = base_of(float64_model(kind))
    found = projections(base, base.model)
    for index, messages in enumerate(ROWS):
        encoded = ChatEncoder(base.tokenizer, 512).encode(messages)
        states = base.model(torch.tensor(encoded.input_ids)[None], output_hidden_states=True).hidden_states
        wanted = torch.tensor(encoded.response_mask)
        for layer in LAYERS:
            hidden = states[layer][0][wanted]
            for name, vector in VECTORS.items():
                projection, norm, count = found[index, "none", layer, name]
                assert count == int(wanted.sum())
                assert projection == pytest.approx(float((hidden @ vector[layer] / vector[layer].norm()).mean()))
                assert norm == pytest.approx(float(hidden.norm(dim=1).mean()))


def test_neither_batches_nor_shards_change_anything() -> None:
    base = base_of(float64_model())
    whole = projections(base, base.model)
    for other in (
        projections(base, base.model, batch_tokens=1),
        projections(base, base.model, batch_tokens=10**6),
        projections(base, base.model, ROWS[:2]) | projections(base, base.model, ROWS[2:], row_numbers=range(2, 7)),
    ):
        assert other.keys() == whole.keys()
        for key, values in whole.items():
            assert other[key] == pytest.approx(values, abs=1e-10)


def test_steering_moves_the_projection_by_its_length() -> None:
    base = base_of(float64_model())
    steered = Condition("steered", (Steering(VECTORS["a"], [2], 1.5),))
    found = projections(base, base.model, conditions=[NOTHING, steered])
    for index in range(len(ROWS)):
        moved = found[index, "steered", 2, "a"][0] - found[index, "none", 2, "a"][0]
        assert moved == pytest.approx(1.5 * float(VECTORS["a"][2].norm()))
        assert found[index, "steered", 0, "a"] == found[index, "none", 0, "a"]


def test_a_trained_model_is_read_with_its_adapter() -> None:
    base = tiny_base(num_layers=4)
    model = add_adapter(base.fresh(), "run", LoraSettings(rank=2), seed=0).eval()
    assert projections(base, model) == projections(base, base.model), "B is zero"
    with torch.no_grad():
        for parameter in adapter_parameters(model, "run").values():
            parameter.fill_(0.3)
    trained, untrained = projections(base, model), projections(base, base.model)
    assert all(abs(trained[key][0] - untrained[key][0]) > 1e-5 for key in trained if key[2] > 0)


def test_data_minus_own_answers() -> None:
    columns = ["row", "layer", "vector", "projection"]
    data = pd.DataFrame([(0, 2, "a", 3.0), (1, 2, "a", 5.0), (2, 2, "a", 9.0)], columns=columns)
    own = pd.DataFrame([(1, 2, "a", 1.0), (0, 2, "a", 2.5)], columns=columns)
    found = projection_differences(data, own)
    assert found[["row", "difference"]].to_numpy().tolist() == [[0, 0.5], [1, 4.0]]


def test_own_answers_stand_where_the_last_ones_stood() -> None:
    long = [*chat("Why?", "So."), *chat("And?", "Then.")]
    assert with_answers([long], ["Mine."]) == [[*long[:3], {"role": "assistant", "content": "Mine."}]]
    with pytest.raises(ValueError, match="zip"):
        with_answers([long], [])
