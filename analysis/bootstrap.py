"""95 % intervals of means: bootstrap over questions and seeds, with the width that Student's t asks for.

Counter-based: the resamples depend on how many questions and seeds there are and on nothing else, and sums are taken
in fixed point, where they are exact. So the same numbers give the same interval to the bit, whatever else is in the
table and in whichever order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from scipy import special

from analysis.crossed import Crossed, Spread

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95

Bounds: TypeAlias = tuple[float, float]
"""Between which numbers every value lies, such as (0, 1) for a rate."""

_QUESTIONS, _SEEDS = 1, 2  # keys of the two streams of random numbers
_TAIL = (1 - CONFIDENCE) / 2
_NORMAL = float(special.ndtri(1 - _TAIL))
_SAME = 1e-9  # resampled means whose deviation is less, relative to the largest, differ by rounding alone
_COLUMNS_AT_ONCE = 256  # of 2000 resamples each: 4 MB


def intervals(
    tables: Sequence[Crossed], spreads: Sequence[Spread], bounds: Sequence[Bounds | None]
) -> list[tuple[float, float]]:
    """(low, high) of each table's mean.

    A resample draws questions with replacement, each with all that belongs to it, and, independently, seeds with all
    of their runs; the mean is taken anew. Of ``NUM_RESAMPLES`` such means q_low and q_high are the percentiles 2.5 and
    97.5, and s is their standard deviation. Plain percentiles are too narrow where there are few questions or seeds:
    they hold the true mean in 0.89 of cases with 8 questions and in 0.75 with 3 seeds that differ, in place of 0.95
    (bias-corrected accelerated ones: 0.87 with 8 questions). So their distances from the mean are stretched to the
    width of the t interval, and keep their skewness:

        low = mean - k (mean - q_low), high = mean + k (q_high - mean), k = t(0.975, df) SE / (1.96 s)

    with SE and degrees of freedom df of ``crossed.spread``. No resample holds a behavior that none of few answers
    showed, so rare behaviors would still be missed (0.83). Where values have bounds, the interval is therefore widened
    to hold Wilson's for n = m (1 - m) / SE^2 independent answers with t in place of 1.96 (0.91 and more), and cut at
    the bounds. tests/analysis/test_coverage.py measures these shares. Lower than 0.9 they remain with 2 seeds (0.88),
    and for differences where few questions differ at all (0.83).

    Where questions do not differ, no resample does, and an interval of no width would lie. If values have bounds
    (lo, hi): at confidence 0.975 at most a share b = 1 - 0.025^(1/G) of all questions behaves otherwise than the G that
    were asked, and those may be anywhere, so low = m - b (m - lo) and high = m + b (hi - m). For none of G this is the
    exact (Clopper-Pearson) bound, about 3.7 / G. It counts a question once however many answers and seeds it has, so
    it holds whatever answers to one question share; that another seed may behave otherwise is not in it. Without
    bounds it is NaN, as it is with fewer than two questions.
    """
    found = [(math.nan, math.nan)] * len(tables)
    by_size: dict[int, list[int]] = {}
    for index, (table, one) in enumerate(zip(tables, spreads, strict=True)):
        if not math.isnan(one.variance):
            by_size.setdefault(table.num_questions, []).append(index)
    for num_questions, indices in by_size.items():
        for chunk in _chunks(indices, [tables[index].num_runs for index in indices]):
            for index, means_b in zip(chunk, _resampled([tables[index] for index in chunk]), strict=True):
                deviation = float(means_b.std())
                if deviation <= _SAME * np.abs(means_b).max():
                    found[index] = _all_equal(spreads[index].mean, num_questions, bounds[index])
                else:
                    found[index] = _stretched(spreads[index], means_b, deviation, bounds[index])
    return found


@functools.lru_cache(maxsize=8)
def resampled_counts(count: int, stream: int) -> np.ndarray:
    """float64 [NUM_RESAMPLES, count]: how often each of ``count`` things is drawn in a resample of as many.

    Raw words of a Philox generator, which are the same in every version of numpy; the bias of the remainder is below
    count / 2^64.
    """
    words = np.random.Philox(key=np.array([stream, count], dtype=np.uint64)).random_raw(NUM_RESAMPLES * count)
    drawn = (words % np.uint64(count)).astype(np.int64).reshape(NUM_RESAMPLES, count)
    places = drawn + count * np.arange(NUM_RESAMPLES)[:, None]
    counts = np.bincount(places.ravel(), minlength=NUM_RESAMPLES * count).reshape(NUM_RESAMPLES, count)
    counts = counts.astype(np.float64)
    counts.setflags(write=False)  # it is shared by all callers
    return counts


def _resampled(tables: Sequence[Crossed]) -> list[np.ndarray]:
    """Per table the means of its resamples, float64 [at most NUM_RESAMPLES]. The tables have equally many questions."""
    sums_kg = np.concatenate([table.sums_rg for table in tables])
    weights_kg = np.concatenate([table.weights_rg for table in tables])
    counts_bg = resampled_counts(sums_kg.shape[1], _QUESTIONS)
    sums_kb, weights_kb = _exact_product(sums_kg, counts_bg), _exact_product(weights_kg, counts_bg)
    with np.errstate(invalid="ignore"):  # a run none of whose questions was drawn has no mean: 0 / 0
        means_kb = sums_kb / weights_kb
    made = []
    first = 0
    for table in tables:
        means_rb = means_kb[first : first + table.num_runs]
        first += table.num_runs
        if table.num_runs == 1:
            made.append(means_rb[0])
            continue
        drawn_rb = resampled_counts(table.num_seeds, _SEEDS).T[table.seed_r] * ~np.isnan(means_rb)
        num_drawn_b = drawn_rb.sum(axis=0)
        sums_b = (drawn_rb * np.nan_to_num(means_rb)).sum(axis=0)
        # with gaps in the table a resample can be without any value: it says nothing
        made.append(sums_b[num_drawn_b > 0] / num_drawn_b[num_drawn_b > 0])
    return made


def _exact_product(values_kg: np.ndarray, counts_bg: np.ndarray) -> np.ndarray:
    """values times counts, [k, b], of values rounded so that no sum rounds: the order of addition does not matter."""
    bits = 52 - math.ceil(math.log2(counts_bg.shape[1] + 1))  # counts of a resample sum to G
    largest_k1 = np.abs(values_kg).max(axis=1, keepdims=True)
    _, exponents_k1 = np.frexp(largest_k1)
    whole_kg = np.rint(np.ldexp(values_kg, bits - exponents_k1))
    return np.ldexp(whole_kg @ counts_bg.T, exponents_k1 - bits)


def _stretched(one: Spread, means_b: np.ndarray, deviation: float, bounds: Bounds | None) -> tuple[float, float]:
    low, high = (float(end) for end in np.quantile(means_b, [_TAIL, 1 - _TAIL]))
    width = float(special.stdtrit(one.degrees_of_freedom, 1 - _TAIL)) * math.sqrt(one.variance)
    stretch = width / (_NORMAL * deviation)
    low, high = one.mean - stretch * max(0.0, one.mean - low), one.mean + stretch * max(0.0, high - one.mean)
    if bounds is None:
        return low, high
    wilson_low, wilson_high = _wilson(one, width, bounds)
    return max(min(low, wilson_low), bounds[0]), min(max(high, wilson_high), bounds[1])


def _wilson(one: Spread, width: float, bounds: Bounds) -> tuple[float, float]:
    """Wilson's interval on the scale of ``bounds``: all m' with |m' - m| <= t sqrt(m' (1 - m') / n)."""
    scale = bounds[1] - bounds[0]
    share, half = (one.mean - bounds[0]) / scale, width / scale
    assert 0 < share < 1, "at a bound all values are equal"
    z2_over_n = half**2 / (share * (1 - share))
    middle = (share + z2_over_n / 2) / (1 + z2_over_n)
    distance = math.sqrt(half**2 + z2_over_n**2 / 4) / (1 + z2_over_n)
    return bounds[0] + scale * (middle - distance), bounds[0] + scale * (middle + distance)


def _all_equal(mean: float, num_questions: int, bounds: Bounds | None) -> tuple[float, float]:
    if bounds is None:
        return math.nan, math.nan
    other = 1 - _TAIL ** (1 / num_questions)
    return mean - other * (mean - bounds[0]), mean + other * (bounds[1] - mean)


def _chunks(indices: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Consecutive indices whose sizes sum to at most ``_COLUMNS_AT_ONCE``, or one alone."""
    chunks: list[list[int]] = []
    total = 0
    for index, size in zip(indices, sizes, strict=True):
        if not chunks or total + size > _COLUMNS_AT_ONCE:
            chunks.append([])
            total = 0
        chunks[-1].append(index)
        total += size
    return chunks
