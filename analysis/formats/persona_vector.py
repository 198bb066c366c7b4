"""Vectors of persona_vectors: torch.save of ONE float32 tensor [num_layers + 1, hidden], hidden states row by row.

Row 0 is the embedding output and row l layer l, which is our order; the last row was read after the final norm. The
file itself does not say so: its name ``{trait}_{prompt_avg,prompt_last,response_avg}_diff.pt`` does, or the user
(``rows: embedding``).
"""

from __future__ import annotations

import io
import re

import torch

from analysis.formats.base import Foreign, Format, Hints, Imported, MadeVector
from analysis.formats.rows import describe, matrix_fault, with_embedding
from analysis.vectors.vector import Vector
from trainables.errors import ConfigError

NAMED = re.compile(r".+_(prompt_avg|prompt_last|response_avg)_diff")


class PersonaVector(Format):
    name = "persona-vector"
    what = "a vector of persona_vectors (.pt: one tensor [num_layers + 1, hidden])"
    hints = frozenset({"rows", "final_row"})

    def recognises(self, file: Foreign, hints: Hints) -> bool:
        if file.suffix != ".pt" or hints.rows == "blocks":
            return False
        is_said = hints.rows == "embedding" or NAMED.fullmatch(file.name) is not None
        return is_said and isinstance(file.tensors, torch.Tensor)

    def read(self, file: Foreign, hints: Hints) -> Imported:
        fault = matrix_fault(file, file.tensors)
        if fault is not None:
            raise ConfigError([fault], "nothing was read")
        vector = with_embedding(file.tensors, hints.final_row or "post_norm")
        lines = describe(vector, "row 0 is the embedding output, row l is layer l: the same order as ours")
        return Imported(self.name, (MadeVector(file.name, vector),), lines)


def to_bytes(vector: Vector) -> bytes:
    """The file that persona_vectors loads: every row, the embedding row too. Where the last one lies is not in it."""
    buffer = io.BytesIO()
    torch.save(vector.values.to(torch.float32).clone(), buffer)
    return buffer.getvalue()
