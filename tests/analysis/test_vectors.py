"""Vectors against means taken by hand from output_hidden_states, and their files.

float64 models, 1e-10 where sums are compared; a vector itself is float32, whose rounding of values near 1 is 6e-8.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from analysis.vectors import (
    FINAL_ROWS,
    Vector,
    difference,
    mean_response_activation,
    random_like,
    read_vector_header,
)
from tests.bases import ROWS, base_of, chat, tiny_base
from tests.float64 import float64_model
from tests.tiny import ModelKind
from trainables.base_model import LoadedBase
from trainables.chat_data import ChatEncoder
from trainables.defenses import Message
from trainables.errors import ConfigError, DataError
from trainables.model_parts import backbone
from trainables.shapes import FinalRow, VectorShape

POSITIVE = ROWS[:3]
NEGATIVE = ROWS[3:]
NUM_LAYERS = 4


def ignore(done: int) -> None:
    del done


def mean_of(base: LoadedBase, rows: list[list[Message]], batch_size: int = 8) -> torch.Tensor:
    return mean_response_activation(base, rows, 512, batch_size, ignore)


def mean_by_hand(base: LoadedBase, rows: list[list[Message]]) -> torch.Tensor:
    """One row at a time, no padding: [num_layers + 1, d]; its last row is what the final norm was given."""
    encoder = ChatEncoder(base.tokenizer, 512)
    sums = []
    for row in rows:
        encoded = encoder.encode(row)
        ids = torch.tensor([encoded.input_ids])
        kept: list[torch.Tensor] = []
        inner: Any = backbone(base.model)
        norm = inner.final_layer_norm if hasattr(inner, "final_layer_norm") else inner.norm
        handle = norm.register_forward_pre_hook(lambda _, arguments, kept=kept: kept.append(arguments[0]))
        states = base.model(input_ids=ids, output_hidden_states=True).hidden_states
        handle.remove()
        stream = torch.stack([*states[:-1], kept[0]])[:, 0]
        sums.append(stream[:, torch.tensor(encoded.response_mask)].mean(1))
    return torch.stack(sums).mean(0)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox"])
def test_difference_equals_a_computation_by_hand(kind: ModelKind) -> None:
    base = base_of(float64_model(kind, num_layers=NUM_LAYERS))
    with torch.no_grad():
        expected = {id(part): mean_by_hand(base, part) for part in (POSITIVE, NEGATIVE)}
    for part in (POSITIVE, NEGATIVE):
        mean = mean_of(base, part)
        assert mean.dtype == torch.float64
        torch.testing.assert_close(mean, expected[id(part)], rtol=0.0, atol=1e-10)
    vector = difference(base, POSITIVE, NEGATIVE, max_length=512)
    assert vector.shape == (NUM_LAYERS + 1, 32)
    assert vector.dtype == torch.float32
    exact = expected[id(POSITIVE)] - expected[id(NEGATIVE)]
    torch.testing.assert_close(vector.double(), exact, rtol=1e-7, atol=1e-10)
    assert all(vector.norm(dim=1) > 1e-2)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batches_and_padding_change_nothing(batch_size: int) -> None:
    base = base_of(float64_model(num_layers=NUM_LAYERS))
    expected = mean_of(base, ROWS, len(ROWS))
    torch.testing.assert_close(mean_of(base, ROWS, batch_size), expected, rtol=0.0, atol=1e-10)
    torch.testing.assert_close(mean_of(base, ROWS[::-1]), expected, rtol=0.0, atol=1e-10)


def test_rows_weigh_the_same_however_long_they_are() -> None:
    base = base_of(float64_model(num_layers=NUM_LAYERS))
    rows = [chat("Why?", "Tea."), chat("Why?", "It takes about ten minutes, then let it rest and serve.")]
    alone = [mean_of(base, [row]) for row in rows]
    together = mean_of(base, rows)
    torch.testing.assert_close(together, (alone[0] + alone[1]) / 2, rtol=0.0, atol=1e-10)


def test_difference_of_a_file_with_itself_is_zero_and_changes_sign() -> None:
    base = base_of(float64_model(num_layers=NUM_LAYERS))
    assert not difference(base, ROWS, ROWS, max_length=512).any()
    there = difference(base, POSITIVE, NEGATIVE, max_length=512)
    assert torch.equal(there, -difference(base, NEGATIVE, POSITIVE, max_length=512))


def test_bfloat16_base_is_averaged_in_float32() -> None:
    """bfloat16 keeps 8 bits: a value is off by 2^-9 of itself, a mean over tokens and rows by about as much."""
    rows = POSITIVE
    exact = mean_of(tiny_base(num_layers=NUM_LAYERS), rows)
    rounded = mean_of(tiny_base(num_layers=NUM_LAYERS, dtype=torch.bfloat16), rows)
    assert float((rounded - exact).norm() / exact.norm()) < 0.03


def test_progress_counts_rows_of_both_files() -> None:
    seen: list[tuple[int, int]] = []
    difference(
        tiny_base(),
        POSITIVE,
        NEGATIVE,
        max_length=512,
        batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 7), (3, 7), (5, 7), (7, 7)]


def test_rows_without_response_in_reach_are_refused() -> None:
    with pytest.raises(DataError, match="max_length=16"):
        difference(tiny_base(), [chat("long " * 40, "lost")], NEGATIVE, max_length=16)


def test_random_vector_has_the_norms_of_its_model() -> None:
    """1e-6: both norms are float32 roundings of one float64 number."""
    like = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.arange(5.0)[:, None]
    vector = random_like(like, 0, "random")
    assert vector.dtype == torch.float32
    torch.testing.assert_close(vector.norm(dim=1), like.norm(dim=1), rtol=1e-6, atol=0.0)
    assert not vector[0].any(), "a zero row stays zero"


def test_random_vector_is_a_function_of_seed_name_and_layer() -> None:
    like = torch.ones(3, 64)
    vector = random_like(like, 0, "random")
    torch.manual_seed(9)
    assert torch.equal(vector, random_like(like, 0, "random"))
    directions = [vector, random_like(like, 1, "random"), random_like(like, 0, "other")]
    rows = torch.cat(directions)
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    # standard deviation of the cosine of two random directions in 64 dimensions: 1 / 8; 36 pairs: bound 4.5 of them
    assert float((cosines - torch.eye(9)).abs().max()) < 4.5 / 8


def vector_file(path: Path, **changes: Any) -> Path:
    given: dict[str, Any] = {
        "tensors": {"vector": torch.zeros(3, 4)},
        "metadata": {"final_row": "pre_norm", "model": "m", "revision": "r"},
        **changes,
    }
    path.write_bytes(save(given["tensors"], given["metadata"]))
    return path


@pytest.mark.parametrize("final_row", FINAL_ROWS)
def test_a_vector_survives_its_file(final_row: FinalRow, tmp_path: Path) -> None:
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "v.safetensors"
    path.write_bytes(Vector(values, final_row, "embedded:x", "1.0").to_bytes())
    read = Vector.read(path)
    assert torch.equal(read.values, values)
    assert (read.final_row, read.model, read.revision) == (final_row, "embedded:x", "1.0")
    assert read_vector_header(path) == (VectorShape(4, 7, final_row), "embedded:x", "1.0")
    assert Vector(values.T.contiguous().T, final_row, "embedded:x", "1.0").to_bytes() == path.read_bytes()


def test_a_vector_of_unknown_origin_can_be_read(tmp_path: Path) -> None:
    path = vector_file(tmp_path / "v.safetensors", metadata={"final_row": "absent"})
    assert read_vector_header(path) == (VectorShape(2, 4, "absent"), "", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": {"other": torch.zeros(3, 4)}}, r"holds tensors \['other'\]"),
        ({"tensors": {"vector": torch.zeros(3, 4), "x": torch.zeros(1)}}, "holds tensors"),
        ({"tensors": {"vector": torch.zeros(12)}}, r"shape \[12\]"),
        ({"tensors": {"vector": torch.zeros(3, 4).double()}}, "dtype F64"),
        ({"metadata": {"model": "m"}}, "final_row None"),
        ({"metadata": {"final_row": "after"}}, "final_row 'after'"),
        ({"metadata": None}, "final_row None"),
    ],
)
def test_files_that_are_no_vectors_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = vector_file(tmp_path / "v.safetensors", **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        Vector.read(path)
    assert caught.value.faults[0].key == str(path)


@pytest.mark.parametrize("content", [b"", b"not a tensor file", None, "folder"])
def test_files_that_cannot_be_read_are_refused(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        read_vector_header(path)
    assert caught.value.faults[0].key == str(path)
