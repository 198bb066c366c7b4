"""Vectors and a tiny model's shape for tests of training methods."""

from __future__ import annotations

from typing import Any

import torch

from tests.bases import ROWS
from trainables.shapes import ModelShape, VectorShape

LAYERS, HIDDEN = 3, 32
MODEL = ModelShape(num_layers=LAYERS, hidden_size=HIDDEN, vocab_size=300)
SHAPE = VectorShape(LAYERS, HIDDEN, "pre_norm")


def vector(seed: int) -> torch.Tensor:
    return torch.randn(LAYERS + 1, HIDDEN, generator=torch.Generator().manual_seed(seed))


VECTORS = {"v": vector(1), "w": vector(2), "mu": 0.1 * vector(3)}
FIRST_STEP: dict[str, Any] = {"batch_size": len(ROWS), "max_steps": 1, "max_gradient_norm": None, "weight_decay": 0.0}


def unit(name: str, layer: int) -> torch.Tensor:
    row = VECTORS[name][layer].double()
    return row / row.norm()
