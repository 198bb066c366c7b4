"""Finding the parts of a Hugging Face causal language model, through PEFT's and DeepSpeed's wrappers."""

from __future__ import annotations

from typing import Any

from torch import nn


def causal_lm(model: nn.Module) -> Any:
    """The transformers ``...ForCausalLM`` module inside ``model``."""
    module: Any = getattr(model, "module", model)  # DeepSpeed's engine
    get_base_model = getattr(module, "get_base_model", None)  # PEFT
    return get_base_model() if callable(get_base_model) else module


def backbone(model: nn.Module) -> Any:
    """The part of ``model`` below the language-model head: embeddings, blocks, final norm."""
    inner = causal_lm(model)
    return getattr(inner, inner.base_model_prefix)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The blocks in order.

    Raises ValueError if the model has no list of ``config.num_hidden_layers`` blocks directly below its backbone.
    """
    base = backbone(model)
    num_layers = base.config.num_hidden_layers
    for child in base.children():
        if isinstance(child, nn.ModuleList) and len(child) == num_layers:
            return child
    raise ValueError(
        f"{type(base).__name__} has no list of {num_layers} decoder blocks directly below it; "
        "shiftgrad supports decoder-only models of transformers with one such list"
    )
