"""Forward and backward passes of a causal language model written by hand, block by block, without any hook.

Legend: b rows, t tokens, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from trainables.model_parts import backbone, decoder_layers

Change: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


def nothing(tensor_btd: torch.Tensor) -> torch.Tensor:
    return tensor_btd


@dataclass(frozen=True)
class Passes:
    """Both passes: the stream (index 0: embeddings; after the changes of a layer) and logits; the gradient as it
    arrives at every layer, and that of every parameter of the blocks by name."""

    stream: list[torch.Tensor]
    logits: torch.Tensor
    arriving: list[torch.Tensor]
    parameters: dict[str, torch.Tensor]


def both_passes(
    model: Any,
    ids_bt: torch.Tensor,
    loss: Callable[[torch.Tensor], torch.Tensor],
    values: Mapping[int, Change] | None = None,
    gradients: Mapping[int, Change] | None = None,
) -> Passes:
    """``values[l]`` is done to the output of block l, ``gradients[l]`` to the gradient that arrives there.

    ``loss`` is a scalar of the logits. Gradients are those of the parameters that ask for them. Every block is
    differentiated for itself, from the gradient that the blocks above have left.
    """
    values, gradients = values or {}, gradients or {}
    base = backbone(model)
    norm = base.final_layer_norm if hasattr(base, "final_layer_norm") else base.norm
    tokens = ids_bt.shape[1]
    allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None].expand(ids_bt.shape[0], 1, -1, -1)
    additive = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    positions = torch.arange(tokens)[None]
    hidden = model.get_input_embeddings()(ids_bt).detach()
    rotary = base.rotary_emb(hidden, position_ids=positions)
    stream, steps = [hidden], []
    for layer, block in enumerate(decoder_layers(model), start=1):
        arrives = stream[-1].detach().requires_grad_()
        out = block(arrives, attention_mask=additive, position_ids=positions, position_embeddings=rotary)
        out = values.get(layer, nothing)(out[0] if isinstance(out, tuple) else out)
        steps.append((arrives, out))
        stream.append(out)
    top = stream[-1].detach().requires_grad_()
    logits = model.get_output_embeddings()(norm(top))
    (gradient,) = torch.autograd.grad(loss(logits), top)
    arriving = [gradient]
    found: dict[str, torch.Tensor] = {}
    for layer in range(len(steps), 0, -1):
        arrives, out = steps[layer - 1]
        own_parameters = decoder_layers(model)[layer - 1].named_parameters(prefix=f"{layer}")
        named = {name: parameter for name, parameter in own_parameters if parameter.requires_grad}
        edited = gradients.get(layer, nothing)(gradient)
        gradient, *own = torch.autograd.grad(out, [arrives, *named.values()], grad_outputs=edited)
        found |= dict(zip(named, own, strict=True))
        arriving.insert(0, gradient)
    return Passes([one.detach() for one in stream], logits.detach(), arriving, found)
