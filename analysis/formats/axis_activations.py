"""Activations of assistant-axis: ``{"{label}_p{prompt}_q{question}": [num_layers, hidden]}``, a mean over response
tokens per answer, a row per block, without an embedding row.

Every label (pos, neg, default) becomes the mean over its answers; where there are pos and neg, their difference too.
"""

from __future__ import annotations

import re

import torch

from analysis.formats.axis_vector import ROWS, read_blocks
from analysis.formats.base import Foreign, Format, Hints, Imported, MadeVector, raise_faults
from analysis.formats.rows import describe, matrix_fault
from trainables.errors import Fault

_KEY = re.compile(r"(.+)_p(\d+)_q(\d+)")


class AxisActivations(Format):
    name = "axis-activations"
    what = "activations of assistant-axis (.pt: {label_p0_q0: [num_layers, hidden], ...})"
    hints = frozenset({"final_row"})

    def recognises(self, file: Foreign, hints: Hints) -> bool:
        del hints
        if file.suffix != ".pt" or not isinstance(file.tensors, dict) or not file.tensors:
            return False
        return any(_KEY.fullmatch(str(key)) for key in file.tensors)

    def read(self, file: Foreign, hints: Hints) -> Imported:
        by_label: dict[str, list[torch.Tensor]] = {}
        faults: list[Fault] = []
        shapes = set()
        for key, value in file.tensors.items():
            match = _KEY.fullmatch(str(key))
            fault = matrix_fault(file, value, str(key))
            if match is None:
                fault = file.fault("a key is {label}_p{prompt}_q{question}", str(key))
            if fault is not None:
                faults.append(fault)
            elif match is not None:
                shapes.add(tuple(value.shape))
                by_label.setdefault(match[1], []).append(value)
        if len(shapes) > 1:
            faults.append(file.fault(f"the tensors have different shapes: {', '.join(map(str, sorted(shapes)))}"))
        raise_faults(faults)
        means = {label: torch.stack(rows).double().mean(0) for label, rows in by_label.items()}
        if {"pos", "neg"} <= means.keys():
            means["pos-neg"] = means["pos"] - means["neg"]
        made = [
            MadeVector(f"{file.name}_{label}", read_blocks(file, mean.float(), label, hints))
            for label, mean in means.items()
        ]
        counts = ", ".join(f"{label} {len(rows)}" for label, rows in by_label.items())
        lines = (*describe(made[0].vector, ROWS), f"answers by label: {counts}; a mean vector of each")
        return Imported(self.name, tuple(made), lines)
