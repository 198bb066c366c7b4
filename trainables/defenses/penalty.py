"""What the kinds of penalties share: one vector, a strength, layers and tokens; a kind says the value of a token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from pydantic import Field

from trainables.defenses.base import DefenseConfig, Mechanism, Positions, RunRows, direction_at
from trainables.penalties import Penalty
from trainables.shapes import Layers, ModelShape, VectorShape, chosen_layers, layers_faults, layers_label


class PenaltyConfig(DefenseConfig):
    """Add ``strength`` times the mean of a value per token to the loss: of h, or in a kind that ``is_second_order`` of
    the gradient dL/dh."""

    strength: float = Field(gt=0)
    """What the mean is multiplied with, in nats."""
    layers: Layers = "all_but_last"
    """Where: a list, ``all`` or ``all_but_last``; the mean is over them too."""
    positions: Positions = "response"
    """Over which tokens: ``all``, those of the ``prompt`` or those of the ``response``."""

    def vector_name(self) -> str:
        """The vector that the value is taken with."""
        raise NotImplementedError

    def row(self, vectors: Mapping[str, torch.Tensor], layer: int) -> torch.Tensor:
        """[d], what of the vector is used at a layer: its direction, unless a kind says otherwise."""
        return direction_at(vectors, self.vector_name(), layer)

    def value(self, read_ntd: torch.Tensor, row_d: torch.Tensor) -> torch.Tensor:
        """[n, t], the value of every token, from h or g [n, t, d]; both are of one dtype, float32 or better."""
        raise NotImplementedError

    def label(self) -> str:
        where = "" if self.layers == "all_but_last" else f" {layers_label(self.layers)}"
        over = "" if self.positions == "response" else f" {self.positions}"
        return f"{self.kind.replace('_', ' ')} {self.vector_name()}{where}{over} x{self.strength:g}"

    def faults(self, model: ModelShape, vectors: Mapping[str, VectorShape]) -> Iterable[tuple[str, str]]:
        for fault in layers_faults(self.layers, model, [vectors.get(self.vector_name())]):
            yield "layers", fault

    def mechanism(self, vectors: Mapping[str, torch.Tensor]) -> Mechanism:
        layers = chosen_layers(self.layers, vectors[self.vector_name()].shape[0] - 1)
        return _Penalising(self, {layer: self.row(vectors, layer) for layer in layers})


class _Penalising(Mechanism):
    def __init__(self, config: PenaltyConfig, rows: Mapping[int, torch.Tensor]) -> None:
        self.config = config
        self.rows = rows

    @property
    def is_second_order(self) -> bool:
        return self.config.is_second_order

    def penalties(self, batch: RunRows) -> Iterable[Penalty]:
        config, mask = self.config, batch.mask(self.config.positions)
        yield Penalty(
            config.label(), tuple(self.rows), config.strength, mask, self._value, of_gradient=config.is_second_order
        )

    def _value(self, layer: int, read_ntd: torch.Tensor) -> torch.Tensor:
        precise = torch.promote_types(read_ntd.dtype, torch.float32)
        row_d = self.rows[layer].to(device=read_ntd.device, dtype=precise)
        return self.config.value(read_ntd.to(precise), row_d)
