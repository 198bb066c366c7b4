"""How steady a calibrated ceiling is over what it is calibrated on, and under shifted activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import Field

from analysis.cap_stability import stability_rows
from analysis.measurements.base import BaseMeasurement, Made, Part, Shard
from analysis.measurements.under_conditions import readout_faults
from analysis.references import token_projections
from trainables.config import Path, VectorNames
from trainables.interventions.base import Bound
from trainables.shapes import ModelShape, VectorShape


class CapStabilityMeasurement(BaseMeasurement):
    """Draws rows of the data again and again, calibrates a ceiling on them and reads on the others what it leaves as it
    is, and what it catches of a steering attack; the definitions are in ``analysis.cap_stability``."""

    merged_tables = ("cap_stability",)
    has_tensors = True

    kind: Literal["cap_stability"] = "cap_stability"
    on: Literal["base"] = "base"
    """A cap is calibrated on the untrained base."""
    vectors: VectorNames
    """The axes; an attack steers along the same vector."""
    layers: tuple[int, ...] = Field(min_length=1)
    """Where caps act, each layer for itself: 0 is the embedding output, l the output of block l - 1."""
    ceiling: Bound
    """How a ceiling is read off the rows that were drawn, as in ``capping``."""
    calibration_rows: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    """How many rows are drawn; the others are held out."""
    strengths: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)
    """Attacks: coefficients of steering along the vector, at the layer that is capped."""
    shifts: tuple[Annotated[float, Field(ge=0)], ...] = (0.0,)
    """Standard deviations of Gaussian noise on every coordinate, in units of that of the data's projections."""
    draws: int = Field(default=50, ge=1)
    """How often rows are drawn."""

    def faults(self, model: ModelShape, vectors: Mapping[str, VectorShape]) -> Iterable[tuple[Path, str]]:
        yield from readout_faults(self.layers, self.vectors, model, vectors)

    def data_faults(self, num_rows: int) -> Iterable[tuple[Path, str]]:
        for index, drawn in enumerate(self.calibration_rows):
            if drawn >= num_rows:
                message = f"{drawn} of the {num_rows} rows that are read leave none to hold out; "
                allowed = f"allowed: 1 to {num_rows - 1}" if num_rows > 1 else "at least 2 rows are needed"
                yield ("calibration_rows", index), message + allowed

    def smoke(self) -> Self:
        return self.model_copy(update={"calibration_rows": (1,), "draws": 2})

    def measure(self, shard: Shard) -> Made:
        tensors: dict[str, torch.Tensor] = {}
        for done, (number, messages) in enumerate(shard.rows.items(), start=1):
            for name in self.vectors:
                found = token_projections(shard.base, [messages], shard.vectors[name], self.layers, shard.max_length)
                tensors |= {f"{name}/{layer}/{number}": values_n for layer, values_n in found.items()}
            shard.progress(done, len(shard.rows))
        return Made({}, tensors)

    def merge(self, measure_id: str, parts: Sequence[Part], vectors: Mapping[str, torch.Tensor]) -> Made:
        made: list[object] = []
        for name in self.vectors:
            for layer in self.layers:
                made += stability_rows(
                    _of_rows(parts, f"{name}/{layer}/"),
                    float(vectors[name][layer].norm()),
                    self.ceiling,
                    calibration_rows=self.calibration_rows,
                    shifts=self.shifts,
                    strengths=self.strengths,
                    draws=self.draws,
                    measure_id=measure_id,
                    vector=name,
                    layer=layer,
                )
        return Made({"cap_stability": made})


def _of_rows(parts: Sequence[Part], head: str) -> list[torch.Tensor]:
    """The tensors of all parts under ``head``, in the order of the rows, however they were dealt out."""
    found = {
        int(name.removeprefix(head)): tensor
        for part in parts
        for name, tensor in part.tensors.items()
        if name.startswith(head)
    }
    return [found[row] for row in sorted(found)]
