"""Products with frozen weights are the same mathematics whichever library does them; small ones stay as they were."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from trainables import frozen_products
from trainables.frozen_products import MIN_NUMEL, back, is_faster, linear
from trainables.lora_linear import use_lora_linear

# float32 sums of up to 700 terms, relative to the largest entry: each rounding is 6e-8, errors grow like their root
TOLERANCE = 2e-6


@pytest.fixture(autouse=True)
def decided_anew() -> Iterator[None]:
    is_faster.cache_clear()
    yield
    is_faster.cache_clear()


def use_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where it is the faster one."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch was built without oneDNN")
    monkeypatch.setattr(frozen_products, "_is_amd", lambda: True)
    assert is_faster()


def draws(m: int, o: int, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    sizes = ((m, i), (o, i), (o,), (m, o))
    one, two, three, four = (torch.randn(*size, generator=draw) for size in sizes)
    return one, two, three, four


@pytest.mark.parametrize("size", [(1, 576, 192), (37, 192, 576), (64, 600, 700)])
def test_products_are_those_of_float64(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int]) -> None:
    use_onednn(monkeypatch)
    x_mi, weight_oi, bias_o, gradient_mo = draws(*size)
    found = (linear(x_mi, weight_oi, None), linear(x_mi, weight_oi, bias_o), back(gradient_mo, weight_oi))
    wide = [tensor.double() for tensor in (x_mi, weight_oi, bias_o, gradient_mo)]
    wanted = (F.linear(wide[0], wide[1]), F.linear(wide[0], wide[1], wide[2]), wide[3] @ wide[1])
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).abs().max() <= TOLERANCE * other.abs().max()


def test_rows_that_are_a_view_are_read_right(monkeypatch: pytest.MonkeyPatch) -> None:
    use_onednn(monkeypatch)
    x_mi, weight_oi, _, _ = draws(20, 576, 192)
    every_other = x_mi[::2]
    assert torch.equal(linear(every_other, weight_oi, None), linear(every_other.contiguous(), weight_oi, None))


def test_the_same_product_twice_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    use_onednn(monkeypatch)
    x_mi, weight_oi, _, gradient_mo = draws(40, 576, 192)
    assert torch.equal(linear(x_mi, weight_oi, None), linear(x_mi.clone(), weight_oi.clone(), None))
    assert torch.equal(back(gradient_mo, weight_oi), back(gradient_mo.clone(), weight_oi.clone()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stay_as_they_are(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    use_onednn(monkeypatch)
    x_mi, weight_oi, bias_o, gradient_mo = (tensor.to(dtype) for tensor in draws(9, 576, 192))
    assert torch.equal(linear(x_mi, weight_oi, bias_o), F.linear(x_mi, weight_oi, bias_o))
    assert torch.equal(back(gradient_mo, weight_oi), gradient_mo @ weight_oi)


def test_small_weights_and_other_processors_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("oneDNN was called")

    large, small = draws(9, 576, 192), draws(9, MIN_NUMEL // 64 - 1, 64)
    use_onednn(monkeypatch)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", refuse)
    with pytest.raises(AssertionError, match="oneDNN"):
        linear(large[0], large[1], None)
    assert torch.equal(linear(small[0], small[1], None), F.linear(small[0], small[1]))
    monkeypatch.setattr(frozen_products, "_is_amd", lambda: False)
    is_faster.cache_clear()
    assert torch.equal(back(large[3], large[1]), large[3] @ large[1])


@pytest.mark.parametrize("fault", ["raises", "is wrong"])
def test_an_operator_that_has_changed_is_not_used(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def changed(x_mi: torch.Tensor, weight_oi: torch.Tensor, *_: object) -> torch.Tensor:
        if fault == "raises":
            raise RuntimeError("expected at most 5 arguments")
        return F.linear(x_mi, weight_oi) * (1 + 1e-3)

    monkeypatch.setattr(frozen_products, "_is_amd", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", changed)
    assert not is_faster()


def test_a_lora_module_has_the_gradients_of_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    use_onednn(monkeypatch)
    used: list[bool] = []
    own = frozen_products._by_onednn

    def note(one_m: torch.Tensor, weight_oi: torch.Tensor) -> bool:
        used.append(own(one_m, weight_oi))
        return used[-1]

    monkeypatch.setattr(frozen_products, "_by_onednn", note)
    torch.manual_seed(0)
    parent = nn.Sequential()
    parent.add_module("linear", nn.Linear(256, 192).requires_grad_(False))
    model: Any = get_peft_model(parent, LoraConfig(r=4, lora_alpha=8, target_modules=["linear"]))
    nn.init.normal_(model.base_model.model.linear.lora_B["default"].weight)
    reference = copy.deepcopy(model)
    use_lora_linear(model)
    x_mi, _, _, upstream_mo = draws(30, 192, 256)
    found = []
    for one in (model, reference):
        leaf = x_mi.clone().requires_grad_()
        value = one(leaf)
        value.backward(upstream_mo)
        found.append([value.detach(), leaf.grad, *(p.grad for p in one.parameters() if p.requires_grad)])
    assert used == [True, True]  # forward and backward
    for ours, expected in zip(*found, strict=True):
        assert (ours - expected).abs().max() <= TOLERANCE * expected.abs().max()
