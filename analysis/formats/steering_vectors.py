"""Vectors of the steering-vectors library, saved as what they hold: a dict from layer to a tensor [hidden].

A layer there is the number of a decoder block, so our layer is one more. How many layers the model has is not in it.
"""

from __future__ import annotations

import torch

from analysis.formats.base import Foreign, Format, Hints, Imported, MadeVector, raise_faults
from analysis.formats.rows import describe, of_blocks
from trainables.errors import Fault


class SteeringVectors(Format):
    name = "steering-vectors"
    what = "layer activations of steering-vectors (.pt: {block number: [hidden], ...})"
    hints = frozenset({"num_layers", "final_row"})

    def recognises(self, file: Foreign, hints: Hints) -> bool:
        del hints
        if file.suffix != ".pt" or not isinstance(file.tensors, dict) or not file.tensors:
            return False
        return all(isinstance(key, int) and not isinstance(key, bool) for key in file.tensors)

    def read(self, file: Foreign, hints: Hints) -> Imported:
        faults = [
            file.fault("must be a tensor [hidden] of finite numbers", str([key]))
            for key, row in file.tensors.items()
            if not isinstance(row, torch.Tensor) or row.ndim != 1 or not bool(torch.isfinite(row).all())
        ]
        vector_rows = {block: row for block, row in file.tensors.items() if isinstance(row, torch.Tensor)}
        if len({row.shape for row in vector_rows.values()}) > 1:
            faults.append(file.fault("the layers have different sizes"))
        faults += block_faults(file, list(file.tensors), hints)
        raise_faults(faults)
        assert hints.num_layers is not None
        vector = of_blocks(vector_rows, hints.num_layers, hints.final_row or "pre_norm")
        lines = describe(vector, f"a layer there is a block, ours is one more; {block_words(list(vector_rows))}")
        return Imported(self.name, (MadeVector(file.name, vector),), lines)


def block_faults(file: Foreign, blocks: list[int], hints: Hints) -> list[Fault]:
    """Faults of a file that names the blocks it has and not how many the model has."""
    most = max(blocks, default=0)
    if hints.num_layers is None:
        return [
            file.fault(
                f"has rows for blocks up to {most} and does not say how many layers the model has; "
                f"give {Hints.flag('num_layers')} (in a sweep: num_layers), at least {most + 1}"
            )
        ]
    if min(blocks, default=0) < 0 or most >= hints.num_layers:
        return [
            file.fault(
                f"has blocks {min(blocks)} to {most}; a model of {hints.num_layers} layers has 0 to "
                f"{hints.num_layers - 1}"
            )
        ]
    return []


def block_words(blocks: list[int]) -> str:
    """Which layers of ours have a row."""
    layers = sorted(block + 1 for block in blocks)
    whole = layers == list(range(layers[0], layers[-1] + 1))
    listed = f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))
    return f"rows for our layers {listed}; the others are zero"
