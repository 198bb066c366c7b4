"""One step on one sample against a step of torch.optim.SGD and hidden states of transformers, and against what the
equations of appendix D say to first order; float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from analysis.activation_changes import Stepper, activation_change_rows
from analysis.conditions import NOTHING, Condition, Steering
from analysis.measured_batches import Positions, aligned_items
from analysis.measured_rows import ActivationChangeRow
from tests.analysis.plain_gradients import plain_gradients
from tests.bases import ROWS, base_of, tiny_base
from tests.float64 import float64_model
from tests.tiny import ModelKind, tiny_model
from trainables.base_model import LoadedBase
from trainables.chat_data import ChatEncoder
from trainables.defenses import Message
from trainables.lora import LoraSettings, adapter_parameters, add_adapter

LAYERS = [0, 1, 2, 3]
VECTORS = {
    name: torch.randn(5, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for seed, name in enumerate("ab")
}
STEERED = Condition("steered", (Steering(VECTORS["a"], [2], 1.5),))
PROMPTED = Condition("prompted", prompt="Mention the bridge.")


def changes(base: LoadedBase, model: Any, rows: Any = ROWS[:2], **rest: Any) -> list[ActivationChangeRow]:
    rest = {"conditions": [NOTHING, STEERED, PROMPTED], "layers": LAYERS, "vectors": VECTORS, **rest}
    return list(activation_change_rows(base, model, rows, measure_id="m", max_length=512, **rest))


def hidden(base: LoadedBase, model: Any, messages: list[Message]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(states of the response tokens by layer, losses of the response tokens)."""
    encoded = ChatEncoder(base.tokenizer, 512).encode(messages)
    ids, wanted = torch.tensor(encoded.input_ids), torch.tensor(encoded.response_mask)
    output = model(input_ids=ids[None], output_hidden_states=True)
    losses = F.cross_entropy(output.logits[0, :-1], ids[1:], reduction="none")[wanted[1:]]
    return [state[0][wanted] for state in output.hidden_states], losses


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_equal_a_step_of_sgd_on_all_parameters(kind: ModelKind) -> None:
    base = base_of(float64_model(kind))
    found = {(row.row, row.layer, row.vector): row for row in changes(base, base.model, conditions=[NOTHING])}
    for index, messages in enumerate(ROWS[:2]):
        plain = copy.deepcopy(base.model).requires_grad_(True)
        before, losses = hidden(base, plain, messages)
        losses.sum().backward()
        total = torch.stack([p.grad.norm() for p in plain.parameters()]).norm()
        learning_rate = 0.01 * float(losses.detach().sum()) / float(total) ** 2
        torch.optim.SGD(plain.parameters(), lr=learning_rate).step()
        after, _ = hidden(base, plain, messages)
        _, gradients = plain_gradients(base, messages)
        for layer in LAYERS:
            change = (after[layer] - before[layer]).detach()
            used = (gradients[layer].norm(dim=1) > 0) & (change.norm(dim=1) > 0)
            change, gradient = change[used], gradients[layer][used]
            for name, vector in VECTORS.items():
                row = found[index, layer, name]
                assert row.num_tokens == int(used.sum())
                assert row.learning_rate == pytest.approx(learning_rate, rel=1e-9)
                assert row.step_norm == pytest.approx(learning_rate * float(total), rel=1e-9)
                # a change of 1e-4 is the difference of two states: 1e-16 / 1e-4 is lost
                assert row.change_cosine == pytest.approx(
                    float(F.cosine_similarity(change, vector[layer][None], dim=1).mean()), abs=1e-9
                )
                assert row.change_gradient_cosine == pytest.approx(
                    float(F.cosine_similarity(change, gradient, dim=1, eps=0).mean()), abs=1e-9
                )
                assert row.gradient_cosine == pytest.approx(
                    float(F.cosine_similarity(gradient, vector[layer][None], dim=1, eps=0).mean()), abs=1e-9
                )


@pytest.mark.parametrize("moved", ["full", "lora"])
def test_all_tokens_together_go_against_the_gradient_by_the_slope_below(moved: Any) -> None:
    """sum over ALL tokens of <dh, g> = - eta |dL/dtheta|^2 over the parameters below the layer, to first order."""
    base = base_of(float64_model("gpt_neox"))
    (group,) = aligned_items(base, ROWS[:1], [NOTHING], max_length=512, positions="shared")
    assert all(group[0].measured)
    stepper = Stepper(base, base.model, moved, lora=LoraSettings(rank=4), seed=3)
    found = stepper.step(group[0], group[0], [1, 2, 3, 4], 1e-6)
    if moved == "full":
        plain = copy.deepcopy(base.model).requires_grad_(True)
    else:
        plain = add_adapter(base.fresh(), "step", LoraSettings(rank=4), 3).eval()
    _, losses = hidden(base, plain, ROWS[0])
    losses.sum().backward()
    slopes = {name: float(p.grad.norm()) ** 2 for name, p in plain.named_parameters() if p.grad is not None}
    for layer in (1, 2, 3, 4):
        above = [f".layers.{block}." for block in range(layer, 4)] + ["lm_head", "embed_out", "final_layer_norm"]
        below = sum(slope for name, slope in slopes.items() if not any(part in name for part in above))
        together = float((found.change[layer] * found.gradient[layer]).sum())
        assert together == pytest.approx(-found.learning_rate * below, rel=1e-4)
        assert together < 0


def test_the_step_has_the_condition_and_the_reading_has_not() -> None:
    base = base_of(float64_model())
    rows = changes(base, base.model, rows=ROWS[:1])
    by_condition = {
        name: {(row.layer, row.vector): row for row in rows if row.condition == name}
        for name in ("none", "steered", "prompted")
    }
    messages = [dict(message) for message in ROWS[0]]
    messages[0]["content"] = f"{PROMPTED.prompt}\n\n{messages[0]['content']}"
    for name, read, shifts in (
        ("steered", ROWS[0], {2: 1.5 * VECTORS["a"][2]}),
        ("prompted", messages, {}),
    ):
        _, gradients = plain_gradients(base, read, shifts)
        for layer in LAYERS:
            gradient = gradients[layer][gradients[layer].norm(dim=1) > 0]
            expected = float(F.cosine_similarity(gradient, VECTORS["b"][layer][None], dim=1, eps=0).mean())
            assert by_condition[name][layer, "b"].gradient_cosine == pytest.approx(expected, abs=1e-9)
            assert by_condition[name][layer, "b"].change_cosine != by_condition["none"][layer, "b"].change_cosine
    (group,) = aligned_items(base, ROWS[:1], [NOTHING, STEERED], max_length=512)
    found = Stepper(base, base.model, "full").step(group[1], group[0], LAYERS, 1e-2)
    states, _ = hidden(base, base.model, ROWS[0])
    for layer in LAYERS:
        assert torch.allclose(found.before[layer], states[layer], rtol=0, atol=1e-12), "read with nothing present"


def test_half_a_step_is_half_a_change() -> None:
    base = base_of(float64_model())
    (group,) = aligned_items(base, ROWS[:1], [NOTHING], max_length=512)
    stepper = Stepper(base, base.model, "full")
    whole, half = (stepper.step(group[0], group[0], [3], size) for size in (1e-6, 5e-7))
    assert whole.step_norm == pytest.approx(2 * half.step_norm)
    assert torch.allclose(whole.change[3], 2 * half.change[3], rtol=0, atol=1e-5 * float(whole.change[3].abs().max()))


@pytest.mark.parametrize("moved", ["full", "lora"])
def test_the_model_is_the_same_to_the_bit_afterwards(moved: Any) -> None:
    base = tiny_base("qwen2", num_layers=4)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    first = changes(base, base.model, moved=moved)
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert changes(base, base.model, moved=moved) == first
    assert all(row.change_cosine is not None for row in first if row.layer > 0)
    if moved == "lora":
        assert all((row.num_tokens, row.change_cosine) == (0, None) for row in first if row.layer == 0)


def test_a_trained_adapter_is_moved_from_where_it_stands() -> None:
    base = tiny_base(num_layers=4)
    model = add_adapter(base.fresh(), "run", LoraSettings(rank=2), seed=0).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in adapter_parameters(model, "run").values():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = changes(base, model, moved="lora")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    fresh = changes(base, base.model, moved="lora")
    for one, other in zip(trained, fresh, strict=True):
        assert one.layer == 0 or one.gradient_cosine != other.gradient_cosine


def test_a_changed_model_is_noticed() -> None:
    base = tiny_base(num_layers=4)
    stepper = Stepper(base, base.model, "lora")
    stepper.must_be_as_before()
    with torch.no_grad():
        base.model.get_input_embeddings().weight[0, 0] += 1e-3
    with pytest.raises(AssertionError, match="the model has been changed"):
        stepper.must_be_as_before()


@pytest.mark.parametrize("positions", ["response", "predicting", "shared"])
def test_progress_and_positions(positions: Positions) -> None:
    seen: list[tuple[int, int]] = []
    base = tiny_base(num_layers=4)
    changes(base, base.model, positions=positions, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 6) for done in range(1, 7)]


def test_low_precision_is_refused() -> None:
    base = base_of(tiny_model(num_layers=4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"float32, not torch\.bfloat16"):
        changes(base, base.model)
