"""Reference activations: how the untrained base's response tokens lie along an axis, which bounds are calibrated on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from trainables.base_model import LoadedBase
from trainables.chat_data import ChatEncoder, encode_all, pad
from trainables.defenses import Message
from trainables.model_parts import backbone
from trainables.residual_stream import ReadValue, residual_stream, unit


@torch.no_grad()
def token_projections(
    base: LoadedBase,
    rows: Sequence[Sequence[Message]],
    vector: torch.Tensor,
    layers: Sequence[int],
    max_length: int,
    batch_size: int = 8,
) -> Mapping[int, torch.Tensor]:
    """Per layer <h_t, a_l> of every response token of every row, [tokens] float32, with a_l row l of ``vector``
    [num_layers + 1, hidden] at length 1. Padding and prompts do not count."""
    encoded, _ = encode_all(rows, ChatEncoder(base.tokenizer, max_length), False)
    ordered = sorted(encoded, key=lambda row: len(row.input_ids))  # alike lengths together: little padding
    axes = {layer: unit(vector[layer]).to(base.device) for layer in layers}
    parts: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    for start in range(0, len(ordered), batch_size):
        batch = pad(ordered[start : start + batch_size], base.tokenizer.pad_token_id, 1, base.device)

        def keep(layer: int, hidden_btd: torch.Tensor, mask_bt: torch.Tensor = batch.response_mask_bt) -> None:
            parts[layer].append((hidden_btd.float() @ axes[layer].float())[mask_bt].cpu())

        with residual_stream(base.model, readers=[ReadValue(layer, keep) for layer in layers]):
            backbone(base.model)(input_ids=batch.input_ids_bt, attention_mask=batch.attention_mask_bt, use_cache=False)
    return {layer: torch.cat(found) for layer, found in parts.items()}
