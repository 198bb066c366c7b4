"""Activation gradients by plain PyTorch and transformers, one row at a time: what our readout is compared with."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from trainables.base_model import LoadedBase
from trainables.chat_data import ChatEncoder
from trainables.defenses import Message


def plain_gradients(
    base: LoadedBase,
    messages: Sequence[Message],
    shifts: Mapping[int, torch.Tensor] | None = None,
    *,
    positions: str = "response",
) -> tuple[float, dict[int, torch.Tensor]]:
    """(sum of losses, layer -> gradients of the measured tokens) by ``output_hidden_states`` and ``autograd.grad``.

    The last layer is left out: transformers gives its state after the final norm. ``shifts``: layer -> what a hook of
    this function adds to the output of that layer.
    """
    encoded = ChatEncoder(base.tokenizer, 512).encode(messages)
    ids = torch.tensor(encoded.input_ids)
    wanted = torch.tensor(encoded.response_mask)
    inner: Any = base.model.model if hasattr(base.model, "model") else base.model.gpt_neox
    handles = [
        inner.layers[layer - 1].register_forward_hook(functools.partial(_add, shift))
        for layer, shift in (shifts or {}).items()
    ]
    try:
        embedded = base.model.get_input_embeddings()(ids)[None].detach().requires_grad_()
        output = base.model(inputs_embeds=embedded, output_hidden_states=True, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    losses = F.cross_entropy(output.logits[0, :-1], ids[1:], reduction="none")[wanted[1:]]
    states = output.hidden_states[:-1]
    gradients = torch.autograd.grad(losses.sum(), states)
    if positions == "predicting":
        wanted = torch.cat((wanted[1:], torch.tensor([False])))
    return float(losses.detach().sum()), {layer: gradient[0][wanted] for layer, gradient in enumerate(gradients)}


def _add(shift: torch.Tensor, module: Any, arguments: Any, output: Any) -> Any:
    del module, arguments
    return (output[0] + shift, *output[1:]) if isinstance(output, tuple) else output + shift


def mean_cosine(gradients_nd: torch.Tensor, vector_d: torch.Tensor) -> tuple[int, float, float, float]:
    """(tokens, mean cosine, share above 0, mean norm) over tokens whose gradient is not zero."""
    used = gradients_nd[gradients_nd.norm(dim=1) > 0]
    cosines = F.cosine_similarity(used, vector_d.to(used)[None], dim=1, eps=0)
    return len(used), float(cosines.mean()), float((cosines > 0).double().mean()), float(used.norm(dim=1).mean())
