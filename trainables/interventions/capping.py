"""``capping``: projections on an axis are clamped while the model answers (eq. 1 of activation capping, with the sign
that clamps: h' = h - max(0, s - ceiling) a + max(0, floor - s) a for s = <h, a>)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field

from trainables.config import NamesChatFile, Path, VectorName
from trainables.errors import DataError
from trainables.interventions.base import Bound, InterventionConfig, Projections, Reference
from trainables.residual_stream import Cap, ValueIntervention
from trainables.shapes import Layers, ModelShape, VectorShape, chosen_layers, layers_faults, layers_label

_BOUNDS = ("tau", "ceiling", "floor")


class Capping(InterventionConfig):
    """Clamp the projection of every token on an axis: between -``tau`` and ``tau``, below a ``ceiling``, above a
    ``floor``, or between these. What is inside stays as it is, to the bit."""

    kind: Literal["capping"] = "capping"
    vector: VectorName
    """Name of one of the sweep's ``vectors``: the axis. Its length has no say."""
    layers: Layers
    """Where it acts, at every layer along its own row: a list, ``all`` or ``all_but_last``."""
    tau: Annotated[float, Field(ge=0)] | Bound | None = None
    """Clamp to [-tau, tau], in units of activation or calibrated: ``{percentile: 99}``. 0 takes the axis out."""
    ceiling: float | Bound | None = None
    """Clamp from above: in units of activation, or calibrated as ``{percentile: 99, stretch: 1}``."""
    floor: float | Bound | None = None
    """Clamp from below, likewise."""
    first_token: bool = False
    """Whether the first token of the conversation is clamped too. In many models its activations are a hundred times as
    large as those of all others, whatever is said, and clamping them breaks the model."""
    reference: Annotated[str | None, NamesChatFile(), Field(min_length=1)] = None
    """Chat JSONL file for what is calibrated: the untrained base reads it, and the projections of its response tokens
    are counted."""
    max_length: int = Field(default=512, ge=8)
    """Tokens of a row of ``reference`` that are read."""

    @property
    def tokens_read(self) -> int:
        return self.max_length

    def label(self) -> str:
        parts = []
        if self.tau is not None:
            parts.append(f"within {_text(self.tau)}")
        if self.floor is not None:
            parts.append(f"at least {_text(self.floor)}")
        if self.ceiling is not None:
            parts.append(f"at most {_text(self.ceiling)}")
        spared = " first token too" if self.first_token else ""
        return f"cap {self.vector} {layers_label(self.layers)} {' and '.join(parts)}{spared}"

    def faults(self, model: ModelShape, vectors: Mapping[str, VectorShape]) -> Iterable[tuple[Path, str]]:
        for message in layers_faults(self.layers, model, [vectors.get(self.vector)]):
            yield ("layers",), message
        given = [name for name in _BOUNDS if getattr(self, name) is not None]
        if not given:
            yield ("tau",), "missing; give tau, or a ceiling or a floor or both"
        if self.tau is not None and len(given) > 1:
            yield ("tau",), f"stands beside {given[1]}; give tau alone, or a ceiling and a floor"
        calibrated = [name for name in given if isinstance(getattr(self, name), Bound)]
        if calibrated and self.reference is None:
            yield ("reference",), f"missing; {calibrated[0]} is a percentile of it: give a chat JSONL file"
        if not calibrated and self.reference is not None:
            yield ("reference",), "would do nothing, because no bound is a percentile; leave it out"
        if isinstance(self.floor, float) and isinstance(self.ceiling, float) and self.floor > self.ceiling:
            yield ("ceiling",), f"{self.ceiling:g} lies below the floor, {self.floor:g}; nothing is between them"
        if isinstance(self.floor, Bound) and isinstance(self.ceiling, Bound):
            low, high = self.floor.percentile, self.ceiling.percentile
            if low > 50 or high < 50 or low == high:
                message = f"percentiles {low:g} and {high:g}: the floor's must be at most 50 and the ceiling's at least"
                yield ("ceiling", "percentile"), message

    def at_work(self, vectors: Mapping[str, torch.Tensor], projections: Projections) -> list[ValueIntervention]:
        vector = vectors[self.vector]
        layers = chosen_layers(self.layers, len(vector) - 1)
        found: Mapping[int, torch.Tensor] = {}
        if self.reference is not None:
            found = projections(Reference(self.reference, self.vector, layers, self.max_length))
        caps: list[ValueIntervention] = []
        for layer in layers:
            if not float(vector[layer].norm()) > 0:
                raise DataError(f"the axis {self.vector} has length 0 at layer {layer}: it has no direction there")
            floor, ceiling = self._bounds(found.get(layer))
            if floor is not None and ceiling is not None and floor > ceiling:
                raise DataError(
                    f"layer {layer}: the ceiling, {ceiling:g}, lies below the floor, {floor:g}; nothing is between them"
                )
            spared = None if self.first_token else 0
            caps.append(Cap(layer=layer, direction=vector[layer], ceiling=ceiling, floor=floor, spared=spared))
        return caps

    def _bounds(self, projections_n: torch.Tensor | None) -> tuple[float | None, float | None]:
        """(floor, ceiling) of one layer."""

        def value(bound: float | Bound | None) -> float | None:
            if not isinstance(bound, Bound):
                return bound
            assert projections_n is not None, "checked before anything started"
            return bound.of(projections_n)

        if self.tau is None:
            return value(self.floor), value(self.ceiling)
        if isinstance(self.tau, Bound):
            assert projections_n is not None, "checked before anything started"
            tau = self.tau.of_sizes(projections_n)
        else:
            tau = self.tau
        return -tau, tau


def _text(bound: float | Bound) -> str:
    return bound.label() if isinstance(bound, Bound) else f"{bound:g}"
