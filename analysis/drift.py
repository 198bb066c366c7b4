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
from scipy import special

from analysis.bootstrap import CONFIDENCE
from analysis.conditions import NOTHING
from analysis.measured_batches import BATCH_TOKENS, Measured, Progress, aligned_items, batches, read_values
from analysis.measured_rows import DriftRow
from trainables.base_model import LoadedBase
from trainables.defenses import Message
from trainables.errors import DataError
from trainables.residual_stream import ValueIntervention, residual_stream


def response_sums(
    base: LoadedBase,
    model: Any,
    rows: Sequence[Sequence[Message]],
    layers: Sequence[int],
    conditions: Mapping[str, Sequence[ValueIntervention]],
    *,
    max_length: int,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> dict[str, dict[int, torch.Tensor]]:
    """Per condition and layer the sum of h over the response tokens of every row and, last, their number:
    [rows, hidden + 1] float64.

    h is read after what is at work in ``conditions``, by name. ``progress(done, total)`` counts rows under conditions.
    Raises DataError for rows that cannot be encoded.
    """
    groups = aligned_items(base, rows, [NOTHING], max_length=max_length)
    sums: dict[str, dict[int, torch.Tensor]] = {}
    done, total = 0, len(groups) * len(conditions)
    for name, interventions in conditions.items():
        found: dict[tuple[int, int], torch.Tensor] = {}  # (layer, row) -> [hidden + 1]

        def read(batch: Measured, layer: int, hidden_nd: torch.Tensor, found: Any = found) -> None:
            for item, part in zip(batch.items, hidden_nd.cpu().double().split(batch.counts), strict=True):
                found[layer, item.row] = torch.cat((part.sum(0), part.new_tensor([len(part)])))

        with residual_stream(model, interventions):
            for batch in batches(groups, batch_tokens):
                read_values(base, model, batch, layers, read)
                done += len(batch)
                if progress is not None:
                    progress(done, total)
        sums[name] = {layer: torch.stack([found[layer, row] for row in range(len(groups))]) for layer in layers}
    return sums


def drift_rows(
    sums: Mapping[str, Mapping[int, torch.Tensor]], centers: Mapping[str, torch.Tensor], *, measure_id: str
) -> Iterator[DriftRow]:
    """One row per condition, layer and place. ``sums``: condition -> layer -> as ``response_sums`` gives them;
    ``centers``: name -> [num_layers + 1, hidden].

    The estimate and its interval are those of ``estimated``; None where they are not known. Raises DataError where a
    mean or a place has no direction.
    """
    for condition, by_layer in sums.items():
        for layer, sums_re in by_layer.items():
            for name, center in centers.items():
                center_d = center[layer].double()
                mean_d = sums_re[:, :-1].sum(0) / sums_re[:, -1].sum()
                drift = float(1 - (mean_d @ center_d) / (mean_d.norm() * center_d.norm()))
                if math.isnan(drift):
                    raise DataError(f"layer {layer}: {name} or the mean activation has length 0: it has no direction")
                estimate, low, high = estimated(sums_re, center_d) or (None, None, None)
                yield DriftRow(
                    measure_id=measure_id,
                    condition=condition,
                    layer=layer,
                    center=name,
                    num_rows=len(sums_re),
                    num_tokens=round(float(sums_re[:, -1].sum())),
                    drift=drift,
                    drift_estimate=estimate,
                    drift_estimate_low=low,
                    drift_estimate_high=high,
                )


def estimated(sums_re: torch.Tensor, center_d: torch.Tensor) -> tuple[float, float, float] | None:
    """What the drift would be over all rows such as these, with both ends of its 95 % interval; None with fewer than 3
    rows, or where they scatter so much that their mean has no direction.

    The mean m of R rows is longer than that of all by the scatter of the rows, in directions that have nothing to do
    with it: E |m|^2 = |mu|^2 + V. So V is estimated, as that of a ratio of sums, and taken off:

        V = R / (R - 1) sum over r of |S_r - n_r m|^2 / N^2        estimate = 1 - <m, c> / (|c| sqrt(|m|^2 - V))

    with S_r and n_r sum and number of the tokens of row r, and N of all. The interval is the jackknife's over rows with
    Student's t of R - 1 degrees, cut at 0 and 2.
    """
    num_rows = len(sums_re)
    if num_rows < 3:
        return None
    sums_rd, counts_r = sums_re[:, :-1], sums_re[:, -1]
    squares_r, weighted_rd = (sums_rd * sums_rd).sum(1), counts_r[:, None] * sums_rd

    def drift(left_out: torch.Tensor, rows: int) -> torch.Tensor:
        """[x] for every row [r] of ``left_out`` [x, r], which is 1 where a row is left out."""
        kept = 1 - left_out
        counts_x = kept @ counts_r
        mean_xd = kept @ sums_rd / counts_x[:, None]
        lengths_x = (mean_xd * mean_xd).sum(1)
        scatter_x = (
            kept @ squares_r - 2 * (mean_xd * (kept @ weighted_rd)).sum(1) + lengths_x * (kept @ counts_r.square())
        )
        free_x = lengths_x - rows / (rows - 1) * scatter_x / counts_x.square()
        return 1 - (mean_xd @ center_d) / (center_d.norm() * free_x.sqrt())

    whole = float(drift(sums_re.new_zeros(1, num_rows), num_rows))
    parts = drift(torch.eye(num_rows, dtype=sums_re.dtype), num_rows - 1)
    error = math.sqrt((num_rows - 1) / num_rows * float((parts - parts.mean()).square().sum()))
    half = float(special.stdtrit(num_rows - 1, (1 + CONFIDENCE) / 2)) * error
    if math.isnan(whole) or math.isnan(half):
        return None
    low, high = (min(2.0, max(0.0, end)) for end in (whole - half, whole + half))
    return min(high, max(low, whole)), low, high
