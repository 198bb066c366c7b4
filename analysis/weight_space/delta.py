"""What a finetuning changed: Delta = theta_finetuned - theta_base, matrix by matrix, of a LoRA adapter.

Delta of a matrix is kept as its two factors. It has at most the adapter's rank, so its singular spaces are exact and
cost little: with QR decompositions up = Q_u R_u and down^T = Q_d R_d, the singular vectors are Q_u and Q_d times those
of the small matrix R_u R_d^T. A parameter without an adapter has no Delta.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from trainables.model_parts import causal_lm


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrix ``up_or @ down_ri``, [out, in], of the shape of the parameter."""

    up_or: torch.Tensor
    down_ri: torch.Tensor

    def values(self) -> torch.Tensor:
        """The whole matrix."""
        return self.up_or @ self.down_ri

    def singular(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(U [out, r], s [r], V [in, r]), float64, s falling; r is the smallest of the three sizes."""
        q_up, r_up = torch.linalg.qr(self.up_or.double())
        q_down, r_down = torch.linalg.qr(self.down_ri.double().T)
        left, values, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
        return q_up @ left, values, q_down @ right.T


AdapterDelta: TypeAlias = Mapping[str, LowRank]
"""Delta by the name of the parameter."""


def delta_of_adapter(model: Any, adapter: str, base: nn.Module) -> dict[str, LowRank]:
    """Delta of one adapter of a PeftModel over ``base``, whose parameters it shares, by the base's own names.

    On the CPU, in the dtype of the adapter; the scale is in ``up_or``.
    """
    from peft.tuners.lora import LoraLayer

    names = {id(parameter): name for name, parameter in causal_lm(base).named_parameters()}
    found = {}
    for module in model.modules():
        if not isinstance(module, LoraLayer) or adapter not in module.lora_A:
            continue
        weight = module.get_base_layer().weight
        up, down = module.lora_B[adapter].weight.detach(), module.lora_A[adapter].weight.detach()
        up = up * module.scaling[adapter]
        if getattr(module, "fan_in_fan_out", False):  # its matrix is kept as [in, out]
            up, down = down.T, up.T
        found[names[id(weight)]] = LowRank(up.cpu(), down.cpu())
    return found


def percentile_of_sizes(matrices: Iterable[torch.Tensor], percent: float) -> float:
    """The ``percent``-th percentile of |x| over all entries of all float32 matrices: the smallest size such that at
    least this share of the entries are no larger.

    Exact, and with one matrix in memory at a time: sizes of float32 are ordered as their bits are, so the upper 16 bits
    are counted in a first pass and the lower 16 of those that decide in a second. ``matrices`` is gone through twice.
    """
    assert 0 < percent <= 100, percent
    upper = torch.zeros(1 << 16, dtype=torch.int64)
    for matrix in matrices:
        upper += torch.bincount(_bits(matrix) >> 16, minlength=1 << 16)
    total = int(upper.sum())
    assert total > 0, "there are no entries"
    wanted = max(1, -(-total * percent // 100))  # rounded up; counted from 1
    rising = upper.cumsum(0)
    first = int(torch.searchsorted(rising, int(wanted)))
    before = int(rising[first] - upper[first])
    lower = torch.zeros(1 << 16, dtype=torch.int64)
    for matrix in matrices:
        bits = _bits(matrix)
        lower += torch.bincount(bits[(bits >> 16) == first] & 0xFFFF, minlength=1 << 16)
    second = int(torch.searchsorted(lower.cumsum(0), int(wanted) - before))
    return float(torch.tensor([(first << 16) | second], dtype=torch.int32).view(torch.float32))


def _bits(matrix: torch.Tensor) -> torch.Tensor:
    """The bits of |x| as integers."""
    return matrix.abs().float().contiguous().view(torch.int32).flatten().long()
