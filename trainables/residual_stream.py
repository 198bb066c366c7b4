"""The only place that hooks decoder layers: what is added to, and read from, the residual stream.

Legend: b rows of the batch, n rows that an intervention concerns, t tokens, d hidden size.

Layers are embedding-inclusive: layer 0 is the embedding output (it can be read, never changed), layer l >= 1 is the
output of decoder block l - 1, the last one before the final norm. At one layer value interventions apply in the
order listed and readers see the result; readers of the gradient see it as it arrives, before any edit of this layer.

Every intervention names the rows it concerns, so one batch can hold rows of several runs or several conditions;
other rows keep their values to the bit. Nothing is written in place: hooks return new tensors, because the tensor a
hook is given is also saved for the backward pass of the block that made it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from trainables.model_parts import decoder_layers


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
        if self.rows is None:
            return hidden_btd + shift_btd
        rows = self.rows.to(hidden_btd.device)
        if rows.numel() == hidden_btd.shape[0] and torch.equal(
            rows, torch.arange(hidden_btd.shape[0], device=rows.device)
        ):
            return hidden_btd + shift_btd
        source_ntd = shift_btd.expand(rows.numel(), hidden_btd.shape[1], hidden_btd.shape[2])
        return hidden_btd.index_add(0, rows, source_ntd)


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


Intervention: TypeAlias = Add
Reader: TypeAlias = ReadValue | ReadGradient


@contextmanager
def residual_stream(
    model: nn.Module, interventions: Iterable[Intervention] = (), readers: Iterable[Reader] = ()
) -> Iterator[None]:
    """Apply interventions and readers to every forward pass of ``model`` inside the context.

    Keep the context open until after the backward pass: gradient checkpointing may run blocks again there. All hooks
    come off on every exit. Raises ValueError for a layer the model does not have, or an intervention at layer 0.
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

    handles = []
    try:
        for layer in sorted(edits_at.keys() | readers_at.keys()):
            if layer == 0:
                hook = _before_first_block(readers_at[0])
                handles.append(layers[0].register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(layers[layer - 1].register_forward_hook(_after(edits_at[layer], readers_at[layer])))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _read(hidden_btd: torch.Tensor, readers: list[Reader]) -> torch.Tensor:
    for reader in readers:
        if isinstance(reader, ReadValue):
            reader.reader(reader.layer, hidden_btd)
    gradient_readers = [reader for reader in readers if isinstance(reader, ReadGradient)]
    if gradient_readers and torch.is_grad_enabled():
        if not hidden_btd.requires_grad:  # nothing below asks for gradients: make this the leaf they end at
            hidden_btd = hidden_btd.detach().requires_grad_()
        for reader in gradient_readers:
            hidden_btd.register_hook(_gradient_hook(reader))
    return hidden_btd


def _gradient_hook(reader: ReadGradient) -> Callable[[torch.Tensor], None]:
    def hook(gradient_btd: torch.Tensor) -> None:
        reader.reader(reader.layer, gradient_btd.detach())

    return hook


def _after(edits: list[Intervention], readers: list[Reader]) -> Callable[..., object]:
    def hook(module: nn.Module, arguments: tuple[object, ...], output: object) -> object:
        del module, arguments
        hidden_btd = output[0] if isinstance(output, tuple) else output  # older transformers return a tuple
        assert isinstance(hidden_btd, torch.Tensor)
        for edit in edits:
            hidden_btd = edit.apply(hidden_btd)
        hidden_btd = _read(hidden_btd, readers)
        return (hidden_btd, *output[1:]) if isinstance(output, tuple) else hidden_btd

    return hook


def _before_first_block(readers: list[Reader]) -> Callable[..., object]:
    def hook(module: nn.Module, arguments: tuple[object, ...], keywords: dict[str, object]) -> object:
        del module
        if arguments:
            first, *rest = arguments
            assert isinstance(first, torch.Tensor)
            return (_read(first, readers), *rest), keywords
        hidden_btd = keywords["hidden_states"]
        assert isinstance(hidden_btd, torch.Tensor)
        return arguments, {**keywords, "hidden_states": _read(hidden_btd, readers)}

    return hook
