"""From other projects' rows to a vector of ours: [num_layers + 1, hidden] float32, row l in the space of layer l.

Two conventions are about. With an *embedding row*, [num_layers + 1, hidden] as ``output_hidden_states`` gives it: row l
is layer l, and the last row was read after the final norm. By *blocks*, [num_layers, hidden] as hooks give it: row i is
the output of block i, which is layer i + 1, and the last row lies before the final norm.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from analysis.formats.base import Foreign
from analysis.vectors.vector import Vector
from trainables.errors import Fault
from trainables.shapes import FinalRow

FINAL_ROW_WORDS: Mapping[FinalRow, str] = {
    "post_norm": "the last row was read after the final norm: no steering at the last layer",
    "pre_norm": "the last row was read before the final norm",
    "absent": "there is no last row",
}


def matrix_fault(file: Foreign, value: object, name: str = "") -> Fault | None:
    """Why ``value`` is not a matrix of finite numbers, or None."""
    if not isinstance(value, torch.Tensor):
        return file.fault(f"must be a tensor [rows, hidden]; got a {type(value).__name__}", name)
    if value.ndim != 2 or 0 in value.shape or not value.is_floating_point():
        return file.fault(f"must be a tensor of floats [rows, hidden]; got {list(value.shape)} {value.dtype}", name)
    if not bool(torch.isfinite(value).all()):
        return file.fault("holds numbers that are not finite", name)
    return None


def with_embedding(values: torch.Tensor, final_row: FinalRow) -> Vector:
    """A vector of rows 0..num_layers as they are."""
    return Vector(values.to(torch.float32).contiguous(), final_row, "", "")


def of_blocks(rows: Mapping[int, torch.Tensor], num_layers: int, final_row: FinalRow) -> Vector:
    """A vector of the rows of blocks; layers without one, the embedding output among them, are zero."""
    hidden = next(iter(rows.values())).shape[0]
    values = torch.zeros(num_layers + 1, hidden)
    for block, row in rows.items():
        values[block + 1] = row.to(torch.float32)
    return Vector(values, final_row if num_layers - 1 in rows else "absent", "", "")


def describe(vector: Vector, rows: str) -> tuple[str, ...]:
    """What was found, for people."""
    layers, hidden = vector.values.shape[0] - 1, vector.values.shape[1]
    return (
        f"{layers} layers, hidden size {hidden}",
        rows,
        FINAL_ROW_WORDS[vector.final_row],
    )
