"""Samples under conditions as padded batches, and the one forward and one backward pass that measures them.

Legend: b rows of the batch (a sample under a condition each), t tokens, n measured tokens of all rows, d hidden size.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from analysis.conditions import Condition
from trainables.base_model import LoadedBase
from trainables.chat_data import ChatEncoder, Encoded, PaddedBatch, pad
from trainables.defenses import Message, RunRows
from trainables.errors import DataError
from trainables.loss import token_losses
from trainables.model_parts import backbone
from trainables.native_ops import native_ops
from trainables.residual_stream import Add, Intervention, ReadGradient, ReadValue, residual_stream

Positions: TypeAlias = Literal["response", "predicting", "shared"]
"""Which tokens are measured.

response: those whose INPUT token is a response token or its end mark. predicting: those that predict one (one token
earlier). shared: every token from where on all conditions of the measurement read the same ones, so all that follow an
inoculation prompt; without a prompt among them the whole conversation.
"""

BATCH_TOKENS = 1024  # rows x length of a batch: on a CPU more is not faster, and activations take 1 MB a token at 135M

Progress: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True)
class Item:
    """One sample under one condition, cut after its last measured token."""

    row: int  # of the data, from 0
    condition: Condition
    encoded: Encoded
    measured: tuple[bool, ...]  # by token

    @property
    def length(self) -> int:
        return len(self.encoded.input_ids)


def aligned_items(
    base: LoadedBase,
    rows: Sequence[Sequence[Message]],
    conditions: Sequence[Condition],
    *,
    max_length: int,
    positions: Positions = "response",
    row_numbers: Sequence[int] | None = None,
) -> list[list[Item]]:
    """Every row under every condition: one list per row, in the order of ``conditions``.

    ``max_length`` cuts the row as it stands in the data. Under a condition that adds tokens before the response the
    same response tokens are kept, so the row gets longer. ``row_numbers``: which rows of the data these are (0, 1, ...
    without it). Raises DataError for rows that cannot be encoded, and where a condition changes response tokens;
    ValueError for two conditions of one name.
    """
    names = [condition.name for condition in conditions]
    if len(set(names)) < len(names):
        raise ValueError(f"conditions need different names, not {names}")
    numbers = range(len(rows)) if row_numbers is None else row_numbers
    cutting, whole = (ChatEncoder(base.tokenizer, length) for length in (max_length, sys.maxsize))
    groups = []
    for number, messages in zip(numbers, rows, strict=True):
        plain = _proved(cutting, messages, number)
        if not any(plain.response_mask):
            raise DataError(f"row {number + 1} has its whole response beyond max_length={max_length} tokens")
        read = []
        for condition in conditions:
            row = plain
            if condition.changes_messages:
                row = _like(plain, _proved(whole, condition.rewrite(messages, number), number), number, condition)
            read.append(_until_last_response(row))
        num_shared = _common_ending([row.input_ids for row in read])
        groups.append(
            [
                Item(number, condition, row, _measured(row, positions, num_shared))
                for condition, row in zip(conditions, read, strict=True)
            ]
        )
    return groups


def _proved(encoder: ChatEncoder, messages: Sequence[Message], number: int) -> Encoded:
    try:
        return encoder.encode(messages, prove=True)
    except DataError as error:
        raise DataError(f"row {number + 1}: {error}") from error


def _measured(row: Encoded, positions: Positions, num_shared: int) -> tuple[bool, ...]:
    if positions == "response":
        return row.response_mask
    if positions == "predicting":
        return (*row.loss_mask[1:], False)
    length = len(row.input_ids)
    return (*[False] * (length - num_shared), *[True] * num_shared)


def _common_ending(sequences: Sequence[Sequence[int]]) -> int:
    shortest = min(len(sequence) for sequence in sequences)
    for count in range(shortest):
        if len({sequence[-1 - count] for sequence in sequences}) > 1:
            return count
    return shortest


def _like(plain: Encoded, changed: Encoded, row: int, condition: Condition) -> Encoded:
    """``changed`` with just as many response tokens as ``plain`` has."""
    wanted = [token for token, on in zip(plain.input_ids, plain.response_mask, strict=True) if on]
    places = [index for index, on in enumerate(changed.response_mask) if on][: len(wanted)]
    if [changed.input_ids[place] for place in places] != wanted:
        raise DataError(f"row {row + 1}: under condition {condition.name!r} the response has other tokens")
    end = places[-1] + 1
    return Encoded(changed.input_ids[:end], changed.response_mask[:end], changed.loss_mask[:end])


def _until_last_response(row: Encoded) -> Encoded:
    end = 1 + max(index for index, on in enumerate(row.response_mask) if on)
    return Encoded(row.input_ids[:end], row.response_mask[:end], row.loss_mask[:end])


def batches(groups: Iterable[Sequence[Item]], batch_tokens: int) -> Iterator[list[Item]]:
    """The groups as batches of at most ``batch_tokens`` tokens with padding, longest first; a group stays together.

    Groups of like length meet, so little is padded, and the largest batch comes first: what does not fit in memory
    fails at once. A group that is larger alone is a batch of its own.
    """
    batch: list[Item] = []
    longest = 0
    for group in sorted(groups, key=lambda group: -max(item.length for item in group)):
        longest = max(longest, max(item.length for item in group))
        if batch and (len(batch) + len(group)) * longest > batch_tokens:
            yield batch
            batch, longest = [], max(item.length for item in group)
        batch.extend(group)
    if batch:
        yield batch


@dataclass(frozen=True)
class Measured:
    """A batch on its device: which of its tokens are measured."""

    items: Sequence[Item]
    padded: PaddedBatch
    places_n: torch.Tensor  # int64 indices into the flattened [b * t] tokens, row by row
    counts: list[int]  # measured tokens per row

    @classmethod
    def of(cls, base: LoadedBase, items: Sequence[Item]) -> Measured:
        padded = pad([item.encoded for item in items], base.tokenizer.pad_token_id, 1, base.device)
        length = padded.input_ids_bt.shape[1]
        places = [
            index * length + token for index, item in enumerate(items) for token, on in enumerate(item.measured) if on
        ]
        return cls(items, padded, torch.tensor(places, device=base.device), [sum(item.measured) for item in items])

    def take(self, values_btd: torch.Tensor) -> torch.Tensor:
        """The measured tokens' values, [n, d] float32 (float64 of a float64 model)."""
        taken_nd = values_btd.flatten(0, 1).index_select(0, self.places_n.to(values_btd.device))
        return taken_nd if taken_nd.dtype == torch.float64 else taken_nd.float()

    def interventions(self) -> list[Intervention]:
        """What every row's condition adds, rows of several conditions at one layer in one operation."""
        shifts: dict[int, list[tuple[int, torch.Tensor]]] = defaultdict(list)
        rows_of: dict[Condition, list[int]] = defaultdict(list)
        for index, item in enumerate(self.items):
            rows_of[item.condition].append(index)
            for layer, shift_d in item.condition.shifts.items():
                shifts[layer].append((index, shift_d))
        edits: list[Intervention] = [
            Add(layer, torch.stack([shift_d for _, shift_d in parts]), torch.tensor([index for index, _ in parts]))
            for layer, parts in shifts.items()
        ]
        for condition, rows in rows_of.items():
            rows_n = torch.tensor(rows)  # on the CPU, as residual_stream wants it
            run_rows = RunRows(rows_n, self.padded.attention_mask_bt[rows], self.padded.response_mask_bt[rows], 1)
            edits += [edit for mechanism in condition.mechanisms for edit in mechanism.interventions(run_rows)]
        return edits

    def losses(self, base: LoadedBase, model: Any) -> torch.Tensor:
        """Loss in nats of every predicted response token, row by row. To be called inside ``residual_stream``."""
        return token_losses(
            model,
            self.padded.input_ids_bt,
            None,  # padding stands on the right
            self.padded.loss_mask_bt,
            plain_head=base.plain_head,
        )


def read_gradients(
    base: LoadedBase,
    model: Any,
    items: Sequence[Item],
    layers: Sequence[int],
    reader: Callable[[Measured, int, torch.Tensor], None],
) -> list[torch.Tensor]:
    """One forward and one backward pass of activations; returns the token losses of every item, on the CPU.

    ``reader(batch, layer, gradients_nd)`` gets dL/dh of the measured tokens, layer by layer from the last one down,
    with L the SUM of the next-token losses of the response tokens. Each row's loss depends on that row alone, so rows
    do not mix. The parameters must be frozen; no gradient outlives the call that it is given to.
    """
    assert not any(parameter.requires_grad for parameter in model.parameters()), "parameters are to be frozen"
    batch = Measured.of(base, items)

    def take(layer: int, gradient_btd: torch.Tensor) -> None:
        reader(batch, layer, batch.take(gradient_btd))

    with (
        torch.enable_grad(),
        native_ops(model),
        residual_stream(model, batch.interventions(), [ReadGradient(layer, take) for layer in layers]),
    ):
        losses_n = batch.losses(base, model)
        if layers:
            losses_n.sum().backward()
    counts = batch.padded.loss_mask_bt[:, 1:].sum(1).tolist()
    return list(losses_n.detach().cpu().double().split(counts))


@torch.no_grad()
def read_values(
    base: LoadedBase,
    model: Any,
    items: Sequence[Item],
    layers: Sequence[int],
    reader: Callable[[Measured, int, torch.Tensor], None],
) -> None:
    """One forward pass; ``reader(batch, layer, hidden_nd)`` gets h of the measured tokens, from the first layer up."""
    batch = Measured.of(base, items)

    def take(layer: int, hidden_btd: torch.Tensor) -> None:
        reader(batch, layer, batch.take(hidden_btd))

    with residual_stream(model, batch.interventions(), [ReadValue(layer, take) for layer in layers]):
        backbone(model)(input_ids=batch.padded.input_ids_bt, attention_mask=None, use_cache=False)
