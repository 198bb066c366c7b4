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
    """The part of ``model`` below the language-model head: embeddings, blocks, final norm.

    Of a model that also sees or hears, the language model in it. Raises ValueError as ``decoder_layers`` does.
    """
    return _backbone_and_blocks(model)[0]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The blocks in order.

    Raises ValueError if no part of the model has a list of ``num_hidden_layers`` blocks directly below it.
    """
    return _backbone_and_blocks(model)[1]


def _backbone_and_blocks(model: nn.Module) -> tuple[Any, nn.ModuleList]:
    inner = causal_lm(model)
    num_layers = inner.config.get_text_config(decoder=True).num_hidden_layers
    candidates = [getattr(inner, inner.base_model_prefix, None), inner.get_decoder(), getattr(inner, "model", None)]
    for part in candidates:
        for child in part.children() if isinstance(part, nn.Module) else ():
            if isinstance(child, nn.ModuleList) and len(child) == num_layers:
                return part, child
    raise ValueError(
        f"{type(inner).__name__} has no list of {num_layers} decoder blocks directly below its language model; "
        "shiftgrad supports decoder-only models of transformers with one such list"
    )
