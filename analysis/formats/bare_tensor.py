"""A .pt file with one tensor and nothing that says what its rows are: asked, not guessed."""

from __future__ import annotations

import torch

from analysis.formats.base import Foreign, Format, Hints, Imported
from analysis.formats.rows import matrix_fault
from trainables.errors import ConfigError


class BareTensor(Format):
    name = "bare-tensor"
    what = "one tensor (.pt) whose rows you say: --rows embedding or --rows blocks"
    hints = frozenset({"rows", "final_row", "num_layers"})

    def recognises(self, file: Foreign, hints: Hints) -> bool:
        from analysis.formats.persona_vector import NAMED

        is_open = hints.rows is None and NAMED.fullmatch(file.name) is None
        return file.suffix == ".pt" and is_open and isinstance(file.tensors, torch.Tensor)

    def read(self, file: Foreign, hints: Hints) -> Imported:
        del hints
        fault = matrix_fault(file, file.tensors)
        if fault is None:
            rows, hidden = file.tensors.shape
            fault = file.fault(
                f"one tensor [{rows}, {hidden}], and nothing says what its rows are; say rows: embedding (as in "
                f"persona_vectors: a model of {rows - 1} layers, row 0 its embedding output, the last row after the "
                f"final norm) or rows: blocks (as in assistant-axis: a model of {rows} layers, row 0 the output of its "
                "first block)"
            )
        raise ConfigError([fault], "nothing was read")
