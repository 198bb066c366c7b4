"""Losses of a model on chat rows: how well it predicts given answers, without any training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from analysis.rows import LossRow
from trainables.base_model import LoadedBase
from trainables.chat_data import ChatEncoder, encode_all, pad
from trainables.defenses import Message
from trainables.loss import token_losses


@torch.no_grad()
def response_losses(
    base: LoadedBase,
    model: Any,
    rows: Sequence[Sequence[Message]],
    *,
    measure_id: str,
    max_length: int,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[LossRow]:
    """Per row the sum and mean over response tokens of the next-token loss, in nats.

    ``model`` is ``base.model`` or a trained model over the same base. Rows come in the order of the data.
    """
    encoded, kept = encode_all(rows, ChatEncoder(base.tokenizer, max_length), False)
    for start in range(0, len(encoded), batch_size):
        part = encoded[start : start + batch_size]
        batch = pad(part, base.tokenizer.pad_token_id, 1, base.device)
        losses_n = token_losses(
            model, batch.input_ids_bt, batch.attention_mask_bt, batch.loss_mask_bt, plain_head=base.plain_head
        )
        counts = batch.loss_mask_bt[:, 1:].sum(1).tolist()
        for index, values in zip(kept[start : start + batch_size], losses_n.double().split(counts), strict=True):
            yield LossRow(
                measure_id=measure_id,
                row=index,
                condition="none",
                num_tokens=len(values),
                loss_sum=float(values.sum()),
                loss_mean=float(values.mean()),
            )
        if progress is not None:
            progress(start + len(part), len(encoded))
