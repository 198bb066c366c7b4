"""Gradients of two conditions against each other, compared with plain autograd; float64, 1e-10."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from analysis.conditions import NOTHING, Condition, Steering
from analysis.gradient_pairs import gradient_differences, similarity_rows
from tests.analysis.plain_gradients import plain_gradients
from tests.bases import ROWS, base_of
from tests.float64 import float64_model

LAYERS = [0, 1, 2, 3]
DRAW = torch.Generator().manual_seed(0)
VECTOR = torch.randn(5, 32, generator=DRAW, dtype=torch.float64)
PROMPTED = Condition("prompted", prompt="Mention the orange bridge.")
STEERED = [Condition(f"x{size:g}", (Steering(VECTOR, [1, 2], size),)) for size in (0.0, 0.5, 1.0, 2.0)]


def similarities(rows: Any = ROWS, conditions: Any = STEERED, **rest: Any) -> dict[Any, tuple[int, float]]:
    base = base_of(float64_model())
    found = similarity_rows(
        base, base.model, rows, PROMPTED, conditions, LAYERS, measure_id="m", max_length=512, **rest
    )
    values: dict[Any, tuple[int, float]] = {}
    for row in found:
        assert row.reference == "prompted"
        assert row.cosine is not None
        values[row.row, row.condition, row.layer] = (row.num_tokens, row.cosine)
    return values


def with_prompt(index: int) -> list[dict[str, str]]:
    messages = [dict(message) for message in ROWS[index]]
    user = next(message for message in messages if message["role"] == "user")
    user["content"] = f"{PROMPTED.prompt}\n\n{user['content']}"
    return messages


def test_similarities_equal_plain_autograd_token_by_token() -> None:
    base = base_of(float64_model())
    found = similarities(positions="response")
    assert len(found) == len(ROWS) * len(STEERED) * len(LAYERS)
    for index, messages in enumerate(ROWS):
        _, prompted = plain_gradients(base, with_prompt(index))
        for condition, size in zip(STEERED, (0.0, 0.5, 1.0, 2.0), strict=True):
            _, steered = plain_gradients(base, messages, {layer: size * VECTOR[layer] for layer in (1, 2)})
            for layer in LAYERS:
                num_tokens, cosine = found[index, condition.name, layer]
                used = steered[layer].norm(dim=1) > 0
                expected = F.cosine_similarity(steered[layer][used], prompted[layer][used], dim=1, eps=0).mean()
                assert num_tokens == int(used.sum())
                assert cosine == pytest.approx(float(expected), abs=1e-10)


def test_similarities_do_not_depend_on_batches_or_shards() -> None:
    whole = similarities()
    for other in (
        similarities(batch_tokens=1),
        similarities(batch_tokens=150),
        similarities(batch_tokens=10**6),
        similarities(ROWS[:3]) | similarities(ROWS[3:], row_numbers=range(3, 7)),
    ):
        assert other.keys() == whole.keys()
        for key, (num_tokens, cosine) in whole.items():
            assert other[key] == (num_tokens, pytest.approx(cosine, abs=1e-10))


def test_a_gradient_is_like_itself() -> None:
    again = Condition("again", prompt=PROMPTED.prompt)
    assert all(cosine == pytest.approx(1, abs=1e-12) for _, cosine in similarities(conditions=[again]).values())


@pytest.mark.parametrize("batch_tokens", [1, 200, 10**6])
def test_differences_are_those_of_mean_gradients(batch_tokens: int) -> None:
    base = base_of(float64_model("qwen2"))
    steered = Condition("steered", (Steering(VECTOR, [2], 1.5),))
    seen: list[tuple[int, int]] = []
    parts = gradient_differences(
        base,
        base.model,
        ROWS,
        steered,
        NOTHING,
        LAYERS,
        max_length=512,
        batch_tokens=batch_tokens,
        progress=lambda done, total: seen.append((done, total)),
    )
    rows = []
    for numbers, differences in parts:
        rows += numbers
        for place, number in enumerate(numbers):
            _, plain = plain_gradients(base, ROWS[number])
            _, shifted = plain_gradients(base, ROWS[number], {2: 1.5 * VECTOR[2]})
            for layer in LAYERS:
                expected = shifted[layer].mean(0) - plain[layer].mean(0)
                assert torch.allclose(differences[layer][place], expected, rtol=0, atol=1e-10)
    assert sorted(rows) == list(range(len(ROWS)))
    assert seen[-1] == (7, 7)
