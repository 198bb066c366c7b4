"""Our forward pass of a LoRA module against PEFT's own.

float64: 1e-10, where rounding is near 1e-14; 1e-4 for models whose norms compute in float32 whatever they are given
(their rounding, 1e-7, grows on the way through the blocks). bfloat16: both sides take the sum in float32 and round it
once; where the float32 sums fall on two sides of a rounding border, results are one bfloat16 step apart, 2^-8 relative.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from tests.float64 import float64_model
from tests.tiny import ModelKind, tiny_model
from trainables.lora import LoraSettings, adapter_parameters, add_adapter, set_dropout_key
from trainables.lora_linear import LoraLinear, use_lora_linear

KINDS: list[ModelKind] = ["llama", "qwen2", "gpt_neox"]
FLOAT32_NORMS: list[ModelKind] = ["qwen3", "gemma", "mistral"]


def adapted(model: Any, settings: LoraSettings, *names: str) -> Any:
    """``model`` with adapters under ``names`` that act; the last one is active."""
    model = model.requires_grad_(False)
    for seed, name in enumerate(names):
        model = add_adapter(model, name, settings, seed=seed)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter_parameters(model, name).values():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
        model.set_adapter(name)
    return model


def logits_and_gradients(model: Any, ids: torch.Tensor, name: str = "run") -> dict[str, torch.Tensor]:
    logits = model(input_ids=ids, use_cache=False).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (logits * weights.to(logits.dtype)).sum().backward()
    found = {"logits": logits.detach()}
    for parameter_name, parameter in adapter_parameters(model, name).items():
        assert parameter.grad is not None
        assert parameter.grad.any()
        found[parameter_name] = parameter.grad
    return found


def both(model: Any, ids: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits and gradients by ours and by PEFT's forward pass."""
    reference = copy.deepcopy(model)
    assert use_lora_linear(model) == sum(isinstance(module, PeftLinear) for module in reference.modules()) > 0
    ours, expected = logits_and_gradients(model, ids), logits_and_gradients(reference, ids)
    assert ours.keys() == expected.keys()
    return ((ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [8.0, 5.0])  # 5 / 4 is no power of two
def test_equals_peft_in_float64(kind: ModelKind, alpha: float, random_ids: torch.Tensor) -> None:
    model = adapted(float64_model(kind, num_layers=2), LoraSettings(rank=4, alpha=alpha), "run")
    for value, expected in both(model, random_ids):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", FLOAT32_NORMS)
def test_equals_peft_in_other_models(kind: ModelKind, random_ids: torch.Tensor) -> None:
    model = adapted(tiny_model(kind, num_layers=2, dtype=torch.float64), LoraSettings(rank=4, alpha=8), "run")
    for value, expected in both(model, random_ids):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def test_equals_peft_with_dropout(random_ids: torch.Tensor) -> None:
    model = adapted(float64_model(num_layers=2), LoraSettings(rank=4, dropout=0.4), "run").train()
    set_dropout_key(model, "run", (0, 1))
    for value, expected in both(model, random_ids):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


def test_a_bfloat16_base_keeps_float32_adapters() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["linear"])
    parent = nn.Sequential()
    parent.add_module("linear", nn.Linear(64, 48, dtype=torch.bfloat16).requires_grad_(False))
    model: Any = get_peft_model(parent, config)  # type: ignore[arg-type,unused-ignore]
    nn.init.normal_(model.base_model.model.linear.lora_B["default"].weight)
    reference = copy.deepcopy(model)
    assert use_lora_linear(model) == 1
    results = []
    for one in (model, reference):
        inputs = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        output = one(inputs)
        assert output.dtype == torch.bfloat16
        output.backward(torch.randn(5, 7, 48, generator=torch.Generator().manual_seed(2)).bfloat16())
        layer = one.base_model.model.linear
        a, b = layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
        assert a.dtype == b.dtype == torch.float32
        results.append((output.detach().float(), inputs.grad.float(), a, b))  # type: ignore[union-attr]
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_bit(use_reentrant: bool, random_ids: torch.Tensor) -> None:
    plain = adapted(tiny_model(num_layers=2), LoraSettings(rank=4, dropout=0.3), "run").train()
    use_lora_linear(plain)
    set_dropout_key(plain, "run", (0,))
    checkpointed = copy.deepcopy(plain)
    checkpointed.enable_input_require_grads()
    checkpointed.get_base_model().gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    ours, other = (logits_and_gradients(model, random_ids) for model in (plain, checkpointed))
    assert all(torch.equal(ours[name], other[name]) for name in ours)


def spied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every call of PEFT's own forward pass."""
    calls: list[int] = []
    own = PeftLinear.forward

    def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        return own(self, *arguments, **keywords)

    monkeypatch.setattr(PeftLinear, "forward", forward)
    return calls


def test_peft_does_what_is_not_a_training(random_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling and measuring compute what they compute with an adapter that PEFT has loaded, to the bit."""
    model = adapted(tiny_model(num_layers=2), LoraSettings(rank=4), "one", "two")
    reference = copy.deepcopy(model)
    modules = use_lora_linear(model)
    calls = spied(monkeypatch)

    def same(**keywords: Any) -> bool:
        before = len(calls)
        logits = model(input_ids=random_ids, **keywords).logits
        assert len(calls) - before == modules, "every module has used PEFT's forward pass"
        return torch.equal(logits, reference(input_ids=random_ids, **keywords).logits)

    with torch.no_grad():
        assert same()
    for one in (model, reference):
        one.base_model.set_adapter(["one", "two"])
    assert same(), "two active adapters"
    for one in (model, reference):
        one.set_adapter("two")
        one.requires_grad_(False)
    assert same(), "frozen"
    with model.disable_adapter(), reference.disable_adapter():
        assert same(), "switched off"
    for one in (model, reference):
        one.merge_adapter()
    assert same(), "merged"


def test_training_does_not_use_pefts_forward_pass(random_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny_model(num_layers=2), LoraSettings(rank=4), "one", "two")
    use_lora_linear(model)
    calls = spied(monkeypatch)
    logits_and_gradients(model, random_ids, "two")
    assert calls == []


@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B"])
def test_whoever_hooks_a_part_is_called(part: str, random_ids: torch.Tensor) -> None:
    model = adapted(tiny_model(num_layers=2), LoraSettings(rank=4), "run")
    use_lora_linear(model)
    layer = next(module for module in model.modules() if isinstance(module, LoraLinear))
    hooked = layer.base_layer if part == "base_layer" else getattr(layer, part)["run"]
    seen: list[int] = []
    hooked.register_forward_hook(lambda *_: seen.append(1))
    model(input_ids=random_ids)
    assert seen == [1]


def test_other_kinds_of_lora_stay_pefts(random_ids: torch.Tensor) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True, lora_bias=False)
    dora: Any = get_peft_model(tiny_model(num_layers=2), config)
    expected = dora(input_ids=random_ids).logits
    use_lora_linear(dora)
    assert torch.equal(dora(input_ids=random_ids).logits, expected)


def test_nothing_but_the_forward_pass_is_another(random_ids: torch.Tensor) -> None:
    model = adapted(tiny_model(num_layers=2), LoraSettings(rank=4), "run")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    count = use_lora_linear(model)
    assert use_lora_linear(model) == count, "once is enough"
    logits_and_gradients(model, random_ids)
    assert [name for name, _ in model.named_modules()] == names
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
