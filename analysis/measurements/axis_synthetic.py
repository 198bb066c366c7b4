"""How near estimators come to a known axis, on synthetic activations: no model is read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal, Self, TypeAlias

import pandas as pd
import torch
from pydantic import Field

from analysis.axis_study import Setting, alignment_rows, comparison_rows, summary_rows
from analysis.measurements.base import Made, Part, Study

_Noise: TypeAlias = Annotated[float, Field(ge=0)]


class SyntheticAxes(Study):
    """Alignment of every estimator with a known axis, over noise, numbers of rows and seeds; the cells are the product
    of the three lists. Two sets of rows lie around means that are ``separation`` apart along the axis."""

    tables = ("axis_alignments",)
    merged_tables = ("axis_summary", "axis_tests")

    kind: Literal["axis_synthetic"] = "axis_synthetic"
    noise: tuple[_Noise, ...] = Field(min_length=1)
    """Standard deviations of what is added to every coordinate of every row."""
    num_rows: tuple[Annotated[int, Field(ge=2)], ...] = Field(min_length=1)
    """Rows of each of the two sets."""
    seeds: int = Field(default=20, ge=1)
    """How many draws there are of each: seeds 0, 1, 2, ..."""
    dimension: int = Field(default=64, ge=2)
    """Size of an activation."""
    separation: float = Field(default=3.2, gt=0)
    """Distance of the means of the two sets, along the axis."""
    spread: float = Field(default=0.5, ge=0)
    """What rows vary by themselves in every coordinate, as a standard deviation; noise comes on top of it."""

    def settings(self) -> list[Setting]:
        """What each cell is."""
        return [
            Setting(noise, num_rows, seed, self.dimension, self.separation, self.spread)
            for noise, num_rows, seed in itertools.product(self.noise, self.num_rows, range(self.seeds))
        ]

    def num_cells(self) -> int:
        return len(self.noise) * len(self.num_rows) * self.seeds

    def smoke(self) -> Self:
        return self.model_copy(update={"noise": self.noise[:2], "num_rows": self.num_rows[:1], "seeds": 2})

    def compute(self, measure_id: str, cells: Sequence[int], progress: Callable[[int, int], None]) -> Made:
        settings, rows = self.settings(), []
        for done, cell in enumerate(cells, start=1):
            rows += list(alignment_rows(settings[cell], measure_id))
            progress(done, len(cells))
        return Made({"axis_alignments": rows})

    def merge(self, measure_id: str, parts: Sequence[Part], vectors: Mapping[str, torch.Tensor]) -> Made:
        del vectors
        alignments = pd.concat([part.tables["axis_alignments"] for part in parts], ignore_index=True)
        settings = {(one.noise, one.num_rows): one for one in self.settings()}
        return Made(
            {
                "axis_summary": list(summary_rows(alignments, settings, measure_id)),
                "axis_tests": list(comparison_rows(alignments, settings, measure_id)),
            }
        )
