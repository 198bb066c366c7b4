"""Positive preventative steering: a trait vector is added to the residual stream while the model is trained.

Equation 1 of "Shifting the Gradient" (arXiv 2604.16423): h_l = f_l(h_{l-1}) + alpha * v_l at every token position, in
training only. Layers are embedding-inclusive, the vector is used at its raw norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch

from trainables.config import VectorName
from trainables.defenses.base import DefenseConfig, Mechanism, RunRows
from trainables.residual_stream import Add, Intervention
from trainables.shapes import ModelShape, VectorShape, layer_fault


class Pps(DefenseConfig):
    """Add ``coefficient`` times the vector's row of ``layer`` to the output of that layer, at every position."""

    kind: Literal["pps"] = "pps"
    vector: VectorName
    """Name of one of the sweep's ``vectors``."""
    layer: int
    """Where it is added: layer l is the output of decoder block l - 1. Allowed are 1 to the number of blocks; the last
    one needs a vector whose last row was read before the final norm."""
    coefficient: float
    """How much of the vector, which is used at its raw norm. Not 0; a negative one pushes away."""

    def label(self) -> str:
        return f"pps {self.vector} L{self.layer} x{self.coefficient:g}"

    def faults(self, model: ModelShape, vectors: Mapping[str, VectorShape]) -> Iterable[tuple[str, str]]:
        fault = layer_fault(self.layer, model, vectors.get(self.vector))
        if fault is not None:
            yield "layer", fault
        if self.coefficient == 0:
            yield "coefficient", "0 adds nothing; use `defense: none` for the undefended run"

    def mechanism(self, vectors: Mapping[str, torch.Tensor]) -> Mechanism:
        return _Steering(self.layer, self.coefficient * vectors[self.vector][self.layer])


class _Steering(Mechanism):
    def __init__(self, layer: int, shift_d: torch.Tensor) -> None:
        self.layer = layer
        self.shift_d = shift_d

    def interventions(self, batch: RunRows) -> Iterable[Intervention]:
        yield Add(layer=self.layer, vector=self.shift_d, rows=batch.rows)
