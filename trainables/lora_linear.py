"""A linear module with a LoRA adapter on it, as a training computes it.

Legend: m positions (all dimensions but the last, flattened), i inputs, o outputs, r rank.

    y_mo = x_mi W_oi^T + bias_o + s (x_mi A_ri^T) B_or^T

PEFT's own forward pass multiplies the low-rank part by s and adds it to the rest in two operations of the size of y,
as many again follow in the backward pass, and there the two gradients of x are added once more: operations that do
nothing but move memory. Here the matrix products that make the low-rank parts add them where they belong, and s goes to
products of size [m, r]. PEFT's modules stay where they are and own the parameters; only the arithmetic is another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from trainables import frozen_products
from trainables.packed_lora import PackRows, packed_product


class _LoraProduct(torch.autograd.Function):
    """y [..., o] of ``inputs`` [..., i], with a frozen weight and bias; everything of one dtype.

    ``dropped``: what the low-rank part is made of in place of ``inputs`` (dropout), of the same shape, or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        dropped: torch.Tensor | None,
        weight_oi: torch.Tensor,
        bias_o: torch.Tensor | None,
        a_ri: torch.Tensor,
        b_or: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        x_mi = inputs.flatten(0, -2)
        low_mi = x_mi if dropped is None else dropped.flatten(0, -2)
        scaled_mr = torch.mm(low_mi, a_ri.t()).mul_(scaling)
        y_mo = frozen_products.linear(x_mi, weight_oi, bias_o).addmm_(scaled_mr, b_or.t())
        ctx.save_for_backward(low_mi, weight_oi, a_ri, b_or, scaled_mr)
        ctx.scaling, ctx.shape, ctx.is_dropped = scaling, inputs.shape, dropped is not None
        return y_mo.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        low_mi, weight_oi, a_ri, b_or, scaled_mr = ctx.saved_tensors
        g_mo = upstream[0].flatten(0, -2)
        g_mr = torch.mm(g_mo, b_or).mul_(ctx.scaling)
        for_inputs = for_dropped = None
        if ctx.needs_input_grad[0]:
            for_inputs = frozen_products.back(g_mo, weight_oi)
            if not ctx.is_dropped:
                for_inputs.addmm_(g_mr, a_ri)
            for_inputs = for_inputs.view(ctx.shape)
        if ctx.needs_input_grad[1]:
            for_dropped = torch.mm(g_mr, a_ri).view(ctx.shape)
        return for_inputs, for_dropped, None, None, torch.mm(g_mr.t(), low_mi), torch.mm(g_mo.t(), scaled_mr), None


class LoraLinear(PeftLinear):  # type: ignore[misc,unused-ignore]
    """PEFT's ``lora.Linear`` with another forward pass for a training; everything else is PEFT's.

    ``pack``: while it is set (``packed_lora.packed``), every row of the batch has the adapter of its own run.
    """

    pack: Sequence[PackRows] = ()

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.pack and torch.is_grad_enabled():
            return packed_product(self, x, self.pack)
        name = self._plain_adapter() if torch.is_grad_enabled() and not args and not kwargs else None
        if name is None:
            result: torch.Tensor = super().forward(x, *args, **kwargs)
            return result
        weight_oi, bias_o = self.base_layer.weight, self.base_layer.bias
        a_ri, b_or, scaling = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        dropped = self.lora_dropout[name](x.to(a_ri.dtype))
        if x.dtype == weight_oi.dtype == a_ri.dtype == b_or.dtype:
            product: torch.Tensor = _LoraProduct.apply(
                x, None if dropped is x else dropped, weight_oi, bias_o, a_ri, b_or, scaling
            )
            return product
        # A float32 adapter over bfloat16 weights acts in float32 and the sum is rounded once, as PEFT does it.
        base_mo = F.linear(x.flatten(0, -2), weight_oi, bias_o)
        low_mr = F.linear(dropped.flatten(0, -2), a_ri)
        sum_mo = torch.addmm(base_mo.to(a_ri.dtype), low_mr, b_or.t(), alpha=scaling)
        return sum_mo.to(base_mo.dtype).view(*x.shape[:-1], -1)

    def _plain_adapter(self) -> str | None:
        """The one active adapter, if nothing but the usual product is to be done with it; else None."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        return active[0] if len(active) == 1 and self.is_plain(active[0]) else None

    def is_plain(self, name: str) -> bool:
        """Whether an adapter is trained, is LoRA without further parts, and nothing is hooked."""
        if self.disable_adapters or self.merged or self.lora_variant:
            return False
        parts = (self.base_layer, self.lora_A[name], self.lora_B[name])
        plain = all(type(part) is nn.Linear and not _is_hooked(part) for part in parts)
        trained = all(part.weight.requires_grad and part.bias is None for part in parts[1:])
        frozen = not any(parameter.requires_grad for parameter in self.base_layer.parameters())
        return plain and trained and frozen


def _is_hooked(module: nn.Module) -> bool:
    """Whether something wants to see calls of the module (ZeRO stage 3 gathers weights so), or has replaced them."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def use_lora_linear(model: nn.Module) -> int:
    """Make every plain ``lora.Linear`` of ``model`` a ``LoraLinear``; returns how many of them there now are.

    A class has no state of its own here, so nothing but the forward pass of these modules changes. PEFT's modules of
    other kinds (quantised weights, Conv1D) stay as they are.
    """
    count = 0
    for module in model.modules():
        if type(module) is PeftLinear and type(module.base_layer) is nn.Linear:
            module.__class__ = LoraLinear
        count += isinstance(module, LoraLinear)
    return count
