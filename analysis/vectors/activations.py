"""Mean activations over the tokens of chat rows, at every layer.

Legend: b rows, t tokens, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from trainables.base_model import LoadedBase
from trainables.chat_data import ChatEncoder, Encoded, encode_all, pad
from trainables.defenses import Message
from trainables.model_parts import backbone, decoder_layers
from trainables.residual_stream import ReadValue, residual_stream


def mean_response_activation(
    base: LoadedBase,
    rows: Sequence[Sequence[Message]],
    max_length: int,
    batch_size: int,
    progress: Callable[[int], None],
) -> torch.Tensor:
    """Mean over rows of the mean over response tokens of h_l, every layer; [num_layers + 1, hidden] float64."""
    encoded, _ = encode_all(rows, ChatEncoder(base.tokenizer, max_length), False)
    return mean_activation(base, encoded, batch_size, progress)


def response_activations(
    base: LoadedBase,
    rows: Sequence[Sequence[Message]],
    max_length: int,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Per row the mean over response tokens of h_l, every layer, in the order of ``rows``; [rows, num_layers + 1,
    hidden] float32 (float64 for a float64 model). ``progress(done)`` counts rows."""
    encoded, _ = encode_all(rows, ChatEncoder(base.tokenizer, max_length), False)
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index].input_ids))  # alike lengths together
    layers = range(len(decoder_layers(base.model)) + 1)
    of_row: dict[int, torch.Tensor] = {}
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        means = _means(base, [encoded[index] for index in part], layers)
        stacked_bld = torch.stack([means[layer] for layer in layers], dim=1).cpu()
        of_row |= dict(zip(part, stacked_bld, strict=True))
        if progress is not None:
            progress(start + len(part))
    return torch.stack([of_row[index] for index in range(len(encoded))])


def mean_activation(
    base: LoadedBase, rows: Sequence[Encoded], batch_size: int = 8, progress: Callable[[int], None] | None = None
) -> torch.Tensor:
    """Mean over rows of the mean over the tokens of ``response_mask`` of h_l, every layer; [num_layers + 1, hidden]
    float64.

    Each row weighs the same however many tokens it has; sums are float64. ``progress(done)`` counts rows.
    """
    ordered = sorted(rows, key=lambda row: len(row.input_ids))  # alike lengths together: little padding
    num_layers = len(decoder_layers(base.model))
    sums: dict[int, torch.Tensor] = {}
    for start in range(0, len(ordered), batch_size):
        part = ordered[start : start + batch_size]
        for layer, mean_bd in _means(base, part, range(num_layers + 1)).items():
            sums[layer] = sums.get(layer, 0) + mean_bd.double().sum(0).cpu()
        if progress is not None:
            progress(start + len(part))
    return torch.stack([sums[layer] for layer in range(num_layers + 1)]) / len(ordered)


@torch.no_grad()
def _means(base: LoadedBase, rows: Sequence[Encoded], layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """Per layer the mean over each row's masked tokens of h, [b, d] float32 (float64 for a float64 model)."""
    batch = pad(rows, base.tokenizer.pad_token_id, 1, base.device)
    mask_bt1 = batch.response_mask_bt[:, :, None]
    means: dict[int, torch.Tensor] = {}

    def keep(layer: int, hidden_btd: torch.Tensor) -> None:
        wide = hidden_btd if hidden_btd.dtype == torch.float64 else hidden_btd.float()
        means[layer] = (wide * mask_bt1).sum(1) / mask_bt1.sum(1)

    with residual_stream(base.model, readers=[ReadValue(layer, keep) for layer in layers]):
        backbone(base.model)(input_ids=batch.input_ids_bt, attention_mask=batch.attention_mask_bt, use_cache=False)
    return means
