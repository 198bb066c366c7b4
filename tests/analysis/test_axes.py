"""Estimators of axes against closed forms, a search over all angles, and Newton's method written here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from analysis.axes import (
    ESTIMATORS,
    Estimator,
    contrastive,
    contrastive_at,
    layer_axes,
    leading_difference,
    logistic,
    mean_difference,
    scaled_axis,
)
from analysis.vectors import mean_response_activation, response_activations
from tests.bases import ROWS, tiny_base
from trainables.errors import DataError
from trainables.randomness import generator

ALL = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=list(ESTIMATORS))


def draw(name: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator("test axes", name), dtype=torch.float64)


def stretched(name: str, rows: int) -> torch.Tensor:
    """Rows in the plane that vary much more along (1, -1) than across it."""
    return draw(name, rows, 2) @ torch.tensor([[1.2, -1.1], [-0.2, 0.4]], dtype=torch.float64)


X = stretched("x", 40) + torch.tensor([1.0, 0.2])
Y = stretched("y", 30)


def angles(count: int = 20001) -> torch.Tensor:
    """Unit vectors all around, [count, 2]; neighbours are 3e-4 apart."""
    turn = torch.linspace(0, 2 * math.pi, count, dtype=torch.float64)
    return torch.stack([turn.cos(), turn.sin()], dim=1)


def test_mean_difference_is_the_difference_of_means() -> None:
    expected = X.numpy().mean(0) - Y.numpy().mean(0)
    np.testing.assert_allclose(mean_difference(X, Y).numpy(), expected / np.linalg.norm(expected), rtol=1e-12)


def test_leading_difference_makes_the_sum_of_squares_greatest() -> None:
    x, y = X[:30], Y
    sums = ((x - y) @ angles().T).square().sum(0)
    best = angles()[int(sums.argmax())]
    best = best * torch.sign((x - y).mean(0) @ best)
    found = leading_difference(x, y)
    assert float(found @ best) > 1 - 1e-7  # 3e-4 apart: the cosine is 1 - 5e-8
    assert float(found @ mean_difference(x, y)) < 0.95  # it is not the mean difference here


def test_pairs_that_all_differ_alike_give_the_mean_difference() -> None:
    y = draw("pairs", 12, 7)
    shift = draw("shift", 7)
    torch.testing.assert_close(leading_difference(y + shift, y), mean_difference(y + shift, y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_contrastive_is_the_best_of_all_angles(temperature: float) -> None:
    length = np.linalg.norm(X.numpy().mean(0) - Y.numpy().mean(0))
    losses = []
    for angle in angles(4001).numpy():
        gaps = (X.numpy() @ angle)[:, None] - (Y.numpy() @ angle)[None, :]
        losses.append(np.logaddexp(0, -gaps / (temperature * length)).mean())
    best = angles(4001)[int(np.argmin(losses))]
    found = contrastive(X, Y, temperature)
    assert float(found @ best) > 1 - 1e-6  # neighbouring angles are 1.6e-3 apart
    assert float(found @ mean_difference(X, Y)) < 0.99  # it turns away from where the rows vary


def test_contrastive_at_a_large_temperature_is_the_mean_difference() -> None:
    # the first-order term of the loss is all that is left; what remains falls with 1 / temperature
    torch.testing.assert_close(contrastive(X, Y, 1e4), mean_difference(X, Y), rtol=0, atol=1e-3)


def test_logistic_is_the_minimum_that_newton_finds() -> None:
    rows = torch.cat([X, Y]).numpy()
    labels = np.array([1.0] * len(X) + [0.0] * len(Y))
    scale = rows.std(0)
    z = np.column_stack([(rows - rows.mean(0)) / scale, np.ones(len(rows))])
    held = np.diag([1.0, 1.0, 0.0])  # the intercept is free
    weights = np.zeros(3)
    for _ in range(30):
        chance = 1 / (1 + np.exp(-z @ weights))
        gradient = held @ weights + z.T @ (chance - labels)
        weights -= np.linalg.solve(held + z.T @ (z * (chance * (1 - chance))[:, None]), gradient)
    expected = weights[:2] / scale
    found = logistic(X, Y).numpy()
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), atol=1e-5)  # lbfgs ends at tol=1e-8


def test_logistic_weights_are_mapped_back_from_standardised_coordinates() -> None:
    units = torch.tensor([100.0, 0.01], dtype=torch.float64)
    expected = logistic(X, Y) / units
    found = logistic(X * units + 3.0, Y * units + 3.0)
    torch.testing.assert_close(found, expected / expected.norm(), rtol=0, atol=1e-6)


@ALL
def test_a_clear_axis_is_found_whatever_its_place_and_sign(estimator: Estimator) -> None:
    axis = draw("axis", 16)
    axis = axis / axis.norm()
    noise = draw("noise", 2, 200, 16)
    x, y = 1.5 * axis + noise[0], noise[1] - 1.5 * axis
    found = estimator(x, y)
    assert float(found.norm()) == pytest.approx(1)
    assert float(found @ axis) > 0.9
    torch.testing.assert_close(estimator(y, x), -found, rtol=0, atol=1e-5)
    torch.testing.assert_close(estimator(x + 3, y + 3), found, rtol=0, atol=1e-5)


@ALL
def test_length_is_the_distance_of_the_means_along_the_axis(estimator: Estimator) -> None:
    x, y = X[:30], Y
    axis = scaled_axis(x, y, estimator)
    expected = float((x.mean(0) - y.mean(0)) @ axis) / float(axis.norm())
    assert float(axis.norm()) == pytest.approx(expected)


@ALL
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X[:0], Y, "positive set has no rows"),
        (X, Y[:0], "negative set has no rows"),
        (X, X.clone(), "same mean"),
        (X * math.nan, Y, "not finite"),
        (X, torch.zeros(30, 3), "different models"),
    ],
)
def test_what_holds_no_axis_is_said(estimator: Estimator, x: torch.Tensor, y: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        estimator(x, y)


def test_sets_of_unequal_size_are_no_pairs() -> None:
    with pytest.raises(DataError, match="40 rows and 30 rows are no pairs"):
        leading_difference(X, Y)


def test_every_layer_has_its_own_axis_and_a_layer_without_one_is_named() -> None:
    x, y = torch.stack([X, 2 * X], dim=1), torch.stack([Y, 2 * Y], dim=1)
    axes = layer_axes(x, y, contrastive_at(0.5))
    assert axes.dtype == torch.float32
    torch.testing.assert_close(axes[0], scaled_axis(X, Y, contrastive_at(0.5)).float())
    torch.testing.assert_close(axes[1], 2 * axes[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match="layer 1: the two sets have the same mean"):
        layer_axes(torch.stack([X[:30], Y], dim=1), torch.stack([Y, Y], dim=1), mean_difference)


def test_activations_of_rows_are_those_that_the_mean_is_of() -> None:
    base = tiny_base()
    rows = response_activations(base, ROWS, 2048, batch_size=3)
    assert rows.shape == (len(ROWS), 3, 32)
    expected = mean_response_activation(base, ROWS, 2048, 8, lambda _: None)
    torch.testing.assert_close(rows.double().mean(0), expected, rtol=1e-5, atol=1e-6)  # float32 rows
    alone = torch.cat([response_activations(base, [row], 2048) for row in ROWS])
    torch.testing.assert_close(rows, alone, rtol=1e-5, atol=1e-6)  # padding moves last bits; the order is that of rows
