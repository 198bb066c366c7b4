"""A vector: directions in the residual stream, one row per layer, and its file.

It is [num_layers + 1, hidden] float32; row l is in the space of layer l (row 0: the embedding output; the last row:
the output of the last block BEFORE the final norm).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from trainables.errors import ConfigError, Fault
from trainables.shapes import FinalRow, VectorShape

TENSOR = "vector"
FINAL_ROWS: tuple[FinalRow, ...] = ("pre_norm", "post_norm", "absent")


@dataclass(frozen=True)
class Vector:
    """A named direction. ``model`` and ``revision`` say whose residual stream it lives in; "" where not known."""

    values: torch.Tensor  # [num_layers + 1, hidden] float32
    final_row: FinalRow
    model: str
    revision: str

    def to_bytes(self) -> bytes:
        """The vector as a safetensors file with its facts as metadata; the same vector gives the same bytes."""
        metadata = {"final_row": self.final_row, "model": self.model, "revision": self.revision}
        file = save({TENSOR: self.values.to(torch.float32).contiguous()}, metadata)
        size = int.from_bytes(file[:8], "little")
        # the library writes the metadata in another order every time
        header = json.dumps(json.loads(file[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)  # the format wants the numbers at a multiple of 8
        return len(header).to_bytes(8, "little") + header + file[8 + size :]

    @staticmethod
    def read(path: Path) -> Vector:
        """Read a vector file; ConfigError if it is not one of ours."""
        shape, model, revision = read_vector_header(path)
        with safe_open(path, framework="pt") as handle:
            return Vector(handle.get_tensor(TENSOR), shape.final_row, model, revision)


def read_vector_header(path: Path) -> tuple[VectorShape, str, str]:
    """(shape, model, revision) of a vector file without reading its numbers.

    Raises ConfigError if it is not a readable safetensors file with one float32 tensor called ``vector`` of two
    dimensions and metadata ``final_row``.
    """
    wanted = "a safetensors file with one float32 tensor 'vector' [num_layers + 1, hidden] and metadata final_row"
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            names = list(handle.keys())
            if names != [TENSOR]:
                raise ConfigError([Fault(str(path), f"holds tensors {names}; a vector is {wanted}")])
            piece = handle.get_slice(TENSOR)
            dimensions, dtype = piece.get_shape(), piece.get_dtype()
    except (SafetensorError, OSError) as error:
        raise ConfigError([Fault(str(path), f"cannot be read ({error}); a vector is {wanted}")]) from error
    final_row = next((known for known in FINAL_ROWS if known == metadata.get("final_row")), None)
    if len(dimensions) != 2 or dtype != "F32" or final_row is None:
        found = f"shape {dimensions}, dtype {dtype}, final_row {metadata.get('final_row')!r}"
        raise ConfigError([Fault(str(path), f"{found}; a vector is {wanted}: {', '.join(FINAL_ROWS)}")])
    shape = VectorShape(dimensions[0] - 1, dimensions[1], final_row)
    return shape, metadata.get("model", ""), metadata.get("revision", "")
