"""Where in the network a direction, or a finetuning, is large: sizes by layer and module, and their distribution."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from analysis.weight_rows import DELTA, WeightProfileRow, WeightSizeRow
from analysis.weight_space.delta import AdapterDelta
from analysis.weight_space.parameters import Place

BINS_PER_DECADE = 4
_LOWEST, _HIGHEST = -12, 2  # decades


def edges() -> list[float]:
    """The bounds of sizes that entries are counted between: 0, and four to a power of ten."""
    count = (_HIGHEST - _LOWEST) * BINS_PER_DECADE
    return [0.0, *(10.0 ** (_LOWEST + number / BINS_PER_DECADE) for number in range(count + 1))]


class SizeCounter:
    """Counts entries by their size, matrix by matrix."""

    def __init__(self) -> None:
        self.bounds = torch.tensor(edges(), dtype=torch.float64)
        self.counts = torch.zeros(len(self.bounds), dtype=torch.int64)  # the last: at least the highest bound

    def add(self, values: torch.Tensor) -> None:
        where = torch.bucketize(values.abs().double().flatten(), self.bounds, right=True) - 1
        self.counts += torch.bincount(where, minlength=len(self.bounds))

    def rows(self, measure_id: str, what: str) -> list[WeightSizeRow]:
        """Rows from the least size that was seen to the greatest."""
        bounds = [*self.bounds.tolist(), float("inf")]
        seen = [number for number, count in enumerate(self.counts.tolist()) if count]
        between = range(min(seen), max(seen) + 1) if seen else range(0)
        return [
            WeightSizeRow(
                measure_id=measure_id,
                what=what,
                low=bounds[number],
                high=bounds[number + 1],
                num_entries=int(self.counts[number]),
            )
            for number in between
        ]


def profile_rows(
    measure_id: str,
    what: str,
    tensors: Iterable[tuple[str, torch.Tensor]],
    places: Mapping[str, Place],
    counter: SizeCounter | None = None,
) -> list[WeightProfileRow]:
    """A row per layer and kind of module, in the order of the tensors; ``counter`` is given every tensor too."""
    found: dict[Place, tuple[int, float, float]] = {}
    for name, values in tensors:
        number, squares, largest = found.get(places[name], (0, 0.0, 0.0))
        wide = values.double()
        sums = (number + values.numel(), squares + float(wide.square().sum()), max(largest, float(wide.abs().max())))
        found[places[name]] = sums
        if counter is not None:
            counter.add(values)
    return [
        WeightProfileRow(
            measure_id=measure_id,
            what=what,
            layer=place.layer,
            module=place.module,
            num_parameters=number,
            sum_of_squares=squares,
            largest=largest,
        )
        for place, (number, squares, largest) in found.items()
    ]


def delta_profile(
    measure_id: str, delta: AdapterDelta, places: Mapping[str, Place]
) -> tuple[list[WeightProfileRow], list[WeightSizeRow]]:
    """Both tables of what a finetuning changed."""

    def whole() -> Iterator[tuple[str, torch.Tensor]]:
        for name, matrix in delta.items():
            yield name, matrix.values()

    counter = SizeCounter()
    rows = profile_rows(measure_id, DELTA, whole(), places, counter)
    return rows, counter.rows(measure_id, DELTA)
