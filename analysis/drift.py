"""How far a model's mean response activation has drifted from a place, such as the mean over plain answers.

For rows r with response tokens t, at one layer:

    m = sum over r, t of h_rt / number of tokens        drift = 1 - cos(m, c), c the place

It is what the signal ``drift`` of a training is of its step's rows (trainables/signals.py), here over chosen rows, of
any model, and under what may be present while a model answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from analysis.conditions import NOTHING
from analysis.measured_batches import BATCH_TOKENS, Measured, aligned_items, batches, read_values
from analysis.measured_rows import DriftRow
from trainables.base_model import LoadedBase
from trainables.defenses import Message
from trainables.errors import DataError
from trainables.randomness import generator
from trainables.residual_stream import ValueIntervention, residual_stream

NUM_RESAMPLES = 2000


def response_sums(
    base: LoadedBase,
    model: Any,
    rows: Sequence[Sequence[Message]],
    layers: Sequence[int],
    *,
    max_length: int,
    interventions: Sequence[ValueIntervention] = (),
    batch_tokens: int = BATCH_TOKENS,
) -> dict[int, torch.Tensor]:
    """Per layer the sum of h over the response tokens of every row and, last, their number: [rows, hidden + 1] float64.

    h is read after ``interventions``. Raises DataError for rows that cannot be encoded.
    """
    items = [group[0] for group in aligned_items(base, rows, [NOTHING], max_length=max_length)]
    found: dict[tuple[int, int], torch.Tensor] = {}  # (row, layer) -> [hidden + 1]

    def read(batch: Measured, layer: int, hidden_nd: torch.Tensor) -> None:
        for item, part in zip(batch.items, hidden_nd.cpu().double().split(batch.counts), strict=True):
            found[item.row, layer] = torch.cat((part.sum(0), part.new_tensor([len(part)])))

    with residual_stream(model, interventions):
        for batch in batches([[item] for item in items], batch_tokens):
            read_values(base, model, batch, layers, read)
    return {layer: torch.stack([found[row, layer] for row in range(len(items))]) for layer in layers}


def drift_rows(
    sums: Mapping[str, Mapping[int, torch.Tensor]], centers: Mapping[str, torch.Tensor], *, measure_id: str
) -> Iterator[DriftRow]:
    """One row per condition, layer and place. ``sums``: condition -> layer -> as ``response_sums`` gives them;
    ``centers``: name -> [num_layers + 1, hidden].

    The interval is the basic bootstrap's over 2,000 draws of as many rows with replacement: twice the drift less the
    97.5th and the 2.5th percentile, cut at 0 and 2. A mean of few rows lies further from any place than that of all
    would, in every direction that has nothing to do with it, and that of a draw further still; percentiles themselves
    would count that twice. The draws depend on the number of rows alone, so conditions and models have the same ones.
    None with one row. Raises DataError where a mean or a place has no direction.
    """
    for condition, by_layer in sums.items():
        for layer, sums_re in by_layer.items():
            resampled_xd = _resampled(sums_re)
            for name, center in centers.items():
                center_d = center[layer].double()
                (drift,) = _distances(sums_re[:, :-1].sum(0, keepdim=True), center_d).tolist()
                if math.isnan(drift):
                    raise DataError(f"layer {layer}: {name} or the mean activation has length 0: it has no direction")
                low = high = None
                if len(sums_re) > 1:
                    tails = torch.tensor([0.975, 0.025], dtype=torch.float64)
                    drawn = torch.quantile(_distances(resampled_xd, center_d), tails)
                    low, high = (2 * drift - drawn).clamp(0, 2).tolist()
                yield DriftRow(
                    measure_id=measure_id,
                    condition=condition,
                    layer=layer,
                    center=name,
                    num_rows=len(sums_re),
                    num_tokens=round(float(sums_re[:, -1].sum())),
                    drift=drift,
                    drift_low=low,
                    drift_high=high,
                )


def _resampled(sums_re: torch.Tensor) -> torch.Tensor:
    """Sums of h over draws of rows, [resamples, hidden]; their lengths do not matter to a cosine."""
    num_rows = len(sums_re)
    drawn = torch.randint(num_rows, (NUM_RESAMPLES, num_rows), generator=generator("drift", num_rows))
    times_xr = torch.zeros(NUM_RESAMPLES, num_rows, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones_like(drawn, dtype=torch.float64)
    )
    return times_xr @ sums_re[:, :-1]


def _distances(values_xd: torch.Tensor, center_d: torch.Tensor) -> torch.Tensor:
    """1 - cos with the center, [x]; NaN where either has length 0."""
    return 1 - (values_xd @ center_d) / (values_xd.norm(dim=1) * center_d.norm())
