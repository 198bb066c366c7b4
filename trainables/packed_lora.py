"""A linear module with the LoRA adapters of several runs on it, each acting on the rows of its own run.

Legend: b rows, t tokens, m = b t positions, i inputs, o outputs; g runs of like rows and adapters side by side, n
positions of one of them, r rank.

    y_mo = x_mi W_oi^T + bias_o         once, over the rows of all runs
    y_gno += s_g (x_gni A_gri^T) B_gor^T    per group of runs, as batched products over stacked A and B

The parameters stay PEFT's. A row depends on its own run alone: what is not finite in one run does not reach another.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainables import frozen_products
from trainables.errors import TrainingError
from trainables.lora import CounterDropout

if TYPE_CHECKING:
    from trainables.lora_linear import LoraLinear


@dataclass(frozen=True)
class PackRows:
    """Rows ``start`` to ``end`` of a batch are those of run ``name``; alone it would pad them to ``length`` tokens."""

    name: str
    start: int
    end: int
    length: int


@contextlib.contextmanager
def packed(model: nn.Module, pack: Sequence[PackRows]) -> Iterator[None]:
    """Give every row of the batches inside the context the adapter of its run.

    Keep it open until after the backward pass, which may run blocks again. ``pack`` is in the order of the rows and
    covers them all. Every module with an adapter must be a ``LoraLinear``, see ``can_be_packed``.
    """
    from trainables.lora_linear import LoraLinear

    modules = [module for module in model.modules() if isinstance(module, LoraLinear)]
    dropouts = [
        (dropout, rows.length)
        for module in modules
        for rows in pack
        if isinstance(dropout := module.lora_dropout[rows.name] if rows.name in module.lora_A else None, CounterDropout)
    ]
    try:
        for module in modules:
            module.pack = tuple(pack)
        for dropout, length in dropouts:
            dropout.length = length
        yield
    finally:
        for module in modules:
            module.pack = ()
        for dropout, _ in dropouts:
            dropout.length = None


def can_be_packed(model: nn.Module) -> bool:
    """Whether every module with adapters is one that ``packed`` reaches."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    from trainables.lora_linear import LoraLinear

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return all(isinstance(layer, LoraLinear) and all(map(layer.is_plain, layer.lora_A)) for layer in layers)


@dataclass(frozen=True)
class _Group:
    """Runs side by side that have as many rows and the same rank: one batched product."""

    start: int  # positions
    end: int
    size: int
    scalings: tuple[float, ...]
    is_dropped: bool


class _PackedProduct(torch.autograd.Function):
    """y [m, o] of x [m, i], with a frozen weight and bias, and the adapters of every group.

    ``tensors``: per group what the low-rank part is made of in place of x (dropout) or None; A of every run; B of every
    run. Adapters may be of a higher precision than x and W: their part is computed in it, and the sum rounded once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_mi: torch.Tensor,
        weight_oi: torch.Tensor,
        bias_o: torch.Tensor | None,
        groups: tuple[_Group, ...],
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        y_mo = frozen_products.linear(x_mi, weight_oi, bias_o)
        saved: list[torch.Tensor] = []
        for group, dropped_gni, a_list, b_list in _by_group(groups, tensors):
            a_gri, b_gor = torch.stack(a_list), torch.stack(b_list)
            low_gni = _part(x_mi, group) if dropped_gni is None else dropped_gni
            scaled_gnr = torch.bmm(low_gni.to(a_gri.dtype), a_gri.mT).mul_(_scalings(group, a_gri))
            part_gno = _part(y_mo, group)
            if part_gno.dtype == b_gor.dtype:
                part_gno.baddbmm_(scaled_gnr, b_gor.mT)
            else:
                part_gno.copy_(torch.baddbmm(part_gno.to(b_gor.dtype), scaled_gnr, b_gor.mT))
            saved.append(scaled_gnr)
        ctx.groups, ctx.num_tensors = groups, len(tensors)
        ctx.places = [place for place, tensor in enumerate(tensors) if tensor is not None]
        ctx.save_for_backward(x_mi, weight_oi, *saved, *(tensor for tensor in tensors if tensor is not None))
        return y_mo

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_mi, weight_oi, *rest = ctx.saved_tensors
        saved, kept = rest[: len(ctx.groups)], rest[len(ctx.groups) :]
        tensors: list[torch.Tensor | None] = [None] * ctx.num_tensors
        for place, tensor in zip(ctx.places, kept, strict=True):
            tensors[place] = tensor
        g_mo = upstream[0].contiguous()
        for_inputs = frozen_products.back(g_mo, weight_oi) if ctx.needs_input_grad[0] else None
        for_dropped: list[torch.Tensor | None] = []
        for_a: list[torch.Tensor] = []
        for_b: list[torch.Tensor] = []
        grouped = _by_group(ctx.groups, tensors)
        for scaled_gnr, (group, dropped_gni, a_list, b_list) in zip(saved, grouped, strict=True):
            a_gri, b_gor = torch.stack(a_list), torch.stack(b_list)
            g_gno = _part(g_mo, group).to(b_gor.dtype)
            low_gni = (_part(x_mi, group) if dropped_gni is None else dropped_gni).to(a_gri.dtype)
            g_gnr = torch.bmm(g_gno, b_gor).mul_(_scalings(group, b_gor))
            for_a += torch.bmm(g_gnr.mT, low_gni).unbind()
            for_b += torch.bmm(g_gno.mT, scaled_gnr).unbind()
            for_dropped.append(torch.bmm(g_gnr, a_gri) if dropped_gni is not None else None)
            if dropped_gni is None and for_inputs is not None:
                part_gni = _part(for_inputs, group)
                if part_gni.dtype == a_gri.dtype:
                    part_gni.baddbmm_(g_gnr, a_gri)
                else:
                    part_gni.add_(torch.bmm(g_gnr, a_gri).to(part_gni.dtype))
        return for_inputs, None, None, None, *for_dropped, *for_a, *for_b


def packed_product(module: LoraLinear, x: torch.Tensor, pack: Sequence[PackRows]) -> torch.Tensor:
    """What ``module`` makes of x [b, t, i] whose rows belong to the runs of ``pack``.

    Raises TrainingError where x is not rows by tokens: then nobody can say whose a position is.
    """
    if x.dim() != 3 or x.shape[0] != pack[-1].end:
        raise TrainingError(
            f"a module of this model takes inputs of the shape {tuple(x.shape)}, not rows by tokens: runs cannot share "
            "a forward pass; set `execution.packing: exact`"
        )
    num_tokens = x.shape[1]
    groups: list[_Group] = []
    dropped_of: list[torch.Tensor | None] = []
    parameters_a: list[torch.Tensor] = []
    parameters_b: list[torch.Tensor] = []
    for members in _side_by_side(module, pack):
        parts = [_dropped(module, rows, x) for rows in members]
        is_dropped = parts[0] is not None
        shape = (len(members), -1, x.shape[2])
        dropped_of.append(torch.cat([part for part in parts if part is not None]).view(shape) if is_dropped else None)
        scalings = tuple(float(module.scaling[rows.name]) for rows in members)
        span = (members[0].start * num_tokens, members[-1].end * num_tokens)
        groups.append(_Group(*span, len(members), scalings, is_dropped))
        parameters_a += [module.lora_A[rows.name].weight for rows in members]
        parameters_b += [module.lora_B[rows.name].weight for rows in members]
    weight_oi, bias_o = module.base_layer.weight, module.base_layer.bias
    y_mo: torch.Tensor = _PackedProduct.apply(
        x.flatten(0, 1), weight_oi, bias_o, tuple(groups), *dropped_of, *parameters_a, *parameters_b
    )
    return y_mo.view(*x.shape[:2], -1)


def _side_by_side(module: LoraLinear, pack: Sequence[PackRows]) -> list[list[PackRows]]:
    """The runs that have an adapter here, in groups that one batched product can do."""
    groups: list[list[PackRows]] = []
    last: tuple[int, int, int, bool] | None = None
    for rows in pack:
        if rows.name not in module.lora_A:
            continue
        num_rows, rank = rows.end - rows.start, module.lora_A[rows.name].weight.shape[0]
        is_dropped = _is_dropped(module, rows.name)
        if last == (rows.start, num_rows, rank, is_dropped):
            groups[-1].append(rows)
        else:
            groups.append([rows])
        last = (rows.end, num_rows, rank, is_dropped)
    return groups


def _is_dropped(module: LoraLinear, name: str) -> bool:
    dropout = module.lora_dropout[name]
    return isinstance(dropout, CounterDropout) and dropout.training and dropout.probability > 0


def _dropped(module: LoraLinear, rows: PackRows, x: torch.Tensor) -> torch.Tensor | None:
    """What the adapter of these rows [b, t, i] acts on, of the adapter's dtype; None: on the rows as they are."""
    if not _is_dropped(module, rows.name):
        return None
    dropped: torch.Tensor = module.lora_dropout[rows.name](
        x[rows.start : rows.end].to(module.lora_A[rows.name].weight.dtype)
    )
    return dropped


def _by_group(
    groups: Sequence[_Group], tensors: Sequence[torch.Tensor | None]
) -> Iterator[tuple[_Group, torch.Tensor | None, list[torch.Tensor], list[torch.Tensor]]]:
    """Every group with what it drops, its A and its B."""
    num_runs = sum(group.size for group in groups)
    parameters = [tensor for tensor in tensors[len(groups) :] if tensor is not None]
    first = 0
    for group, dropped in zip(groups, tensors, strict=False):
        last = first + group.size
        yield group, dropped, parameters[first:last], parameters[num_runs + first : num_runs + last]
        first = last


def _part(tensor_md: torch.Tensor, group: _Group) -> torch.Tensor:
    """The positions of a group as a view [g, n, d]."""
    return tensor_md[group.start : group.end].view(group.size, -1, tensor_md.shape[1])


def _scalings(group: _Group, like: torch.Tensor) -> torch.Tensor:
    """[g, 1, 1]."""
    return _scalings_tensor(group.scalings, like.dtype, like.device)


@functools.lru_cache(maxsize=256)
def _scalings_tensor(scalings: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(scalings, dtype=dtype, device=device)[
        :, None, None
    ]  # kept: a copy to a GPU at every call waits
