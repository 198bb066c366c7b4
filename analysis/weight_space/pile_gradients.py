"""The mean gradient of a pile of answers with respect to the parameters themselves.

For a pile D of conversations and a loss l_t of every token that the conversation's mask marks,

    g(D) = mean over conversations of (mean over its marked tokens of d l_t / d theta),

so that every conversation weighs the same, however long it is. Sums are float32 (float64 over a float64 model),
whatever the model's dtype is, and every parameter's gradient goes into its sum as soon as the backward pass has it and
is dropped: beside the model there is ONE copy of the parameters that are read, the sums. Sums of parts of a pile add
up, with their counts, to that of the whole.

Legend: b rows, t tokens, d hidden size, n marked positions, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainables.chat_data import Encoded, PaddedBatch, cut, pad
from trainables.errors import DataError
from trainables.loss import CHUNK
from trainables.model_parts import backbone, causal_lm

PileLoss: TypeAlias = Literal["cross_entropy", "kl"]


@dataclass(frozen=True, eq=False)
class GradientSum:
    """Sum over conversations of their mean gradients, by parameter, on the CPU; float32, or float64 of a float64 model.

    ``loss_sum``: sum over conversations of the mean loss of their tokens, in nats.
    """

    sums: Mapping[str, torch.Tensor]
    num_rows: int
    num_tokens: int
    loss_sum: float


@dataclass(frozen=True, eq=False)
class MeanGradient:
    """The mean gradient of a pile out of the sums of its parts, made parameter by parameter when it is asked for."""

    parts: Sequence[GradientSum]

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)

    @property
    def names(self) -> tuple[str, ...]:
        """Parameters in order."""
        return tuple(next(part.sums for part in self.parts if part.sums))

    def __getitem__(self, name: str) -> torch.Tensor:
        """Sum of all parts over the number of conversations. Added up in float64 and rounded once, so that how the pile
        was cut leaves no more than the rounding of the parts themselves."""
        total = sum(part.sums[name].double() for part in self.parts if part.num_rows)
        assert isinstance(total, torch.Tensor), "an empty pile has no mean"
        return (total / self.num_rows).to(next(part.sums[name].dtype for part in self.parts if part.num_rows))


def gradient_sum(
    model: Any,
    parameters: Mapping[str, nn.Parameter],
    rows: Sequence[Encoded],
    *,
    pad_id: int,
    device: torch.device | str = "cpu",
    plain_head: bool,
    loss: PileLoss = "cross_entropy",
    reference: Any = None,
    batch_size: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> GradientSum:
    """Sum over ``rows`` of the gradient of each row's mean loss with respect to ``parameters`` of ``model``.

    ``model`` may be a PeftModel over the model that owns the parameters: at W + s B A the gradient with respect to W is
    that with respect to the merged weights. ``rows``: their ``loss_mask`` says which tokens count. ``loss``:
    ``cross_entropy`` of the token that stands there, -log p(token), or ``kl``, sum_v p_v log(p_v / q_v), with q the
    ``reference``'s distribution, a model with the same vocabulary (it may share the parameters). ``plain_head``: see
    ``trainables.loss.head_is_plain_linear``. The parameters are frozen before and after, and have no ``.grad``.
    Raises DataError for a row in which no token counts.
    """
    empty = [number for number, row in enumerate(rows, start=1) if not any(row.loss_mask[1:])]
    if empty:
        raise DataError(
            f"{len(empty)} of {len(rows)} answers have no token to take a gradient of (the first: {empty[0]})"
        )
    wide = {name: _wide(parameter.dtype) for name, parameter in parameters.items()}
    sums = {name: torch.zeros(value.shape, dtype=wide[name], device=value.device) for name, value in parameters.items()}
    num_tokens, loss_sum, done = 0, 0.0, 0
    batches = cut(list(rows), batch_size) if rows else []
    with _streaming(parameters, sums):
        for part in batches:
            batch = pad(part, pad_id, 1, device)
            losses_n = _losses(model, batch, loss, reference, plain_head)
            counts_b = batch.loss_mask_bt[:, 1:].sum(1)
            weights_n = (1.0 / counts_b.to(losses_n.dtype)).repeat_interleave(counts_b)
            total = (losses_n * weights_n).sum()
            total.backward()
            loss_sum += float(total.detach())
            num_tokens += int(counts_b.sum())
            done += len(part)
            if progress is not None:
                progress(done, len(rows))
    on_cpu = {name: value.cpu() for name, value in sums.items()}
    return GradientSum(on_cpu, len(rows), num_tokens, loss_sum)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def _streaming(parameters: Mapping[str, nn.Parameter], sums: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """While this is open, a backward pass adds the parameters' gradients to ``sums`` one by one and drops them."""
    handles = []
    try:
        for name, parameter in parameters.items():
            assert not parameter.requires_grad, "the parameters are frozen"
            assert parameter.grad is None, "nothing has left a gradient behind"

            def take(leaf: torch.Tensor, total: torch.Tensor = sums[name]) -> None:
                if leaf.grad is not None:
                    total.add_(leaf.grad)
                leaf.grad = None

            parameter.requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(take))
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters.values():
            parameter.grad = None
            parameter.requires_grad_(False)


def _losses(model: Any, batch: PaddedBatch, loss: PileLoss, reference: Any, plain_head: bool) -> torch.Tensor:
    """Loss of every marked token in row-major order, [n], with a gradient for the head's weight too.

    Marked positions are selected before the head, and logits exist for a chunk of them at a time: they are made again
    in the backward pass.
    """
    predicting_bt = batch.loss_mask_bt[:, 1:]
    targets_n = batch.input_ids_bt[:, 1:][predicting_bt]
    values = _kl if loss == "kl" else _cross_entropy
    if not plain_head:
        own_nv = _logits(model, batch, predicting_bt)
        other_nv = _reference_logits(reference, batch, predicting_bt) if loss == "kl" else None
        return values(own_nv, targets_n, other_nv)
    hidden_nd = _hidden(model, batch, predicting_bt)
    head = causal_lm(model).get_output_embeddings()
    others_nd = other_head = None
    if loss == "kl":
        with torch.no_grad():
            others_nd = _hidden(reference, batch, predicting_bt)
        other_head = causal_lm(reference).get_output_embeddings()

    def of_chunk(part_nd: torch.Tensor, targets: torch.Tensor, other_nd: torch.Tensor | None) -> torch.Tensor:
        with torch.no_grad():
            other_nv = None if other_nd is None or other_head is None else other_head(other_nd)
        return values(head(part_nd), targets, other_nv)

    parts = []
    for start in range(0, len(targets_n), CHUNK):
        chunk = slice(start, start + CHUNK)
        other = None if others_nd is None else others_nd[chunk]
        parts.append(checkpoint(of_chunk, hidden_nd[chunk], targets_n[chunk], other, use_reentrant=False))
    return torch.cat(parts)


def _hidden(model: Any, batch: PaddedBatch, predicting_bt: torch.Tensor) -> torch.Tensor:
    out = backbone(causal_lm(model))(
        input_ids=batch.input_ids_bt, attention_mask=batch.attention_mask_bt, use_cache=False
    )
    hidden_nd: torch.Tensor = out.last_hidden_state[:, :-1][predicting_bt]
    return hidden_nd


def _logits(model: Any, batch: PaddedBatch, predicting_bt: torch.Tensor) -> torch.Tensor:
    out = causal_lm(model)(input_ids=batch.input_ids_bt, attention_mask=batch.attention_mask_bt, use_cache=False)
    logits_nv: torch.Tensor = out.logits[:, :-1][predicting_bt]
    return logits_nv


@torch.no_grad()
def _reference_logits(reference: Any, batch: PaddedBatch, predicting_bt: torch.Tensor) -> torch.Tensor:
    return _logits(reference, batch, predicting_bt)


def _cross_entropy(own_nv: torch.Tensor, targets_n: torch.Tensor, other_nv: torch.Tensor | None) -> torch.Tensor:
    del other_nv
    return F.cross_entropy(own_nv.to(_wide(own_nv.dtype)), targets_n, reduction="none")


def _kl(own_nv: torch.Tensor, targets_n: torch.Tensor, other_nv: torch.Tensor | None) -> torch.Tensor:
    """KL(own || other) per position, in nats."""
    del targets_n
    assert other_nv is not None, "KL needs a reference"
    own = torch.log_softmax(own_nv.to(_wide(own_nv.dtype)), dim=-1)
    other = torch.log_softmax(other_nv.to(own.dtype), dim=-1)
    return (own.exp() * (own - other)).sum(-1)
