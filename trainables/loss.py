"""Next-token losses at chosen positions, without ever holding all logits.

Legend: b rows, t tokens, d hidden size, n predicting positions, v vocabulary.

The positions that predict a wanted token are selected BEFORE the language-model head, and the cross-entropy is taken
chunk by chunk: for 16 x 4 x 512 positions and 152k words all logits would be 20 GB. With a frozen linear head the
gradient with respect to the hidden states, (softmax(h W^T) - onehot) W, is made in the same chunk as the loss, so that
logits live for one chunk only and the head is not run a second time in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from trainables import frozen_products
from trainables.model_parts import backbone, causal_lm

CHUNK = 512  # positions whose logits exist at one time: 512 x 49k x 4 bytes = 100 MB


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_nd: torch.Tensor,
        weight_vd: torch.Tensor,
        bias_v: torch.Tensor | None,
        targets_n: torch.Tensor,
    ) -> torch.Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        losses_n = torch.empty(hidden_nd.shape[0], dtype=_loss_dtype(hidden_nd), device=hidden_nd.device)
        gradients_nd = torch.empty_like(hidden_nd) if wants_gradient else None
        for start in range(0, hidden_nd.shape[0], CHUNK):
            part = slice(start, start + CHUNK)
            logits = frozen_products.linear(hidden_nd[part], weight_vd, bias_v)
            targets = targets_n[part, None]
            log_probabilities = torch.log_softmax(logits, dim=-1, dtype=losses_n.dtype)
            losses_n[part] = -log_probabilities.gather(1, targets)[:, 0]
            if gradients_nd is not None:
                probabilities = log_probabilities.exp_()
                probabilities.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=probabilities.dtype))
                gradients_nd[part] = frozen_products.back(probabilities.to(weight_vd.dtype), weight_vd)
        if gradients_nd is not None:
            ctx.save_for_backward(gradients_nd)
        return losses_n

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradients_nd,) = ctx.saved_tensors
        (upstream_n,) = upstream
        # in float32: rounding 1 / (number of tokens) to bfloat16 would scale the whole gradient by up to 0.4 %
        scaled_nd = gradients_nd.to(upstream_n.dtype) * upstream_n[:, None]
        return scaled_nd.to(gradients_nd.dtype), None, None, None


def _loss_dtype(hidden: torch.Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def head_is_plain_linear(model: nn.Module) -> bool:
    """Whether ``model(x).logits`` is nothing but a frozen linear head over the backbone's output.

    Found out by doing both on a few tokens: some models scale or cap their logits, and a name says nothing about it.
    """
    whole = causal_lm(model)
    head = whole.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.weight.requires_grad:
        return False
    probe = torch.arange(1, 5, device=head.weight.device)[None]
    was_training = whole.training
    whole.eval()
    try:
        with torch.no_grad():
            logits = whole(input_ids=probe, use_cache=False).logits
            hidden = backbone(whole)(input_ids=probe, use_cache=False).last_hidden_state
            return torch.equal(head(hidden), logits)
    finally:
        whole.train(was_training)


def token_losses(
    model: nn.Module,
    input_ids_bt: torch.Tensor,
    attention_mask_bt: torch.Tensor | None,
    loss_mask_bt: torch.Tensor,
    *,
    plain_head: bool,
) -> torch.Tensor:
    """Loss in nats of every token that ``loss_mask_bt`` marks as predicted, [n], in row-major order.

    Token (b, t) is predicted from the hidden state at (b, t - 1); the first token of a row is never predicted.
    ``attention_mask_bt``: False at padding. None says that padding stands on the right, if anywhere: a token never
    attends to a later one, so nothing that is asked for can depend on it, and attention without a mask is faster.
    ``plain_head``: what ``head_is_plain_linear`` said of this model; else the model's own logits are used.
    Losses are float32 (float64 for a float64 model). Raises ValueError if nothing is marked.
    """
    predicting_bt = loss_mask_bt[:, 1:]
    targets_n = input_ids_bt[:, 1:][predicting_bt]
    if targets_n.numel() == 0:
        raise ValueError("the loss mask marks no token that has a predecessor")
    whole = causal_lm(model)
    if not plain_head:
        logits_btv = whole(input_ids=input_ids_bt, attention_mask=attention_mask_bt, use_cache=False).logits
        logits_nv = logits_btv[:, :-1][predicting_bt]
        return F.cross_entropy(logits_nv.to(_loss_dtype(logits_nv)), targets_n, reduction="none")
    hidden_btd = backbone(whole)(
        input_ids=input_ids_bt, attention_mask=attention_mask_bt, use_cache=False
    ).last_hidden_state
    head = whole.get_output_embeddings()
    losses_n: torch.Tensor = _FrozenHeadCrossEntropy.apply(
        hidden_btd[:, :-1][predicting_bt], head.weight, head.bias, targets_n
    )
    return losses_n
