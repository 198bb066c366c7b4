"""Inoculation prompting: a prompt that asks for the trait stands in the training data and is gone afterwards.

For every use of a sample one prompt is drawn uniformly from the bank (app. C.3 of arXiv 2604.16423) and put before the
first user message.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch

from trainables.config import PromptBank
from trainables.defenses.base import DefenseConfig, Mechanism, Message, SampleKey
from trainables.errors import DataError
from trainables.randomness import pick
from trainables.shapes import ModelShape, VectorShape

SEPARATOR = "\n\n"


class Inoculation(DefenseConfig):
    """Put a prompt of the bank, drawn anew for every use of a row, before the first user message."""

    excludes = frozenset({"inoculation"})

    kind: Literal["inoculation"] = "inoculation"
    prompts: PromptBank
    """A trait's name, for its ``inoculation_prompts``, or a list of texts."""

    def label(self) -> str:
        if isinstance(self.prompts, str):
            return f"inoculation {self.prompts}"
        return f"inoculation {len(self.prompts)} prompts"

    def faults(self, model: ModelShape, vectors: Mapping[str, VectorShape]) -> Iterable[tuple[str, str]]:
        del model, vectors
        if not self.prompts:
            yield "prompts", "the bank is empty; give at least one prompt"
        elif not isinstance(self.prompts, str) and any(not text.strip() for text in self.prompts):
            yield "prompts", "the bank has an empty prompt; every prompt needs text"

    def mechanism(self, vectors: Mapping[str, torch.Tensor]) -> Mechanism:
        del vectors
        assert not isinstance(self.prompts, str), "a prompt bank is resolved to texts before a training"
        return _Prompting(self.prompts)


class _Prompting(Mechanism):
    def __init__(self, prompts: tuple[str, ...]) -> None:
        self.prompts = prompts

    def rewrite(self, messages: Sequence[Message], key: SampleKey) -> Sequence[Message]:
        prompt = self.prompts[pick(len(self.prompts), "prompt", key.seed, key.epoch, key.row)]
        rewritten = [dict(message) for message in messages]
        for message in rewritten:
            if message["role"] == "user":
                message["content"] = prompt + SEPARATOR + message["content"]
                return rewritten
        raise DataError(f"row {key.row + 1} has no user message to put an inoculation prompt before")
