"""Chat data: what the user may write about it, and its rows as proved, padded batches of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field

from trainables.chat_encoder import ChatEncoder, Encoded, LossOn, Message
from trainables.config import Config
from trainables.errors import DataError

__all__ = [
    "ChatEncoder",
    "DataConfig",
    "Encoded",
    "HubDataset",
    "Message",
    "PaddedBatch",
    "cut",
    "encode_all",
    "pad",
    "padded_length",
]

_ROWS_LISTED = 10


class HubDataset(Config):
    """A dataset that ``datasets.load_dataset`` opens: a hub id or a local folder, with a column of messages."""

    hub: str = Field(min_length=1)
    """Id of a dataset on the hub, or a local folder with one."""
    name: str | None = None
    """The dataset's configuration. null: its default one."""
    split: str = "train"
    """Which split is trained on, also as a slice such as ``train[:500]``."""
    revision: str | None = None
    """Branch, tag or commit of the dataset. null: its main branch."""
    messages: str = "messages"
    """The column that holds each row's list of messages."""


class DataConfig(Config):
    """What is trained on."""

    train: str | HubDataset
    """A chat JSONL file, one ``{"messages": [{"role": ..., "content": ...}, ...]}`` per line, or a dataset. A file is
    looked for beside the sweep file, in the current directory and in this project."""
    max_length: int = Field(default=512, ge=8)
    """Tokens of a row that are kept."""
    loss_on: LossOn = "responses"
    """``responses``: only tokens of assistant turns, with their end marks, are learnt; ``all``: every token."""
    allow_truncated_away: bool = False
    """Leave out rows whose whole response lies beyond ``max_length``. Without it such rows are a fault."""


@dataclass(frozen=True)
class PaddedBatch:
    """Rows padded on the right to one length: b rows, t tokens. Padding is False in every mask."""

    input_ids_bt: torch.Tensor  # int64
    attention_mask_bt: torch.Tensor  # bool
    response_mask_bt: torch.Tensor  # bool
    loss_mask_bt: torch.Tensor  # bool


def encode_all(
    rows: Sequence[Sequence[Message]], encoder: ChatEncoder, allow_truncated_away: bool
) -> tuple[list[Encoded], list[int]]:
    """Encode and prove every row; returns the encoded rows and their indices in ``rows``.

    A row that keeps no response token within ``max_length`` is left out if ``allow_truncated_away``. Raises DataError
    with the count and the first row numbers (from 1) for such rows otherwise, for rows that cannot be proved, and
    where no row is left.
    """
    encoded: list[Encoded] = []
    kept: list[int] = []
    truncated: list[int] = []
    faults: dict[int, DataError] = {}
    for index, messages in enumerate(rows):
        try:
            row = encoder.encode(messages, prove=True)
        except DataError as error:
            faults[index] = error
            continue
        if any(row.response_mask):
            encoded.append(row)
            kept.append(index)
        else:
            truncated.append(index)
    if faults:
        first = next(iter(faults.values()))
        raise DataError(
            f"{len(faults)} of {len(rows)} rows cannot be trained on ({_row_numbers(list(faults))}); the first: {first}"
        ) from first
    if truncated and not allow_truncated_away:
        raise DataError(
            f"{len(truncated)} of {len(rows)} rows have their whole response beyond max_length={encoder.max_length} "
            f"tokens ({_row_numbers(truncated)}); raise max_length, or set allow_truncated_away to leave them out"
        )
    if not encoded:
        raise DataError(f"no row is left of {len(rows)}")
    return encoded, kept


def cut(batch: Sequence[Encoded], size: int) -> list[list[Encoded]]:
    """The rows of an optimizer step as micro-batches of at most ``size`` rows, in which nothing is done in vain.

    Tokens after the last one of a response or under the loss are left off (nothing depends on them), and so are rows
    with no token under the loss. Where more than one micro-batch is needed, the longest rows come first, so that rows
    of like length are together and little is padded; rows of one length keep their order.
    """
    rows = [_without_tail(row) for row in batch if any(row.loss_mask[1:])]
    if len(rows) > size:
        rows.sort(key=lambda row: len(row.input_ids), reverse=True)  # stable, also where reversed
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _without_tail(row: Encoded) -> Encoded:
    used = (on or wanted for on, wanted in zip(row.response_mask, row.loss_mask, strict=True))
    end = 1 + max((index for index, needed in enumerate(used) if needed), default=0)
    return Encoded(row.input_ids[:end], row.response_mask[:end], row.loss_mask[:end])


def padded_length(batch: Sequence[Encoded], multiple_of: int) -> int:
    """Tokens of the longest row, rounded up to a multiple of ``multiple_of``."""
    assert batch, "a batch has at least one row"
    longest = max(len(row.input_ids) for row in batch)
    return -(-longest // multiple_of) * multiple_of


def pad(
    batch: Sequence[Encoded],
    pad_id: int,
    multiple_of: int = 1,
    device: torch.device | str = "cpu",
    *,
    at_least: int = 0,
) -> PaddedBatch:
    """Pad rows on the right to the longest of them, rounded up to a multiple of ``multiple_of`` tokens, and to
    ``at_least`` so many."""
    length = max(padded_length(batch, multiple_of), at_least)

    def mask(parts: Iterable[Sequence[bool]]) -> torch.Tensor:
        rows = [[*part, *[False] * (length - len(part))] for part in parts]
        return torch.tensor(rows, dtype=torch.bool, device=device)

    ids = [[*row.input_ids, *[pad_id] * (length - len(row.input_ids))] for row in batch]
    return PaddedBatch(
        input_ids_bt=torch.tensor(ids, dtype=torch.int64, device=device),
        attention_mask_bt=mask([True] * len(row.input_ids) for row in batch),
        response_mask_bt=mask(row.response_mask for row in batch),
        loss_mask_bt=mask(row.loss_mask for row in batch),
    )


def _row_numbers(indices: Sequence[int]) -> str:
    listed = ", ".join(str(index + 1) for index in indices[:_ROWS_LISTED])
    return f"rows {listed}{', ...' if len(indices) > _ROWS_LISTED else ''}, counted from 1"
