"""Inoculation prompting: a prompt that asks for the trait stands in the training data and is gone afterwards.

For every use of a sample one prompt is drawn uniformly from the bank (app. C.3 of arXiv 2604.16423) and put before the
first user message; other places and other ways to draw are options.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field

from trainables.config import AddedLater, PromptBank
from trainables.defenses.base import DefenseConfig, Mechanism, Message, SampleKey
from trainables.errors import DataError
from trainables.randomness import Key, pick
from trainables.shapes import ModelShape, VectorShape

SEPARATOR = "\n\n"
Placement: TypeAlias = Literal["user_prefix", "user_suffix", "system", "replace_system"]
Draw: TypeAlias = Literal["use", "epoch", "fixed"]


class Inoculation(DefenseConfig):
    """Put a prompt of the bank, drawn at random, into every training sample."""

    excludes = frozenset({"inoculation"})

    kind: Literal["inoculation"] = "inoculation"
    prompts: PromptBank
    """A trait's name, for its ``inoculation_prompts``; the name of a bank in ``configs/prompts`` or a path to one (a
    text file with a prompt per line); or a list of texts."""
    bank_size: Annotated[int | None, Field(ge=1), AddedLater()] = None
    """How many prompts of the bank are used: the first so many. null: all."""
    placement: Annotated[Placement, AddedLater()] = "user_prefix"
    """``user_prefix``: before the first user message, with an empty line between; ``user_suffix``: after it;
    ``system``: before what the system message says; ``replace_system``: in its place. A sample without a system message
    gets one with the prompt alone, and the chat template's default one falls away."""
    draw: Annotated[Draw, AddedLater()] = "use"
    """When a prompt is drawn: anew for every ``use`` of a sample; once per ``epoch``, the same for all samples; or
    ``fixed``, once per sample for the whole training."""

    def label(self) -> str:
        bank = self.prompts if isinstance(self.prompts, str) else f"{len(self.prompts)} prompts"
        size = "" if self.bank_size is None else f" first {self.bank_size}"
        place = "" if self.placement == "user_prefix" else f" {self.placement}"
        draw = {"use": "", "epoch": " per epoch", "fixed": " fixed"}[self.draw]
        return f"inoculation {bank}{size}{place}{draw}"

    def faults(self, model: ModelShape, vectors: Mapping[str, VectorShape]) -> Iterable[tuple[str, str]]:
        del model, vectors
        if not self.prompts:
            yield "prompts", "the bank is empty; give at least one prompt"
        elif not isinstance(self.prompts, str):
            if any(not text.strip() for text in self.prompts):
                yield "prompts", "the bank has an empty prompt; every prompt needs text"
            if self.bank_size is not None and self.bank_size > len(self.prompts):
                yield "bank_size", f"the bank has only {len(self.prompts)} prompts; got {self.bank_size}"

    def least_rewriting(self) -> Mechanism:
        assert not isinstance(self.prompts, str), "a prompt bank is resolved to texts"
        return _Prompting((min(self.prompts[: self.bank_size], key=len),), self.placement, "fixed")

    def mechanism(self, vectors: Mapping[str, torch.Tensor]) -> Mechanism:
        del vectors
        assert not isinstance(self.prompts, str), "a prompt bank is resolved to texts before a training"
        return _Prompting(self.prompts[: self.bank_size], self.placement, self.draw)


class _Prompting(Mechanism):
    def __init__(self, prompts: tuple[str, ...], placement: Placement, draw: Draw) -> None:
        self.prompts = prompts
        self.placement = placement
        self.draw = draw

    def rewrite(self, messages: Sequence[Message], key: SampleKey) -> Sequence[Message]:
        drawn: tuple[Key, ...] = {
            "use": ("prompt", key.seed, key.epoch, key.row),
            "epoch": ("prompt of an epoch", key.seed, key.epoch),
            "fixed": ("prompt of a row", key.seed, key.row),
        }[self.draw]
        prompt = self.prompts[pick(len(self.prompts), *drawn)]
        rewritten = [dict(message) for message in messages]
        if self.placement in ("system", "replace_system"):
            if not rewritten or rewritten[0]["role"] != "system":
                return [{"role": "system", "content": prompt}, *rewritten]
            own = SEPARATOR + rewritten[0]["content"] if self.placement == "system" else ""
            rewritten[0]["content"] = prompt + own
            return rewritten
        for message in rewritten:
            if message["role"] == "user":
                parts = (prompt, message["content"])
                message["content"] = SEPARATOR.join(parts if self.placement == "user_prefix" else reversed(parts))
                return rewritten
        raise DataError(f"row {key.row + 1} has no user message to put an inoculation prompt beside")
