"""Uncentred PCA against numpy on the stored differences, whole and in shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from analysis.components import Decomposition, GradientDifferences, component_rows, component_score_rows

HIDDEN = 12
DRAW = torch.Generator().manual_seed(0)
AXIS = torch.randn(HIDDEN, generator=DRAW, dtype=torch.float64)


def made(num_rows: int) -> torch.Tensor:
    """Differences with one strong common direction and others that fall off."""
    scales = torch.tensor([2.0 ** -(index / 2) for index in range(HIDDEN)], dtype=torch.float64)
    common = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = torch.randn(num_rows, HIDDEN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return common + noise * scales


def collected(differences: torch.Tensor, parts: Sequence[Sequence[int]]) -> GradientDifferences:
    whole = GradientDifferences(HIDDEN)
    for rows in parts:
        shard = GradientDifferences(HIDDEN)
        shard.add(list(rows), differences[list(rows)])
        whole.merge(GradientDifferences.from_tensors(shard.to_tensors()))
    return whole


def check(found: Decomposition, differences: torch.Tensor) -> None:
    matrix = differences.numpy() / np.linalg.norm(differences.numpy())
    values, vectors = np.linalg.eigh(matrix.T @ matrix / (len(matrix) - 1))
    values, vectors = values[::-1], vectors[:, ::-1]
    count = min(len(matrix), HIDDEN)
    assert found.variances_k[:count].numpy() == pytest.approx(values[:count], abs=1e-12)
    assert found.explained_k.sum() == pytest.approx(1)
    assert float(found.variances_k.sum()) == pytest.approx(1 / (len(matrix) - 1)), "|D| = 1"
    for k in range(count):
        direction = vectors[:, k] * (1 if vectors[:, k] @ AXIS.numpy() >= 0 else -1)
        assert found.directions_kd[k].numpy() == pytest.approx(direction, abs=1e-8)
    assert found.mean_d.numpy() == pytest.approx(differences.numpy().mean(0), abs=1e-12)
    projected = matrix @ found.directions_kd.numpy().T
    assert found.scores_of(differences).numpy() == pytest.approx(projected, abs=1e-12)
    if found.scores_nk is not None:
        assert found.scores_nk.numpy() == pytest.approx(projected, abs=1e-12)


@pytest.mark.parametrize("num_rows", [2, 7, 12, 13, 40])
def test_equal_numpy_below_and_above_the_hidden_size(num_rows: int) -> None:
    differences = made(num_rows)
    found = collected(differences, [range(num_rows)]).decompose(AXIS)
    check(found, differences)
    assert (found.scores_nk is None) == (num_rows > HIDDEN), "no more than d x d numbers are kept"


@pytest.mark.parametrize("num_rows", [9, 40])
def test_neither_order_nor_shards_change_anything(num_rows: int) -> None:
    differences = made(num_rows)
    rows = list(range(num_rows))
    for parts in ([rows], [rows[::-1]], [[3], rows[4:], rows[:3]], [rows[: num_rows - 2], rows[num_rows - 2 :]]):
        found = collected(differences, parts).decompose(AXIS)
        assert found.rows == rows
        check(found, differences)


def test_stored_numbers_never_exceed_d_times_d() -> None:
    whole = GradientDifferences(HIDDEN)
    for row, difference in enumerate(made(100)):
        whole.add([row], difference[None])
        tensors = whole.to_tensors()
        big = tensors["moment"] if "moment" in tensors else tensors["differences"]
        assert big.numel() <= HIDDEN * HIDDEN


def test_a_single_common_direction_explains_everything() -> None:
    direction = torch.nn.functional.normalize(AXIS, dim=0)
    differences = torch.outer(torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64), direction)
    found = collected(differences, [[0, 1, 2]]).decompose(AXIS)
    assert found.num_explaining() == 1
    assert torch.allclose(found.directions_kd[0], direction)
    assert found.scores_nk is not None
    assert found.scores_nk[:, 0].numpy() == pytest.approx(np.array([1, 2, -3]) / np.sqrt(14))


def test_as_rows() -> None:
    differences = made(7)
    found = collected(differences, [range(7)]).decompose(AXIS)
    vectors = {"axis": AXIS.expand(3, -1), "minus": -AXIS.expand(3, -1)}
    keys: dict[str, Any] = {"measure_id": "m", "condition": "pps", "reference": "none"}
    rows = list(component_rows(found, vectors, 2, **keys))
    count = found.num_explaining()
    assert [(row.component, row.vector) for row in rows] == [(k, v) for k in range(count + 1) for v in vectors]
    mean, first = rows[0], rows[2]
    assert (mean.explained, mean.variance, mean.num_rows) == (None, None, 7)
    assert mean.cosine == pytest.approx(float(torch.cosine_similarity(found.mean_d, AXIS, dim=0)))
    assert first.cosine > 0
    assert rows[3].cosine == -first.cosine
    assert first.explained == float(found.explained_k[0])
    last = rows[-1].cumulative
    assert last is not None
    assert last >= 0.95 > float(found.explained_k[: count - 1].sum())
    assert found.scores_nk is not None
    scores = list(component_score_rows(found.rows, found.scores_nk, 2, **keys))
    assert [(row.row, row.component) for row in scores] == [(row, k) for row in range(7) for k in (1, 2, 3)]
    assert scores[4].score == float(found.scores_nk[1, 1])


def test_faults_are_said() -> None:
    whole = GradientDifferences(HIDDEN)
    whole.add([0], torch.zeros(1, HIDDEN))
    with pytest.raises(ValueError, match="two rows or more, not 1"):
        whole.decompose(AXIS)
    with pytest.raises(ValueError, match="row 0 are there already"):
        whole.add([0], torch.zeros(1, HIDDEN))
    with pytest.raises(ValueError, match="row 4 are there already"):
        whole.add([4, 4], torch.zeros(2, HIDDEN))
    with pytest.raises(ValueError, match="not finite"):
        whole.add([1], torch.full((1, HIDDEN), torch.nan))
    with pytest.raises(ValueError, match="not \\[n, 12\\]"):
        whole.add([2], torch.zeros(1, 3))
    whole.add([3], torch.zeros(1, HIDDEN))
    with pytest.raises(ValueError, match="the same under both"):
        whole.decompose(AXIS)
