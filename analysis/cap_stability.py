"""How steady a calibrated ceiling is: over the rows that it is calibrated on, and where activations are shifted.

At one layer with unit axis a let s = <h, a> be the projections of the response tokens of the reference rows, and sigma
their standard deviation. In every draw n rows are drawn; the ceiling c is calibrated on their tokens, and read on those
of the rows that are held out:

    benign    s + k sigma z              z ~ N(0, 1): what noise N(0, (k sigma)^2 I) on h does to a projection
    attacked  s + k sigma z + m |v|      the same under steering by m times the vector v that the axis comes from

    kept    share of benign tokens with a projection of at most c: the cap leaves them as they are
    caught  share of attacked tokens above c: the cap takes something away from them
    F1      2 kept caught / (kept + caught)

The whole attack is never taken away: what is caught comes down to c.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from analysis.measured_rows import CapStabilityRow
from trainables.interventions.base import Bound
from trainables.randomness import generator


def stability_rows(
    projections: Sequence[torch.Tensor],
    vector_length: float,
    ceiling: Bound,
    *,
    calibration_rows: Sequence[int],
    shifts: Sequence[float],
    strengths: Sequence[float],
    draws: int,
    measure_id: str,
    vector: str,
    layer: int,
) -> Iterator[CapStabilityRow]:
    """One row per number of calibration rows, shift and strength. ``projections``: per reference row those of its
    response tokens, [tokens] float32; ``vector_length`` |v| of the layer.

    Draws are keyed by their number alone, so all layers, shifts and strengths have the same ones. Some row
    must be left to hold out.
    """
    sigma = float(torch.cat(list(projections)).double().std())
    for num_rows in calibration_rows:
        drawn = [_draw(projections, num_rows, draw, ceiling) for draw in range(draws)]
        ceilings = np.array([bound for bound, _, _ in drawn])
        for shift in shifts:
            benign = [held_n + shift * sigma * noise_n for _, held_n, noise_n in drawn]
            kept = np.array([_share(one <= bound) for one, bound in zip(benign, ceilings, strict=True)])
            for strength in strengths:
                moved = strength * vector_length
                caught = np.array([_share(one + moved > bound) for one, bound in zip(benign, ceilings, strict=True)])
                f1 = 2 * kept * caught / np.maximum(kept + caught, np.finfo(float).tiny)
                low, high = np.quantile(f1, [0.025, 0.975])
                yield CapStabilityRow(
                    measure_id=measure_id,
                    vector=vector,
                    layer=layer,
                    num_rows=num_rows,
                    shift=shift,
                    strength=strength,
                    num_draws=draws,
                    ceiling=float(ceilings.mean()),
                    ceiling_sd=float(ceilings.std(ddof=1)) if draws > 1 else None,
                    reference_sd=sigma,
                    kept=float(kept.mean()),
                    caught=float(caught.mean()),
                    f1=float(f1.mean()),
                    f1_low=float(low),
                    f1_high=float(high),
                )


def _draw(
    projections: Sequence[torch.Tensor], num_rows: int, draw: int, ceiling: Bound
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """The ceiling of a draw, the held-out projections [tokens] float64 and as many standard normal numbers."""
    draws = generator("cap stability", draw)
    order: list[int] = torch.randperm(len(projections), generator=draws).tolist()
    calibration_n = torch.cat([projections[row] for row in order[:num_rows]])
    held_n = torch.cat([projections[row] for row in sorted(order[num_rows:])]).double()
    return ceiling.of(calibration_n), held_n, torch.randn(len(held_n), generator=draws, dtype=torch.float64)


def _share(where: torch.Tensor) -> float:
    return float(where.double().mean())
