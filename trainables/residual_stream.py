"""The only place that hooks decoder layers: what is done to, and read from, the residual stream and its gradient.

Legend: b rows of the batch, n rows that an intervention concerns, t tokens, d hidden size, k directions.

Layers are embedding-inclusive: layer 0 is the embedding output (it can be read, never changed), layer l >= 1 is the
output of decoder block l - 1, the last one before the final norm. At one layer value interventions apply in the
order listed and readers see the result; readers of the gradient see it as it arrives, before any edit of this layer,
and edits of the gradient apply in the order listed and flow on to everything below.

Every intervention names the rows it concerns, so one batch can hold rows of several runs or several conditions; other
rows, and tokens outside of ``token_mask``, keep their values to the bit. Nothing is written in place: hooks return new
tensors, because the tensor a hook is given is also saved for the backward pass of the block that made it.

``rows`` are best left on the CPU: whether they are all rows of the batch is looked up without waiting for a GPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from trainables.model_parts import decoder_layers

GradientMode: TypeAlias = Literal["attenuate", "amplify", "neutralize", "block"]


@dataclass(frozen=True, eq=False)
class Add:
    """h[rows] + vector, at the tokens of ``token_mask``.

    vector: [d], or [n, d] with one vector per row of ``rows``; cast to the dtype of h.
    rows: [n] int64 distinct indices into the batch; None: all rows.
    token_mask: [n, t] bool; None: every position, padding too.
    """

    layer: int
    vector: torch.Tensor
    rows: torch.Tensor | None = None
    token_mask: torch.Tensor | None = None

    def apply(self, hidden_btd: torch.Tensor) -> torch.Tensor:
        shift = self.vector.to(device=hidden_btd.device, dtype=hidden_btd.dtype)
        shift_btd = shift if shift.dim() == 1 else shift[:, None, :]
        if self.token_mask is not None:
            mask_bt1 = self.token_mask.to(hidden_btd.device)[:, :, None]
            shift_btd = torch.where(mask_bt1, shift_btd, torch.zeros((), dtype=shift.dtype, device=shift.device))
        if _are_all(self.rows, hidden_btd):
            return hidden_btd + shift_btd
        assert self.rows is not None
        source_ntd = shift_btd.expand(self.rows.numel(), hidden_btd.shape[1], hidden_btd.shape[2])
        return hidden_btd.index_add(0, self.rows.to(hidden_btd.device), source_ntd)


@dataclass(frozen=True, eq=False)
class Cap:
    """Clamp the projection s = <h, a> of h[rows] on the unit vector a = direction / |direction|:

        h' = h - max(0, s - ceiling) a + max(0, floor - s) a

    direction: [d], or [n, d] with one per row; its length has no say. Not zero.
    ceiling, floor: a number, or [n] with one per row of ``rows`` (inf, or -inf for the floor, leaves a row as it is);
        None: none. [-tau, tau] is both. Tokens whose projection is allowed keep their values to the bit.
    rows, token_mask: as in ``Add``.
    spared: a position that keeps its values, the same or [n] int64 with one per row; a pass over a single token, as
        in the steps of a generation after the first, has none.
    """

    layer: int
    direction: torch.Tensor
    ceiling: float | torch.Tensor | None = None
    floor: float | torch.Tensor | None = None
    rows: torch.Tensor | None = None
    token_mask: torch.Tensor | None = None
    spared: int | torch.Tensor | None = None

    def apply(self, hidden_btd: torch.Tensor) -> torch.Tensor:
        def cap(hidden_ntd: torch.Tensor) -> torch.Tensor:
            unit_d = _unit(self.direction, hidden_ntd)
            s_nt = _project(hidden_ntd, unit_d)
            target_nt = s_nt
            if self.ceiling is not None:
                target_nt = torch.minimum(target_nt, _bound(self.ceiling, s_nt))
            if self.floor is not None:
                target_nt = torch.maximum(target_nt, _bound(self.floor, s_nt))
            if self.spared is not None and s_nt.shape[1] > 1:
                spared_n1 = torch.as_tensor(self.spared, device=s_nt.device).reshape(-1, 1)
                target_nt = torch.where(torch.arange(s_nt.shape[1], device=s_nt.device) == spared_n1, s_nt, target_nt)
            return _moved(hidden_ntd, target_nt - s_nt, unit_d, self.token_mask)

        return _on_rows(hidden_btd, self.rows, cap)


@dataclass(frozen=True, eq=False)
class Ablate:
    """Take the span of some directions out of h[rows]: h' = h - sum_j <h, q_j> q_j.

    directions: [k, d] ORTHONORMAL rows, see ``orthonormal``.
    rows, token_mask: as in ``Add``.
    """

    layer: int
    directions: torch.Tensor
    rows: torch.Tensor | None = None
    token_mask: torch.Tensor | None = None

    def apply(self, hidden_btd: torch.Tensor) -> torch.Tensor:
        def ablate(hidden_ntd: torch.Tensor) -> torch.Tensor:
            kind = _precise(hidden_ntd)
            basis_kd = self.directions.to(device=hidden_ntd.device, dtype=kind)
            s_ntk = hidden_ntd.to(kind) @ basis_kd.T
            if self.token_mask is not None:
                s_ntk = s_ntk.masked_fill(~self.token_mask.to(s_ntk.device)[:, :, None], 0.0)
            return (hidden_ntd.to(kind) - s_ntk @ basis_kd).to(hidden_ntd.dtype)

        return _on_rows(hidden_btd, self.rows, ablate)


@dataclass(frozen=True, eq=False)
class EditGradient:
    """Change g = dL/dh of rows at the output of a layer, per token, in the backward pass (app. E.2 of arXiv
    2604.16423). With v = direction / |direction|, s = <g, v> and p = s v:

        attenuate   g - p + |s| v    descent lowers <h, v> at every token
        amplify     g - p - |s| v    descent raises it
        neutralize  g - p            descent leaves it
        block       g - min(0, s) v  descent does not raise it: only what would is taken out

    Tokens that are on the right side already keep their gradient to the bit. g is that of h after this layer's value
    interventions; the blocks below receive what the edit leaves. Where nothing below asks for gradients there is
    none to edit.

    direction: [d], or [n, d] with one per row; its length has no say. Not zero.
    rows, token_mask: as in ``Add``.
    """

    layer: int
    direction: torch.Tensor
    mode: GradientMode
    rows: torch.Tensor | None = None
    token_mask: torch.Tensor | None = None

    def edit(self, gradient_btd: torch.Tensor) -> torch.Tensor:
        """The gradient that flows on in place of ``gradient_btd``."""

        def edited(gradient_ntd: torch.Tensor) -> torch.Tensor:
            unit_d = _unit(self.direction, gradient_ntd)
            s_nt = _project(gradient_ntd, unit_d)
            match self.mode:
                case "attenuate":
                    change_nt = -2 * s_nt.clamp(max=0)
                case "amplify":
                    change_nt = -2 * s_nt.clamp(min=0)
                case "neutralize":
                    change_nt = -s_nt
                case "block":
                    change_nt = -s_nt.clamp(max=0)
            return _moved(gradient_ntd, change_nt, unit_d, self.token_mask)

        return _on_rows(gradient_btd, self.rows, edited)


@dataclass(frozen=True, eq=False)
class ReadValue:
    """Give h [b, t, d] of ``layer`` to ``reader``, after the value interventions of that layer. Not detached."""

    layer: int
    reader: Callable[[int, torch.Tensor], None]


@dataclass(frozen=True, eq=False)
class ReadGradient:
    """Give dL/dh [b, t, d] of ``layer`` to ``reader`` in the backward pass, as it arrives at the layer's output.

    h is the value that the next block receives: after this layer's value interventions.
    """

    layer: int
    reader: Callable[[int, torch.Tensor], None]


ValueIntervention: TypeAlias = Add | Cap | Ablate
Intervention: TypeAlias = ValueIntervention | EditGradient
Reader: TypeAlias = ReadValue | ReadGradient


@contextmanager
def residual_stream(
    model: nn.Module, interventions: Iterable[Intervention] = (), readers: Iterable[Reader] = ()
) -> Iterator[None]:
    """Apply interventions and readers to every forward pass of ``model`` inside the context.

    Keep the context open until after the backward pass: gradient checkpointing may run blocks again there, and a
    backward pass after the context is left neither edits nor reads. All hooks come off on every exit. Raises
    ValueError for a layer the model does not have, or an intervention at layer 0.
    """
    layers = decoder_layers(model)
    edits_at: dict[int, list[Intervention]] = defaultdict(list)
    readers_at: dict[int, list[Reader]] = defaultdict(list)
    for intervention in interventions:
        if not 1 <= intervention.layer <= len(layers):
            raise ValueError(f"no intervention is possible at layer {intervention.layer}: use 1 to {len(layers)}")
        edits_at[intervention.layer].append(intervention)
    for reader in readers:
        if not 0 <= reader.layer <= len(layers):
            raise ValueError(f"layer {reader.layer} cannot be read: the model has 0 to {len(layers)}")
        readers_at[reader.layer].append(reader)

    handles: list[RemovableHandle] = []
    try:
        for layer in sorted(edits_at.keys() | readers_at.keys()):
            if layer == 0:
                hook = _before_first_block(readers_at[0], handles)
                handles.append(layers[0].register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(
                    layers[layer - 1].register_forward_hook(_after(edits_at[layer], readers_at[layer], handles))
                )
        yield
    finally:
        for handle in handles:
            handle.remove()


def _read(
    hidden_btd: torch.Tensor,
    readers: list[Reader],
    handles: list[RemovableHandle],
    gradient_edits: Iterable[EditGradient] = (),
) -> torch.Tensor:
    for reader in readers:
        if isinstance(reader, ReadValue):
            reader.reader(reader.layer, hidden_btd)
    if not torch.is_grad_enabled():
        return hidden_btd
    gradient_readers = [reader for reader in readers if isinstance(reader, ReadGradient)]
    if gradient_readers and not hidden_btd.requires_grad:
        # nothing below asks for gradients: make this the leaf they end at
        hidden_btd = hidden_btd.detach().requires_grad_()
    if hidden_btd.requires_grad:  # hooks of one tensor run in the order in which they were put on
        handles += [hidden_btd.register_hook(_gradient_hook(reader)) for reader in gradient_readers]
        handles += [hidden_btd.register_hook(edit.edit) for edit in gradient_edits]
    return hidden_btd


def _gradient_hook(reader: ReadGradient) -> Callable[[torch.Tensor], None]:
    def hook(gradient_btd: torch.Tensor) -> None:
        reader.reader(reader.layer, gradient_btd.detach())

    return hook


def _after(edits: list[Intervention], readers: list[Reader], handles: list[RemovableHandle]) -> Callable[..., object]:
    gradient_edits = [edit for edit in edits if isinstance(edit, EditGradient)]

    def hook(module: nn.Module, arguments: tuple[object, ...], output: object) -> object:
        del module, arguments
        hidden_btd = output[0] if isinstance(output, tuple) else output  # older transformers return a tuple
        assert isinstance(hidden_btd, torch.Tensor)
        for edit in edits:
            if not isinstance(edit, EditGradient):
                hidden_btd = edit.apply(hidden_btd)
        hidden_btd = _read(hidden_btd, readers, handles, gradient_edits)
        return (hidden_btd, *output[1:]) if isinstance(output, tuple) else hidden_btd

    return hook


def _before_first_block(readers: list[Reader], handles: list[RemovableHandle]) -> Callable[..., object]:
    def hook(module: nn.Module, arguments: tuple[object, ...], keywords: dict[str, object]) -> object:
        del module
        if arguments:
            first, *rest = arguments
            assert isinstance(first, torch.Tensor)
            return (_read(first, readers, handles), *rest), keywords
        hidden_btd = keywords["hidden_states"]
        assert isinstance(hidden_btd, torch.Tensor)
        return arguments, {**keywords, "hidden_states": _read(hidden_btd, readers, handles)}

    return hook


def orthonormal(directions_kd: torch.Tensor) -> torch.Tensor:
    """[k, d] float64 orthonormal rows with the span of ``directions_kd``, by QR.

    Raises ValueError where a direction is zero or lies in the span of those before it (to 1e-6 of its length).
    """
    rows_kd = directions_kd.to(torch.float64)
    q_dk, r_kk = torch.linalg.qr(rows_kd.T)
    lengths_k = rows_kd.norm(dim=1)
    dependent = (r_kk.diagonal().abs() <= 1e-6 * lengths_k) | (lengths_k == 0)
    if rows_kd.shape[0] > rows_kd.shape[1] or bool(dependent.any()):
        which = int(dependent.nonzero()[0]) if bool(dependent.any()) else rows_kd.shape[1]
        raise ValueError(f"direction {which} is zero or a combination of those before it")
    return q_dk.T.contiguous()


def unit(direction: torch.Tensor) -> torch.Tensor:
    """``direction`` [..., d] divided by its length, in float32 or better. Raises ValueError for a zero one."""
    precise = direction.to(_precise(direction))
    length = precise.norm(dim=-1, keepdim=True)
    if not bool((length > 0).all()):
        raise ValueError("a direction of length 0 is none")
    return precise / length


# Arithmetic is float32 over a bfloat16 stream (float64 over a float64 one) and is rounded once, when it is put back.


def _precise(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _unit(direction: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The unit vector as [d] or [n, 1, d] beside ``like`` [n, t, d]."""
    precise = unit(direction.to(_precise(like))).to(like.device)
    return precise if precise.dim() == 1 else precise[:, None, :]


def _project(values_ntd: torch.Tensor, unit_d: torch.Tensor) -> torch.Tensor:
    precise = values_ntd.to(unit_d.dtype)
    return precise @ unit_d if unit_d.dim() == 1 else (precise * unit_d).sum(-1)


def _bound(bound: float | torch.Tensor, s_nt: torch.Tensor) -> torch.Tensor:
    values = torch.as_tensor(bound, dtype=s_nt.dtype, device=s_nt.device)
    return values if values.dim() == 0 else values[:, None]


def _moved(
    values_ntd: torch.Tensor, change_nt: torch.Tensor, unit_d: torch.Tensor, token_mask: torch.Tensor | None
) -> torch.Tensor:
    """values + change * unit at the tokens of the mask; a change of 0 leaves a token to the bit."""
    if token_mask is not None:
        change_nt = change_nt.masked_fill(~token_mask.to(change_nt.device), 0.0)
    return torch.addcmul(values_ntd.to(unit_d.dtype), change_nt[:, :, None], unit_d).to(values_ntd.dtype)


def _are_all(rows: torch.Tensor | None, batch: torch.Tensor) -> bool:
    """Whether ``rows`` are all rows of the batch, in their order."""
    if rows is None:
        return True
    return rows.numel() == batch.shape[0] and torch.equal(rows, torch.arange(batch.shape[0], device=rows.device))


def _on_rows(
    batch_btd: torch.Tensor, rows: torch.Tensor | None, change: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """``batch_btd`` with ``change`` done to some of its rows, which it gets as [n, t, d]."""
    if _are_all(rows, batch_btd):
        return change(batch_btd)
    assert rows is not None
    index = rows.to(batch_btd.device)
    return batch_btd.index_copy(0, index, change(batch_btd.index_select(0, index)))
