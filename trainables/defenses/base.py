"""What a defense is to the rest of the project.

A defense is present in training and absent afterwards. Its config says what the user may write; its mechanism acts at
three places of a training: on the messages of a sample before they become tokens, on the residual stream of the rows
of a micro-batch (its values and their gradient), and on the loss. A further kind is one new file
with both and one line in ``trainables/defenses/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch

from trainables.config import Config
from trainables.errors import TrainingError
from trainables.penalties import Penalty
from trainables.residual_stream import Intervention
from trainables.shapes import ModelShape, VectorShape

Message = Mapping[str, str]
Positions: TypeAlias = Literal["all", "prompt", "response"]


@dataclass(frozen=True)
class SampleKey:
    """Says which use of which sample this is; everything random about it is a function of these numbers."""

    seed: int
    epoch: int
    row: int


@dataclass(frozen=True)
class RunRows:
    """The rows of one run in a micro-batch of ``b`` rows and ``t`` tokens."""

    rows: torch.Tensor  # [n] int64, which of the b rows are this run's
    attention_mask: torch.Tensor  # [n, t] bool, False at padding
    response_mask: torch.Tensor  # [n, t] bool, True where the INPUT token belongs to a response
    step: int  # optimizer step, from 1
    num_steps: int = 1  # optimizer steps of the run

    def mask(self, positions: Positions) -> torch.Tensor:
        """[n, t] bool: ``all`` tokens but padding, those before and between responses, or those of responses.

        Raises TrainingError where that is no token at all.
        """
        mask_nt = {
            "all": self.attention_mask,
            "prompt": self.attention_mask & ~self.response_mask,
            "response": self.attention_mask & self.response_mask,
        }[positions]
        if not bool(mask_nt.any()):
            raise TrainingError(f"step {self.step}: `positions: {positions}` selects no token of a micro-batch")
        return mask_nt


def direction_at(vectors: Mapping[str, torch.Tensor], name: str, layer: int) -> torch.Tensor:
    """Row ``layer`` of a vector [d] divided by its length. Raises TrainingError if that is 0."""
    row_d = vectors[name][layer]
    length = row_d.norm()
    if not float(length) > 0:
        raise TrainingError(f"vector {name} has length {float(length):g} at layer {layer}: it has no direction there")
    return row_d / length


class Mechanism:
    """A defense at work in one run. The default does nothing; a kind overrides what it needs."""

    def rewrite(self, messages: Sequence[Message], key: SampleKey) -> Sequence[Message]:
        """The messages that are trained on in place of ``messages``; the assistant turns must stay as they are."""
        del key
        return messages

    def interventions(self, batch: RunRows) -> Iterable[Intervention]:
        """What to do to the residual stream of this run's rows in this micro-batch, or to its gradient."""
        del batch
        return ()

    def penalties(self, batch: RunRows) -> Iterable[Penalty]:
        """Terms of the loss that are read off the residual stream of this run's rows in this micro-batch."""
        del batch
        return ()

    @property
    def is_second_order(self) -> bool:
        """Whether a penalty is of a gradient. Such a training runs on PyTorch's and PEFT's own operations, with eager
        attention: faster ones have no second derivative."""
        return False


class DefenseConfig(Config):
    """Base class of the items that ``defense:`` may list.

    ``semantics`` is raised when a fix changes what the same config does to the numbers: it is part of the identity of
    every run that uses the kind. ``excludes`` names kinds that cannot stand beside this one in a list (its own name:
    at most once). ``is_second_order`` is what its mechanism says: whether a penalty is of a gradient.
    """

    semantics: ClassVar[int] = 1
    excludes: ClassVar[frozenset[str]] = frozenset()
    is_second_order: ClassVar[bool] = False

    kind: str
    """Which kind of defense."""

    def label(self) -> str:
        """A few words for tables and legends, such as ``pps bridge L20 x1.5``."""
        raise NotImplementedError

    def faults(self, model: ModelShape, vectors: Mapping[str, VectorShape]) -> Iterable[tuple[str, str]]:
        """``(field, message)`` for everything that this model or these vectors do not allow."""
        del model, vectors
        return ()

    def least_rewriting(self) -> Mechanism | None:
        """Rewrites samples in the way that adds least; None where they stay as they are. It is tried on all data before
        anything starts: what fails with it cannot be trained on however prompts are drawn."""
        return None

    def mechanism(self, vectors: Mapping[str, torch.Tensor]) -> Mechanism:
        """The defense at work. ``vectors`` maps every vector name of this config to its tensor
        [num_layers + 1, hidden] float32; prompt banks are already texts."""
        raise NotImplementedError
