"""How often 95 % intervals hold the true mean, by simulation, beside what simpler intervals would do.

Samples and resamples are fixed, so a limit holds or not; the luck of a share of 0.95 over 1000 samples is 0.007. Where
plain percentiles of the same resamples are shown to fail, they are why the intervals are stretched and widened.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from analysis.bootstrap import Bounds, intervals, resampled_counts
from analysis.crossed import Crossed, spread

NUM_SAMPLES = 1000
RATE: Bounds = (0.0, 1.0)

Draw = Callable[[np.random.Generator], np.ndarray]
"""float64 [runs, questions]: means of the cells of one sample."""


def samples_of(draw: Draw) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [draw(rng) for _ in range(NUM_SAMPLES)]


def share(draw: Draw, true_mean: float, bounds: Bounds | None = None) -> float:
    """How often the interval holds the true mean."""
    tables = [Crossed.of(sample, np.ones_like(sample), range(len(sample))) for sample in samples_of(draw)]
    return _share(intervals(tables, [spread(table) for table in tables], [bounds] * NUM_SAMPLES), true_mean)


def plain_share(draw: Draw, true_mean: float) -> float:
    """How often plain percentiles of the same resamples hold it."""
    samples = samples_of(draw)
    runs, questions = samples[0].shape
    draws_bg, draws_br = resampled_counts(questions, 1) / questions, resampled_counts(runs, 2) / runs
    found = [np.quantile(((draws_bg @ sample.T) * draws_br).sum(axis=1), [0.025, 0.975]) for sample in samples]
    return _share(found, true_mean)


def _share(found: list[tuple[float, float]] | list[np.ndarray], true_mean: float) -> float:
    # an end that is the true mean itself, such as a rate of 0.5, may be off by rounding
    return float(np.mean([low - 1e-9 <= true_mean <= high + 1e-9 for low, high in found]))


def rates(rate: float, num_questions: int, answers: int, alike: float) -> Draw:
    """Shares of answers; ``alike``: the correlation of two answers to one question."""
    a, b = rate * (1 - alike) / alike, (1 - rate) * (1 - alike) / alike

    def draw(rng: np.random.Generator) -> np.ndarray:
        return np.asarray(rng.binomial(answers, rng.beta(a, b, (1, num_questions))) / answers)

    return draw


def components(runs: int, questions: int, of_seed: float, of_question: float, of_cell: float) -> Draw:
    """Normal values with mean 0 and these standard deviations."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        seeds, every_run = rng.normal(size=(runs, 1)), rng.normal(size=(1, questions))
        return np.asarray(of_seed * seeds + of_question * every_run + of_cell * rng.normal(size=(runs, questions)))

    return draw


@pytest.mark.parametrize(("num_questions", "plain_is_at_most"), [(4, 0.83), (8, 0.9), (48, 0.96)])
def test_normal_values(num_questions: int, plain_is_at_most: float) -> None:
    draw = components(1, num_questions, 0.0, 1.0, 0.0)
    assert 0.92 <= share(draw, 0.0) <= 0.98
    assert plain_share(draw, 0.0) <= plain_is_at_most


def test_skewed_values_such_as_losses_of_rows() -> None:
    assert share(lambda rng: rng.lognormal(0, 0.5, (1, 16)), float(np.exp(0.125))) >= 0.91


@pytest.mark.parametrize("rate", [0.02, 0.05, 0.5, 0.95])
@pytest.mark.parametrize(("num_questions", "answers"), [(8, 2), (24, 10), (48, 1)])
def test_rates(rate: float, num_questions: int, answers: int) -> None:
    assert share(rates(rate, num_questions, answers, 0.3), rate, RATE) >= 0.91


def test_plain_percentiles_miss_rare_behaviors() -> None:
    assert plain_share(rates(0.02, 48, 10, 0.3), 0.02) < 0.86
    assert share(rates(0.02, 48, 10, 0.3), 0.02, RATE) >= 0.91


@pytest.mark.parametrize(
    ("runs", "of_seed", "of_question", "of_cell"),
    [(2, 1.0, 1.0, 1.0), (3, 1.0, 1.0, 1.0), (3, 0.3, 1.0, 1.0), (3, 1.0, 0.0, 0.3), (10, 0.5, 1.0, 1.0)],
)
def test_over_seeds(runs: int, of_seed: float, of_question: float, of_cell: float) -> None:
    at_least = 0.87 if runs == 2 else 0.91  # seen: 0.88 and 0.92 to 0.95
    assert at_least <= share(components(runs, 24, of_seed, of_question, of_cell), 0.0) <= 0.985


def test_plain_percentiles_and_questions_alone_miss_the_luck_of_seeds() -> None:
    draw = components(3, 24, 1.0, 1.0, 1.0)
    assert share(draw, 0.0) >= 0.91
    assert plain_share(draw, 0.0) < 0.87
    assert share(lambda rng: draw(rng).mean(axis=0, keepdims=True), 0.0) < 0.7


def test_rates_over_seeds() -> None:
    def logits(rng: np.random.Generator, runs: int, questions: int) -> np.ndarray:
        return np.asarray(-1 + 0.8 * rng.normal(size=(1, questions)) + 0.5 * rng.normal(size=(runs, 1)))

    def draw(rng: np.random.Generator) -> np.ndarray:
        return np.asarray(rng.binomial(2, 1 / (1 + np.exp(-logits(rng, 3, 24)))) / 2)

    many = logits(np.random.default_rng(1), 1000, 1000)
    assert share(draw, float((1 / (1 + np.exp(-many))).mean()), RATE) >= 0.92


def test_paired_differences_of_rates() -> None:
    def draw(rng: np.random.Generator) -> np.ndarray:
        hard = rng.uniform(-0.1, 0.1, (1, 24))
        return np.asarray(rng.binomial(2, 0.15 + hard) / 2 - rng.binomial(2, 0.6 + hard) / 2)

    assert 0.92 <= share(draw, -0.45, (-1.0, 1.0)) <= 0.985
