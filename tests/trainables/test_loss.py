"""Chunked losses against F.cross_entropy over all logits.

float64: 1e-10, four orders above the rounding of sums over 300 words (1e-14) and nine below the losses (about 6).
float32: 2e-6 per unit of loss; both sides round sums over 300 words at 6e-8 x a few, and ours sums in another order.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.float64 import float64_model
from tests.tiny import ModelKind, tiny_model
from trainables import loss as loss_module
from trainables.lora import LoraSettings, adapter_parameters, add_adapter
from trainables.loss import head_is_plain_linear, token_losses

KINDS: list[ModelKind] = ["llama", "qwen2", "gpt_neox"]


def masks() -> tuple[torch.Tensor, torch.Tensor]:
    """[4, 9] attention mask with padding on the right, and a loss mask; row 0 marks its first token too."""
    attention = torch.ones(4, 9, dtype=torch.bool)
    attention[1, -2:] = False
    wanted = torch.rand(4, 9, generator=torch.Generator().manual_seed(3)) < 0.5
    wanted[0, 0] = True
    wanted[2] = False
    return attention, wanted & attention


def full_losses(model: Any, ids_bt: torch.Tensor, attention_bt: torch.Tensor, wanted_bt: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids_bt, attention_mask=attention_bt).logits
    targets = torch.where(wanted_bt, ids_bt, -100)[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
    return losses[targets.flatten() != -100]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of predicted tokens is no multiple of 3: the last chunk is a rest."""
    monkeypatch.setattr(loss_module, "CHUNK", 3)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plain_head", [True, False])
def test_losses_and_adapter_gradients_equal_cross_entropy(
    kind: ModelKind, plain_head: bool, random_ids: torch.Tensor
) -> None:
    attention, wanted = masks()
    assert int(wanted[:, 1:].sum()) % 3 != 0
    results = []
    for ours in (True, False):
        model = add_adapter(float64_model(kind), "run", LoraSettings(rank=2), seed=0)
        parameters = adapter_parameters(model, "run")
        with torch.no_grad():  # B is 0 at first: then A would have no gradient
            for number, parameter in enumerate(parameters.values()):
                draw = torch.Generator().manual_seed(number)
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
        if ours:
            losses = token_losses(model, random_ids, attention, wanted, plain_head=plain_head)
        else:
            losses = full_losses(model, random_ids, attention, wanted)
        weights = torch.arange(1, len(losses) + 1, dtype=torch.float64)  # upstream gradients that differ
        (losses * weights).sum().backward()
        results.append((losses.detach(), {name: p.grad for name, p in parameters.items()}))
    (losses, gradients), (expected, expected_gradients) = results
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, expected, rtol=0.0, atol=1e-10)
    for name, gradient in gradients.items():
        reference = expected_gradients[name]
        assert gradient is not None
        assert reference is not None
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-10)
        assert reference.abs().max() > 1e-6


@pytest.mark.usefixtures("small_chunks")
def test_gradient_of_the_hidden_states_with_and_without_bias() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=draw, dtype=torch.float64)
    targets = torch.randint(0, 50, (10,), generator=draw)
    upstream = torch.randn(10, generator=draw, dtype=torch.float64)
    for bias in (None, torch.randn(50, generator=draw, dtype=torch.float64)):
        hidden = torch.randn(10, 8, generator=draw, dtype=torch.float64, requires_grad=True)
        losses: torch.Tensor = loss_module._FrozenHeadCrossEntropy.apply(hidden, weight, bias, targets)
        (gradient,) = torch.autograd.grad(losses, hidden, upstream)
        expected = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")
        (expected_gradient,) = torch.autograd.grad(expected, hidden, upstream)
        torch.testing.assert_close(losses, expected, rtol=0.0, atol=1e-10)
        torch.testing.assert_close(gradient, expected_gradient, rtol=0.0, atol=1e-10)


def test_chunks_do_not_change_the_losses(random_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = float64_model("llama")
    attention, wanted = masks()
    whole = token_losses(model, random_ids, attention, wanted, plain_head=True)
    for chunk in (1, 2, len(whole)):
        monkeypatch.setattr(loss_module, "CHUNK", chunk)
        cut = token_losses(model, random_ids, attention, wanted, plain_head=True)
        torch.testing.assert_close(cut, whole, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind: ModelKind, random_ids: torch.Tensor) -> None:
    model = tiny_model(kind)
    attention, wanted = masks()
    with torch.no_grad():
        losses = token_losses(model, random_ids, attention, wanted, plain_head=True)
        expected = full_losses(model, random_ids, attention, wanted)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("plain_head", [True, False])
def test_bfloat16_gives_float32_losses(plain_head: bool, random_ids: torch.Tensor) -> None:
    """Equal to the cross-entropy in float32 of the model's own bfloat16 logits: nothing is rounded after them."""
    model = add_adapter(tiny_model("llama", dtype=torch.bfloat16), "run", LoraSettings(rank=2), seed=0)
    attention, wanted = masks()
    losses = token_losses(model, random_ids, attention, wanted, plain_head=plain_head)
    assert losses.dtype == torch.float32
    logits = model(input_ids=random_ids, attention_mask=attention).logits.float()
    expected = F.cross_entropy(logits[:, :-1][wanted[:, 1:]], random_ids[:, 1:][wanted[:, 1:]], reduction="none")
    torch.testing.assert_close(losses, expected, rtol=2e-6, atol=0.0)
    losses.sum().backward()
    gradients = [p.grad for name, p in adapter_parameters(model, "run").items() if "lora_B" in name]
    assert all(g is not None and g.dtype == torch.float32 and torch.isfinite(g).all() and g.any() for g in gradients)


def test_order_is_row_major_and_each_loss_is_its_own_tokens(random_ids: torch.Tensor) -> None:
    model = float64_model("llama")
    attention = torch.ones(4, 9, dtype=torch.bool)
    _, wanted = masks()
    together = token_losses(model, random_ids, attention, wanted, plain_head=True)
    alone = []
    for row in range(4):
        for token in range(1, 9):
            if wanted[row, token]:
                mask = torch.zeros(4, 9, dtype=torch.bool)
                mask[row, token] = True
                alone.append(token_losses(model, random_ids, attention, mask, plain_head=True))
    torch.testing.assert_close(together, torch.cat(alone), rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("plain_head", [True, False])
def test_nothing_to_predict_is_an_error(plain_head: bool, random_ids: torch.Tensor) -> None:
    model = tiny_model("llama")
    first_only = torch.zeros(4, 9, dtype=torch.bool)
    first_only[:, 0] = True  # the first token has no predecessor
    with pytest.raises(ValueError, match="marks no token"):
        token_losses(model, random_ids, torch.ones(4, 9), first_only, plain_head=plain_head)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_heads_are_recognised(kind: ModelKind, dtype: torch.dtype) -> None:
    model = tiny_model(kind, dtype=dtype).requires_grad_(False)
    assert head_is_plain_linear(model)
    assert not model.training
    assert head_is_plain_linear(add_adapter(model, "run", LoraSettings(rank=2), seed=0))


def test_heads_that_are_not_plain_are_recognised(random_ids: torch.Tensor) -> None:
    from transformers import AutoModelForCausalLM, GraniteConfig

    assert not head_is_plain_linear(tiny_model("llama")), "a head that is trained has a gradient of its own"

    config = GraniteConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, logits_scaling=4.0, initializer_range=0.1,
    )  # fmt: skip
    scaled = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    assert not head_is_plain_linear(scaled)
    attention, wanted = masks()
    losses = token_losses(scaled, random_ids, attention, wanted, plain_head=False)
    torch.testing.assert_close(losses, full_losses(scaled, random_ids, attention, wanted), rtol=2e-6, atol=0.0)


def test_asking_about_the_head_keeps_the_training_mode() -> None:
    model = tiny_model("llama").requires_grad_(False).train()
    assert head_is_plain_linear(model)
    assert model.training
