"""What is present in the forward pass of a measurement: nothing, vectors, a prompt, or a whole defense.

A condition changes how a sample is read, never which tokens are measured: the response tokens are those of the sample
as it stands in the data, cut at the same place, and a prompt only moves them further back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from analysis.rows import NO_CONDITION
from trainables.defenses import Inoculation, Mechanism, Message, SampleKey


class Steering(NamedTuple):
    """``coefficient`` times row l of ``vector`` is added to the output of layer l, for every l of ``layers``, at every
    position (eq. 1 of arXiv 2604.16423, with as many layers as wanted)."""

    vector: torch.Tensor  # [num_layers + 1, hidden]
    layers: Sequence[int]
    coefficient: float


@dataclass(frozen=True, eq=False)
class Condition:
    """One way to read a sample. Without anything but a name: as it is.

    prompt: an inoculation prompt, put before the first user message as in training; of several, each row draws one,
    as the first epoch of a training with ``seed`` does. mechanisms: defenses at work, after steering and prompt; one
    that edits gradients changes what is read below the edited layer, as in training.
    """

    name: str = NO_CONDITION
    interventions: tuple[Steering | tuple[torch.Tensor, Sequence[int], float], ...] = ()
    prompt: str | tuple[str, ...] | None = None
    mechanisms: tuple[Mechanism, ...] = ()
    seed: int = 0

    @property
    def changes_messages(self) -> bool:
        return self.prompt is not None or bool(self.mechanisms)

    def rewrite(self, messages: Sequence[Message], row: int) -> Sequence[Message]:
        """The messages that are read in place of ``messages``, row ``row`` (from 0) of the data."""
        for mechanism in self._rewriting:
            messages = mechanism.rewrite(messages, SampleKey(self.seed, 0, row))
        return messages

    @cached_property
    def shifts(self) -> Mapping[int, torch.Tensor]:
        """Layer -> what is added there, [hidden]: the sum over all steerings."""
        shifts: dict[int, torch.Tensor] = {}
        for vector, layers, coefficient in self.interventions:
            for layer in layers:
                shift_d = coefficient * vector[layer]
                shifts[layer] = shifts[layer] + shift_d if layer in shifts else shift_d
        return shifts

    @cached_property
    def _rewriting(self) -> tuple[Mechanism, ...]:
        if self.prompt is None:
            return self.mechanisms
        bank = (self.prompt,) if isinstance(self.prompt, str) else self.prompt
        return (Inoculation(prompts=bank).mechanism({}), *self.mechanisms)


NOTHING = Condition()
"""The sample as it is."""
