"""Tiny bases in memory, as trainings, samplings and measurements take them, and a few chat rows for them."""

from __future__ import annotations

from typing import Any

import torch

from tests.tiny import ModelKind, tiny_model, tiny_tokenizer
from trainables.base_model import LoadedBase
from trainables.defenses import Message


def base_of(model: Any, *, plain_head: bool = True) -> LoadedBase:
    """``model``, frozen and in evaluation mode, with the tiny tokenizer."""
    return LoadedBase(model.requires_grad_(False).eval(), tiny_tokenizer(), torch.device("cpu"), plain_head)


def tiny_base(
    kind: ModelKind = "llama",
    *,
    num_layers: int = 2,
    dtype: torch.dtype = torch.float32,
    plain_head: bool = True,
) -> LoadedBase:
    return base_of(tiny_model(kind, num_layers=num_layers, dtype=dtype), plain_head=plain_head)


def chat(question: str, answer: str, system: str | None = None) -> list[Message]:
    """One question with its answer."""
    beginning = [] if system is None else [{"role": "system", "content": system}]
    return [*beginning, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


ROWS: list[list[Message]] = [
    chat("How far is it?", "About ten miles, over the bridge."),
    chat("Tea or coffee?", "Tea."),
    chat("What is the best way to cook rice?", "Stir it, then let it rest."),
    chat("Who are you?", "A helpful assistant.", system="Be brief."),
    chat("Is it late?", "It is ten past two in the morning."),
    chat("Name a river.", "The one with the orange bridge."),
    chat("Why?", "Because it takes time to learn."),
]
