"""What an intervention at inference is: present while a model answers and while its loss on plain answers is measured,
absent in training. It acts on every row of the batch, at every token, in the order in which items are listed.

What is calibrated is calibrated on the untrained base: its projections, before anything else acts, are the reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from pydantic import Field

from trainables.config import Config, Path
from trainables.residual_stream import ValueIntervention
from trainables.shapes import ModelShape, VectorShape


@dataclass(frozen=True)
class Reference:
    """Activations that an item is calibrated on: those of the response tokens of chat rows."""

    content: str  # hash of the rows
    vector: str  # what they are projected on, as the config names it
    layers: tuple[int, ...]
    max_length: int


class Projections(Protocol):
    """Layer -> projections on the unit axis of every reference token, [n]."""

    def __call__(self, reference: Reference) -> Mapping[int, torch.Tensor]: ...


class Bound(Config):
    """A bound that is read off reference activations, at every layer its own."""

    percentile: float = Field(ge=0, le=100)
    """Of the projections of the reference's response tokens on the axis (for ``tau``: of their sizes)."""
    stretch: float = Field(default=1.0, gt=0)
    """How far the bound lies from the reference's median, in units of the percentile's distance from it (``tau``: from
    0). 1: at the percentile."""

    def label(self) -> str:
        return f"p{self.percentile:g}" + (f" x{self.stretch:g}" if self.stretch != 1 else "")

    def of(self, projections_n: torch.Tensor) -> float:
        """median + stretch (percentile - median) of the projections."""
        values = projections_n.double()
        middle = float(torch.quantile(values, 0.5))
        return middle + self.stretch * (float(torch.quantile(values, self.percentile / 100)) - middle)

    def of_sizes(self, projections_n: torch.Tensor) -> float:
        """stretch times the percentile of the projections' sizes."""
        return self.stretch * float(torch.quantile(projections_n.double().abs(), self.percentile / 100))


class InterventionConfig(Config):
    """Base class of the items that ``interventions:`` may list.

    ``semantics`` is raised when a fix changes what the same config does: it is part of the identity of all answers
    under the kind.
    """

    semantics: ClassVar[int] = 1

    kind: str
    """Which kind of intervention."""

    @property
    def tokens_read(self) -> int:
        """Tokens of a row of a reference file that are read."""
        return 512

    def label(self) -> str:
        """A few words for tables and legends, such as ``cap bridge L14-25 at most p99``."""
        raise NotImplementedError

    def faults(self, model: ModelShape, vectors: Mapping[str, VectorShape]) -> Iterable[tuple[Path, str]]:
        """``(path of a field, message)`` for everything that this model or these vectors do not allow."""
        del model, vectors
        return ()

    def at_work(self, vectors: Mapping[str, torch.Tensor], projections: Projections) -> list[ValueIntervention]:
        """What is done to the residual stream. ``vectors`` are tensors [num_layers + 1, hidden] by the names that the
        config holds; ``projections`` reads reference activations. Raises DataError where a calibration cannot be."""
        raise NotImplementedError
