"""Vectors of assistant-axis: [num_layers, hidden], a row per block, without an embedding row.

``{"vector": ..., "type": "pos_3" or "mean", "role": ...}`` of a trait or role; ``{"axis": ..., "metadata": ...}`` or a
bare tensor of the axis, mean(default) - mean(roles). Their row i is our layer i + 1, so row l - 1 there is row l of
persona_vectors. The rows are outputs of blocks: the last one lies before the final norm.
"""

from __future__ import annotations

import torch

from analysis.formats.base import Foreign, Format, Hints, Imported, MadeVector
from analysis.formats.rows import describe, matrix_fault, of_blocks
from analysis.vectors.vector import Vector
from trainables.errors import ConfigError, Fault

ROWS = "row i is the output of block i, our layer i + 1; there is no embedding row, so row 0 of ours is zero"


class AxisVector(Format):
    name = "axis-vector"
    what = "a vector or the axis of assistant-axis (.pt: {vector, type, role}, {axis, metadata} or one tensor)"
    hints = frozenset({"rows", "final_row"})

    def recognises(self, file: Foreign, hints: Hints) -> bool:
        if file.suffix != ".pt" or hints.rows == "embedding":
            return False
        content = file.tensors
        if isinstance(content, dict):
            return "axis" in content or {"vector", "type"} <= set(content)
        return hints.rows == "blocks" and isinstance(content, torch.Tensor)

    def read(self, file: Foreign, hints: Hints) -> Imported:
        content, key = file.tensors, ""
        if isinstance(content, dict):
            key = "axis" if "axis" in content else "vector"
        values = content[key] if key else content
        vector = read_blocks(file, values, key, hints)
        lines = list(describe(vector, ROWS))
        if key == "vector":
            lines.append(f"{content['type']} of {content.get('role', 'a role that is not named')}")
        return Imported(self.name, (MadeVector(file.name, vector),), tuple(lines))


def read_blocks(file: Foreign, values: object, key: str, hints: Hints) -> Vector:
    """A tensor with a row per block as a vector of ours."""
    fault: Fault | None = matrix_fault(file, values, key)
    if fault is not None:
        raise ConfigError([fault], "nothing was read")
    assert isinstance(values, torch.Tensor)
    return of_blocks(dict(enumerate(values)), values.shape[0], hints.final_row or "pre_norm")
