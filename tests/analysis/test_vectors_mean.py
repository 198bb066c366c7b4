"""The mean of a data file as a vector: a difference of two files is the difference of their means."""

from __future__ import annotations

import torch

from analysis.vectors import difference
from analysis.vectors.activations import mean_response_activation
from tests.bases import ROWS, tiny_base
from trainables.residual_stream import ReadValue, residual_stream


def test_the_mean_is_over_tokens_then_rows() -> None:
    base = tiny_base()
    mean = mean_response_activation(base, ROWS, 2048, 3, lambda _: None)
    assert mean.shape == (3, 32)
    other = mean_response_activation(base, ROWS[:2], 2048, 3, lambda _: None)
    expected = difference(base, ROWS, ROWS[:2], max_length=2048)
    torch.testing.assert_close((mean - other).float(), expected)


def test_one_row_is_the_mean_of_its_response_tokens() -> None:
    from trainables.chat_data import ChatEncoder, pad

    base = tiny_base()
    part = pad([ChatEncoder(base.tokenizer, 2048, "responses").encode(ROWS[0], prove=True)], 0)
    seen: dict[int, torch.Tensor] = {}
    with torch.no_grad(), residual_stream(base.model, readers=[ReadValue(2, seen.__setitem__)]):
        base.model(input_ids=part.input_ids_bt)
    mean = mean_response_activation(base, ROWS[:1], 2048, 1, lambda _: None)
    torch.testing.assert_close(mean[2].float(), seen[2][0][part.response_mask_bt[0]].mean(0), rtol=1e-5, atol=1e-6)
