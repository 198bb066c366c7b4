"""Directional ablation: the span of some vectors is taken out of the residual stream while the model is trained.

h' = h - sum_j <h, q_j> q_j, with q_j an orthonormal basis of the vectors' rows of the layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch

from trainables.config import VectorNames
from trainables.defenses.base import DefenseConfig, Mechanism, Positions, RunRows
from trainables.errors import TrainingError
from trainables.residual_stream import Ablate, Intervention, orthonormal
from trainables.shapes import Layers, ModelShape, VectorShape, chosen_layers, layers_faults, layers_label


class Ablation(DefenseConfig):
    """Take the directions of vectors out of the residual stream, in training only."""

    kind: Literal["ablation"] = "ablation"
    vectors: VectorNames
    """Names of the sweep's ``vectors``. At every layer their rows are made orthonormal together."""
    layers: Layers = "all_but_last"
    """Where: a list, ``all`` or ``all_but_last``."""
    positions: Positions = "all"
    """At which tokens: ``all``, those of the ``prompt`` or those of the ``response``."""

    def label(self) -> str:
        where = "" if self.layers == "all_but_last" else f" {layers_label(self.layers)}"
        tokens = "" if self.positions == "all" else f" {self.positions}"
        return f"ablation {'+'.join(self.vectors)}{where}{tokens}"

    def faults(self, model: ModelShape, vectors: Mapping[str, VectorShape]) -> Iterable[tuple[str, str]]:
        for fault in layers_faults(self.layers, model, [vectors.get(name) for name in self.vectors]):
            yield "layers", fault
        if len(set(self.vectors)) < len(self.vectors):
            yield "vectors", "a vector is listed twice"
        if len(self.vectors) > model.hidden_size:
            yield "vectors", f"{len(self.vectors)} directions do not fit into a space of {model.hidden_size} dimensions"

    def mechanism(self, vectors: Mapping[str, torch.Tensor]) -> Mechanism:
        bases: dict[int, torch.Tensor] = {}
        for layer in chosen_layers(self.layers, vectors[self.vectors[0]].shape[0] - 1):
            rows_kd = torch.stack([vectors[name][layer] for name in self.vectors])
            try:
                bases[layer] = orthonormal(rows_kd)
            except ValueError as error:
                names = ", ".join(self.vectors)
                raise TrainingError(f"vectors {names} cannot be ablated at layer {layer}: {error}") from error
        return _Ablating(bases, self.positions)


class _Ablating(Mechanism):
    def __init__(self, bases: Mapping[int, torch.Tensor], positions: Positions) -> None:
        self.bases = bases
        self.positions = positions

    def interventions(self, batch: RunRows) -> Iterable[Intervention]:
        mask = None if self.positions == "all" else batch.mask(self.positions)
        for layer, basis_kd in self.bases.items():
            yield Ablate(layer, basis_kd, rows=batch.rows, token_mask=mask)
