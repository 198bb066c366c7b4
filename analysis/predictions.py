"""What a candidate defense is foreseen to do before any training, and how well that held.

Section 6 of arXiv 2604.16423. The shift of a candidate at a layer is the mean over rows of the training set of

    cosine of the gradient with the trait's vector, the candidate present - the same with nothing present

Positive: with it the data pushes less along the trait, so the trained model should show less of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from analysis.measured_rows import PredictionRow
from analysis.rows import NO_CONDITION
from trainables.randomness import seed_of

NUM_RESAMPLES = 2000
NUM_PERMUTATIONS = 10_000
_EXACT_UP_TO = 7  # 7! = 5040 orders


def prediction_rows(
    gradients: pd.DataFrame,
    losses: pd.DataFrame,
    *,
    trait: str,
    measure_id: str,
    reference: str = NO_CONDITION,
    places: Mapping[str, tuple[str, int]] | None = None,
    differences: pd.DataFrame | None = None,
) -> Iterator[PredictionRow]:
    """A row per candidate (every condition but ``reference``) and layer, from the tables ``gradients`` and ``losses``.

    ``trait``: the vector that cosines are taken along. ``places``: candidate -> (its vector, the layer it is added at),
    to look up its projection difference in ``differences`` (``analysis.projections.projection_differences``). Pairs are
    rows that have a cosine under both conditions. Raises ValueError where the reference or the vector was not measured.
    """
    along = gradients[(gradients["vector"] == trait) & gradients["cosine"].notna()]
    if along.empty:
        raise ValueError(f"no gradient was compared with the vector {trait!r}")
    if reference not in set(along["condition"]):
        raise ValueError(f"nothing was measured under the condition {reference!r} that candidates are compared with")
    cosines = along.pivot_table(index=["layer", "row"], columns="condition", values="cosine", aggfunc="first")
    means = losses.pivot_table(index="row", columns="condition", values="loss_mean", aggfunc="first")
    for candidate in dict.fromkeys(along["condition"]):
        if candidate == reference:
            continue
        for layer in sorted(set(along["layer"])):
            pairs = cosines.loc[layer][[reference, candidate]].dropna()
            if pairs.empty:
                continue
            without, with_it = pairs[reference].to_numpy(), pairs[candidate].to_numpy()
            nats = means.loc[pairs.index, [reference, candidate]].mean()
            shift = with_it - without
            yield PredictionRow(
                measure_id=measure_id,
                condition=str(candidate),
                layer=int(layer),
                vector=trait,
                num_rows=len(pairs),
                cosine_without=float(without.mean()),
                cosine_with=float(with_it.mean()),
                shift=float(shift.mean()),
                shift_error=float(shift.std(ddof=1) / math.sqrt(len(shift))) if len(shift) > 1 else None,
                flipped_share=float(((without < 0) & (with_it > 0)).mean()),
                loss_without=float(nats[reference]),
                loss_with=float(nats[candidate]),
                loss_gap=float(nats[reference] - nats[candidate]),
                projection_difference=_difference(differences, (places or {}).get(str(candidate))),
            )


def _difference(differences: pd.DataFrame | None, place: tuple[str, int] | None) -> float | None:
    if differences is None or place is None:
        return None
    found = differences[(differences["vector"] == place[0]) & (differences["layer"] == place[1])]["difference"]
    return float(found.mean()) if len(found) else None


@dataclass(frozen=True)
class Held:
    """How well scores foresaw outcomes. NaN where there is too little to say: fewer than three candidates, all scores
    or all outcomes equal (or, for the AUC, all or none defended)."""

    num_candidates: int
    rank_correlation: float  # Spearman
    rank_low: float  # 95 %, bootstrap over candidates
    rank_high: float
    rank_p: float  # permutation test, two-sided
    pooled_r: float  # Pearson, over all candidates of all data sets
    pooled_low: float
    pooled_high: float
    auc: float  # P(score of a defended one > score of one that is not), ties count a half


def held(scores: Sequence[float], outcomes: Sequence[float], defended: Sequence[bool] | None = None) -> Held:
    """Compare foreseen with found. ``outcomes``: how much of the trait a candidate kept away, undefended minus
    defended, so that a good prediction correlates positively. ``defended``: which of them count as a success.

    Resamples and permutations are fixed, so equal data gives equal numbers.
    """
    x, y = np.asarray(scores, dtype=float), np.asarray(outcomes, dtype=float)
    if x.shape != y.shape or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("scores and outcomes are finite numbers, one of each per candidate")
    rank = _pearson(rankdata(x), rankdata(y))
    draws = np.random.default_rng(seed_of("held", len(x))).integers(0, max(len(x), 1), (NUM_RESAMPLES, len(x)))
    rank_low, rank_high = _percentiles([_pearson(rankdata(x[draw]), rankdata(y[draw])) for draw in draws], rank)
    pooled = _pearson(x, y)
    pooled_low, pooled_high = _percentiles([_pearson(x[draw], y[draw]) for draw in draws], pooled)
    return Held(
        num_candidates=len(x),
        rank_correlation=rank,
        rank_low=rank_low,
        rank_high=rank_high,
        rank_p=_permutation_p(rankdata(x), rankdata(y), rank),
        pooled_r=pooled,
        pooled_low=pooled_low,
        pooled_high=pooled_high,
        auc=math.nan if defended is None else auc(x, defended),
    )


def auc(scores: Sequence[float] | np.ndarray, defended: Sequence[bool]) -> float:
    """P(a defended candidate's score is above one's that is not), ties counting a half; NaN if there are not both."""
    x, on = np.asarray(scores, dtype=float), np.asarray(defended, dtype=bool)
    if not on.any() or on.all():
        return math.nan
    above = x[on][:, None] - x[~on][None, :]
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 3:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else math.nan


def _percentiles(values: Sequence[float], estimate: float) -> tuple[float, float]:
    """95 % of the resamples in which there is a value; resamples of few candidates may draw one of them alone."""
    found = np.asarray(values, dtype=float)
    found = found[np.isfinite(found)]
    if math.isnan(estimate) or not len(found):
        return math.nan, math.nan
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def _permutation_p(x: np.ndarray, y: np.ndarray, found: float) -> float:
    """Share of orders of y whose correlation is at least as far from 0: all orders of up to 7, else 10,000 of them."""
    if math.isnan(found):
        return math.nan
    if len(x) <= _EXACT_UP_TO:
        orders = np.array(list(itertools.permutations(range(len(y)))))
        extra = 0
    else:
        draw = np.random.default_rng(seed_of("permutations", len(x)))
        orders = np.argsort(draw.random((NUM_PERMUTATIONS, len(y))), axis=1)
        extra = 1  # the order that was found is one of them
    x, y = x - x.mean(), y - y.mean()
    correlations = y[orders] @ x / math.sqrt(float(x @ x) * float(y @ y))
    return float(((np.abs(correlations) >= abs(found) - 1e-12).sum() + extra) / (len(orders) + extra))
