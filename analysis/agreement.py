"""How far judges agree that scored the same answers: agreement, Cohen's kappa, area under the curve, correlation.

    results.agreement()    # a row per pair of metrics, over the answers of all runs, and of what each vector is made of

A metric on the scale 0 to 1 (a rule) comes first in a pair: it is what the other is measured against. To count, an
answer needs a value by both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import combinations

import numpy as np
import pandas as pd

from analysis.manifest import DEGENERATION
from analysis.quantities import RATE
from analysis.rows import OK, AgreementRow

NUM_RESAMPLES = 1000
ANSWER = ["run", "question_id", "sample_index"]


def agreement_rows(
    scores: pd.DataFrame, scales: dict[str, tuple[float, float]], answers: str
) -> Iterator[AgreementRow]:
    """A row per pair of metrics. ``scores`` has the columns of ``ANSWER`` and metric, value, status; ``answers`` says
    of what they are. Degeneration is no opinion about the trait and is left out."""
    metrics = [name for name in scales if name != DEGENERATION and (scores["metric"] == name).any()]
    metrics.sort(key=lambda name: scales[name] != RATE)  # stable: rates first
    by_metric = {name: scores[scores["metric"] == name].set_index(ANSWER) for name in metrics}
    for one, other in combinations(metrics, 2):
        both = by_metric[one].join(by_metric[other], how="inner", lsuffix="_one", rsuffix="_other")
        scored = both[(both["status_one"] == OK) & (both["status_other"] == OK)]
        values = [_stretched(scored[f"value_{side}"], scales[name]) for side, name in (("one", one), ("other", other))]
        questions = list(scored.index.get_level_values("question_id"))
        yield AgreementRow(
            answers=answers,
            metric=one,
            other=other,
            num_answers=len(both),
            num_both=len(scored),
            **compared(values[0], values[1], questions),
        )


def compared(one: np.ndarray, other: np.ndarray, questions: Sequence[object]) -> dict[str, float | None]:
    """Figures of two scores from 0 to 100 per answer; None where there is no such figure (one side says always the
    same, say).

    ``one`` above 50 counts as shown. ``auc``: the share of pairs of an answer that shows it and one that does not
    which ``other`` ranks rightly, ties as half; its interval is the percentile bootstrap over questions, in which
    resamples without both kinds are left out.
    """
    shown, other_shown = one > 50, other > 50
    value = auc(shown, other)
    low, high = _interval(shown, other, np.asarray(questions, dtype=object)) if value is not None else (None, None)
    return {
        "share_one": _mean(shown),
        "share_other": _mean(other_shown),
        "agreement": _mean(shown == other_shown),
        "kappa": kappa(shown, other_shown),
        "auc": value,
        "auc_low": low,
        "auc_high": high,
        "correlation": spearman(one, other),
    }


def kappa(one: np.ndarray, other: np.ndarray) -> float | None:
    """Cohen's kappa, (p_o - p_e) / (1 - p_e), of two yes-no opinions; None if both say always the same."""
    if len(one) == 0:
        return None
    observed = float(np.mean(one == other))
    expected = float(np.mean(one) * np.mean(other) + np.mean(~one) * np.mean(~other))
    return None if math.isclose(expected, 1.0) else (observed - expected) / (1.0 - expected)


def auc(shown: np.ndarray, scores: np.ndarray) -> float | None:
    """P(a shown answer scores higher than another) + P(equal) / 2, from ranks (Mann-Whitney); None without both."""
    num_shown, num_others = int(shown.sum()), int((~shown).sum())
    if not num_shown or not num_others:
        return None
    ranks = _ranks(scores)
    return float((ranks[shown].sum() - num_shown * (num_shown + 1) / 2) / (num_shown * num_others))


def spearman(one: np.ndarray, other: np.ndarray) -> float | None:
    """Rank correlation; None if one side says always the same."""
    ranks = [_ranks(side) for side in (one, other)]
    if len(one) < 2 or any(np.ptp(side) == 0 for side in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing their mean rank."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def _interval(shown: np.ndarray, scores: np.ndarray, questions: np.ndarray) -> tuple[float | None, float | None]:
    names = sorted(set(questions), key=str)
    rows = [np.flatnonzero(questions == name) for name in names]
    draw = np.random.default_rng(0)  # the same resamples every time
    found = []
    for _ in range(NUM_RESAMPLES):
        chosen = np.concatenate([rows[index] for index in draw.integers(len(rows), size=len(rows))])
        value = auc(shown[chosen], scores[chosen])
        if value is not None:
            found.append(value)
    if len(names) < 2 or not found:
        return None, None
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def _stretched(values: pd.Series, scale: tuple[float, float]) -> np.ndarray:
    low, high = scale
    return 100.0 * (values.to_numpy(dtype=float) - low) / (high - low)


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def frame_of(rows: Sequence[AgreementRow]) -> pd.DataFrame:
    """The rows as a data frame with the declared columns."""
    columns = [name for name in AgreementRow.__dataclass_fields__]
    return pd.DataFrame([asdict(row) for row in rows], columns=columns)
