"""Our norms and rotary embeddings against the models' own, and against what they must not touch.

float64: 1e-10 where the model's own version computes in float64 too. transformers' RMS norms compute in float32 in any
model: there float32's rounding is the bound, 1e-7 in a norm of values near 1, and 1e-4 is asked of gradients near 50
that have come through nine of them.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.float64 import float64_model
from tests.tiny import ModelKind, tiny_model
from trainables.lora import LoraSettings, add_adapter
from trainables.native_ops import _FrozenRmsNorm, _Rotation, native_ops

# norms and rotary embeddings that are replaced, of those in a model of two blocks
REPLACED: dict[ModelKind, tuple[int, int]] = {
    "llama": (5, 2),
    "qwen2": (5, 2),
    "qwen3": (9, 2),  # queries and keys have norms of their own
    "gemma": (5, 2),
    "mistral": (5, 2),
    "gpt_neox": (0, 2),
}


def loss_and_gradient(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of a function of them with respect to the embeddings."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
    (logits * weights).sum().backward()
    assert embedded.grad is not None
    return logits.detach(), embedded.grad


@pytest.mark.parametrize("kind", list(REPLACED))
def test_every_kind_of_model_computes_the_same(kind: ModelKind, random_ids: torch.Tensor) -> None:
    model: Any = tiny_model(kind, num_layers=2, dtype=torch.float64).requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():  # all ones (zeros in Gemma) at first: a scale that is left out would not be seen
        if type(module).__name__.endswith("Norm"):
            module.weight.copy_(0.5 + torch.rand(module.weight.shape, generator=generator, dtype=torch.float64))
    expected = loss_and_gradient(model, random_ids)
    with native_ops(model) as replaced:
        assert (replaced.norms, replaced.rotations) == REPLACED[kind]
        assert (replaced.norms, replaced.rotations) == (replaced.all_norms, replaced.all_rotations)
        found = loss_and_gradient(model, random_ids)
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-4)
    assert not torch.equal(found[1], expected[1]), "other operations have been used"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox"])
def test_equal_in_float64(kind: ModelKind, random_ids: torch.Tensor) -> None:
    model = float64_model(kind, num_layers=3)
    expected = loss_and_gradient(model, random_ids)
    with native_ops(model) as replaced:
        assert replaced.norms + replaced.rotations > 0
        found = loss_and_gradient(model, random_ids)
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-10)


def test_gradients_equal_finite_differences() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 3, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    scale, cos, sin = (torch.randn(8, generator=draw, dtype=torch.float64) for _ in range(3))
    assert torch.autograd.gradcheck(lambda x: _FrozenRmsNorm.apply(x, scale, 1e-5), (inputs,))
    assert torch.autograd.gradcheck(lambda x: _Rotation.apply(x, cos, sin), (inputs,))
    assert torch.autograd.gradcheck(lambda x: _Rotation.apply(x, cos[:4], sin[:4]), (inputs,))


@pytest.mark.parametrize("kind", list(REPLACED))
def test_without_gradients_and_afterwards_it_is_the_models_own(kind: ModelKind, random_ids: torch.Tensor) -> None:
    model = tiny_model(kind, num_layers=2).requires_grad_(False)
    classes = {type(module): type(module).forward for module in model.modules()}
    expected = loss_and_gradient(model, random_ids)
    with native_ops(model), torch.no_grad():
        assert torch.equal(model(input_ids=random_ids).logits, expected[0])
    with pytest.raises(KeyError), native_ops(model):
        raise KeyError("comes off on any exit")
    assert all(torch.equal(*pair) for pair in zip(loss_and_gradient(model, random_ids), expected, strict=True))
    assert all(cls.forward is forward for cls, forward in classes.items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_another_copy_of_the_model_is_left_alone(random_ids: torch.Tensor) -> None:
    model = tiny_model(num_layers=2).requires_grad_(False)
    other = copy.deepcopy(model)
    expected = loss_and_gradient(other, random_ids)
    with native_ops(model):
        assert all(torch.equal(*pair) for pair in zip(loss_and_gradient(other, random_ids), expected, strict=True))


def test_what_cannot_be_replaced_is_counted_and_stays() -> None:
    model: Any = tiny_model(num_layers=2).requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)  # a norm that is trained has a gradient of its own
    model.model.layers[0].input_layernorm.forward = lambda hidden_states: 2 * hidden_states  # somebody's own
    model.model.layers[1].input_layernorm = CappedRMSNorm(32)  # another formula under a name like the others
    with native_ops(model) as replaced:
        assert (replaced.norms, replaced.all_norms) == (2, 5)
        assert str(replaced) == "2 of 5 norms, 2 of 2 rotary embeddings"
        assert torch.equal(model.model.layers[0].input_layernorm(torch.ones(1, 1, 32)), 2 * torch.ones(1, 1, 32))
    assert "forward" in vars(model.model.layers[0].input_layernorm)


class CappedRMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)
        self.eps = 1e-6

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        root = hidden_states.square().mean(-1, keepdim=True).add(self.eps).rsqrt()
        return self.weight * (hidden_states * root).clamp(-1, 1)


def test_another_rotation_stays(random_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    def interleaved(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return q * cos[:, None] - q.roll(1, -1) * sin[:, None], k * cos[:, None] - k.roll(1, -1) * sin[:, None]

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", interleaved)
    model = tiny_model(num_layers=2).requires_grad_(False)
    expected = loss_and_gradient(model, random_ids)
    with native_ops(model) as replaced:
        assert (replaced.rotations, replaced.all_rotations) == (0, 2)
        found = loss_and_gradient(model, random_ids)
    torch.testing.assert_close(found[0], expected[0])


def test_bfloat16_stays() -> None:
    with native_ops(tiny_model(num_layers=2, dtype=torch.bfloat16).requires_grad_(False)) as replaced:
        assert (replaced.norms, replaced.rotations) == (0, 0)


def test_with_adapters_of_peft(random_ids: torch.Tensor) -> None:
    model: Any = add_adapter(tiny_model(num_layers=2).requires_grad_(False), "run", LoraSettings(rank=2), seed=0)
    with native_ops(model) as replaced:
        assert (replaced.norms, replaced.rotations) == (5, 2)
        copied = copy.deepcopy(model)
        logits = copied(input_ids=random_ids).logits
    torch.testing.assert_close(model(input_ids=random_ids).logits, logits, rtol=1e-5, atol=1e-5)
