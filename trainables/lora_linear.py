"""A linear module with a LoRA adapter on it, as a training computes it.

Legend: m positions (all dimensions but the last, flattened), i inputs, o outputs, r rank.

    y_mo = x_mi W_oi^T + bias_o + s (x_mi A_ri^T) B_or^T

PEFT's own forward pass multiplies the low-rank part by s and adds it to the rest in two operations of the size of y,
and as many again in the backward pass, which do nothing but move memory. Here the matrix product that makes the
low-rank part adds it itself, and s goes to products of size [m, r] and [o, r]. PEFT's modules stay where they are and
own the parameters; only the arithmetic of the forward pass of a training is another one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as PeftLinear
from torch import nn


class LoraLinear(PeftLinear):  # type: ignore[misc]
    """PEFT's ``lora.Linear`` with another forward pass for a training; everything else is PEFT's."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = self._plain_adapter() if torch.is_grad_enabled() and not args and not kwargs else None
        if name is None:
            result: torch.Tensor = super().forward(x, *args, **kwargs)
            return result
        a_ri, b_or = self.lora_A[name].weight, self.lora_B[name].weight
        x_mi = x.flatten(0, -2)
        base_mo = F.linear(x_mi, self.base_layer.weight, self.base_layer.bias)
        # a float32 adapter over bfloat16 weights acts in float32 and the sum is rounded once, as PEFT does it
        low_mr = F.linear(self.lora_dropout[name](x.to(a_ri.dtype)).flatten(0, -2), a_ri)
        sum_mo = torch.addmm(base_mo.to(a_ri.dtype), low_mr, b_or.t(), alpha=self.scaling[name])
        return sum_mo.to(base_mo.dtype).unflatten(0, x.shape[:-1])

    def _plain_adapter(self) -> str | None:
        """The one active adapter, if it is trained, is LoRA without further parts, and nothing is hooked; else None."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or self.disable_adapters or self.merged or self.lora_variant:
            return None
        (name,) = active
        parts = (self.base_layer, self.lora_A[name], self.lora_B[name])
        plain = all(type(part) is nn.Linear and not _is_hooked(part) for part in parts)
        trained = all(part.weight.requires_grad and part.bias is None for part in parts[1:])
        return name if plain and trained else None


def _is_hooked(module: nn.Module) -> bool:
    """Whether something wants to see calls of the module (ZeRO stage 3 gathers weights so), or has replaced them."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in vars(module))


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
