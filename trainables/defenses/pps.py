"""Positive preventative steering: a trait vector is added to the residual stream while the model is trained.

Equation 1 of "Shifting the Gradient" (arXiv 2604.16423): h_l = f_l(h_{l-1}) + alpha * v_l at every token position, in
training only. Layers are embedding-inclusive, the vector is used at its raw norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, TypeAlias

import torch

from trainables.config import AddedLater, VectorName
from trainables.defenses.base import DefenseConfig, Mechanism, Positions, RunRows
from trainables.residual_stream import Add, Intervention
from trainables.shapes import Layers, ModelShape, VectorShape, chosen_layers, layer_fault, layers_faults, layers_label

CoefficientSchedule: TypeAlias = Literal["constant", "ramp_up", "ramp_down"]


class Pps(DefenseConfig):
    """Add ``coefficient`` times the vector's row of a layer to the output of that layer; several vectors are several
    items."""

    kind: Literal["pps"] = "pps"
    vector: VectorName
    """Name of one of the sweep's ``vectors``."""
    layer: int | None = None
    """Where it is added: layer l is the output of decoder block l - 1. Allowed are 1 to the number of blocks; the last
    one needs a vector whose last row was read before the final norm. Give this or ``layers``."""
    layers: Annotated[Layers | None, AddedLater()] = None
    """Several layers in place of ``layer``, each with the vector's own row: a list, ``all`` or ``all_but_last``."""
    coefficient: float | tuple[float, ...]
    """How much of the vector, which is used at its raw norm; a list has one for each of ``layers``. Not 0; a negative
    one pushes away."""
    positions: Annotated[Positions, AddedLater()] = "all"
    """At which tokens: ``all`` (padding too), those of the ``prompt`` or those of the ``response``."""
    schedule: Annotated[CoefficientSchedule, AddedLater()] = "constant"
    """The coefficient over n optimizer steps: ``constant``; ``ramp_up``, at step t times t / n; ``ramp_down``, times
    1 - (t - 1) / n."""

    def label(self) -> str:
        where = f"L{self.layer}" if self.layers is None else layers_label(self.layers)
        several = (self.coefficient,) if isinstance(self.coefficient, float) else self.coefficient
        tokens = "" if self.positions == "all" else f" {self.positions}"
        ramp = "" if self.schedule == "constant" else f" {self.schedule.replace('_', ' ')}"
        return f"pps {self.vector} {where} x{','.join(f'{one:g}' for one in several)}{tokens}{ramp}"

    def faults(self, model: ModelShape, vectors: Mapping[str, VectorShape]) -> Iterable[tuple[str, str]]:
        vector = vectors.get(self.vector)
        if self.layer is None and self.layers is None:
            yield "layer", "missing; give a layer, or several as `layers`"
        elif self.layer is not None and self.layers is not None:
            yield "layers", "stands beside `layer`; give one of them"
        elif self.layers is not None:
            for message in layers_faults(self.layers, model, [vector]):
                yield "layers", message
        elif self.layer is not None:
            fault = layer_fault(self.layer, model, vector)
            if fault is not None:
                yield "layer", fault
        if isinstance(self.coefficient, float):
            if self.coefficient == 0:
                yield "coefficient", "0 adds nothing; use `defense: none` for the undefended run"
            return
        if self.layers is None:
            yield "coefficient", "a list belongs to `layers`; give one number"
        else:
            num_layers = len(chosen_layers(self.layers, model.num_layers))
            if len(self.coefficient) != num_layers:
                yield "coefficient", f"{len(self.coefficient)} coefficients for {num_layers} layers; give one for each"
        if 0 in self.coefficient:
            yield "coefficient", "0 adds nothing; leave its layer out"

    def mechanism(self, vectors: Mapping[str, torch.Tensor]) -> Mechanism:
        vector = vectors[self.vector]
        assert self.layer is not None or self.layers is not None, "checked before a training"
        chosen = (self.layer,) if self.layer is not None else chosen_layers(self.layers or (), vector.shape[0] - 1)
        coefficients = (self.coefficient,) * len(chosen) if isinstance(self.coefficient, float) else self.coefficient
        shifts = {layer: alpha * vector[layer] for layer, alpha in zip(chosen, coefficients, strict=True)}
        return _Steering(shifts, self.positions, self.schedule)


class _Steering(Mechanism):
    def __init__(self, shifts: Mapping[int, torch.Tensor], positions: Positions, schedule: CoefficientSchedule) -> None:
        self.shifts = shifts
        self.positions = positions
        self.schedule = schedule

    def interventions(self, batch: RunRows) -> Iterable[Intervention]:
        mask = None if self.positions == "all" else batch.mask(self.positions)
        factor = self._factor(batch)
        for layer, shift_d in self.shifts.items():
            vector = shift_d if factor is None else factor * shift_d
            yield Add(layer=layer, vector=vector, rows=batch.rows, token_mask=mask)

    def _factor(self, batch: RunRows) -> float | None:
        match self.schedule:
            case "constant":
                return None
            case "ramp_up":
                return batch.step / batch.num_steps
            case "ramp_down":
                return 1 - (batch.step - 1) / batch.num_steps
