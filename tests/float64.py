"""Tiny models that compute in float64 throughout.

The RMS norms of transformers compute in float32 whatever the model's dtype is, which caps the agreement of a
"float64" Llama with anything at about 1e-7. Here they are replaced by torch's own, so that a tolerance of 1e-10 means
what it says. The rotary tables stay float32: they are constants, equal on both sides of every comparison.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.tiny import ModelKind, tiny_model


def float64_model(kind: ModelKind = "llama", *, num_layers: int = 4, hidden: int = 32, seed: int = 0) -> Any:
    """``tiny_model`` in float64 with norms in float64, frozen, evaluation mode."""
    model: Any = tiny_model(kind, num_layers=num_layers, hidden=hidden, dtype=torch.float64, seed=seed)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                eps = getattr(child, "variance_epsilon", getattr(child, "eps", None))
                norm = nn.RMSNorm(child.weight.shape, eps=eps, dtype=torch.float64)
                one_plus = 1.0 if type(child).__name__.startswith("Gemma") else 0.0
                norm.weight = nn.Parameter(one_plus + child.weight.detach())
                setattr(parent, name, norm)
    return model.requires_grad_(False).eval()
