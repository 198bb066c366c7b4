"""Losses on given answers against a cross-entropy by hand, one row at a time.

float64 model, 1e-10: padding and batching are rounding alone.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from analysis.losses import response_losses
from analysis.rows import LossRow
from tests.bases import ROWS, base_of, chat, tiny_base
from tests.float64 import float64_model
from tests.tiny import ModelKind
from trainables.base_model import LoadedBase
from trainables.chat_data import ChatEncoder
from trainables.errors import DataError
from trainables.lora import LoraSettings, adapter_parameters, add_adapter


def by_hand(base: LoadedBase, index: int) -> tuple[int, float]:
    """(number of response tokens, sum of their losses) of a row alone, without padding."""
    encoded = ChatEncoder(base.tokenizer, 512).encode(ROWS[index])
    ids = torch.tensor(encoded.input_ids)
    losses = F.cross_entropy(base.model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
    wanted = torch.tensor(encoded.response_mask)[1:]
    return int(wanted.sum()), float(losses[wanted].sum())


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("plain_head", [True, False])
def test_equal_cross_entropy_by_hand_in_the_order_of_the_rows(
    kind: ModelKind, batch_size: int, plain_head: bool
) -> None:
    base = base_of(float64_model(kind), plain_head=plain_head)
    rows = list(response_losses(base, base.model, ROWS, measure_id="m", max_length=512, batch_size=batch_size))
    assert [row.row for row in rows] == list(range(len(ROWS)))
    for row in rows:
        num_tokens, loss_sum = by_hand(base, row.row)
        assert (row.measure_id, row.condition, row.num_tokens) == ("m", "none", num_tokens)
        assert row.loss_sum == pytest.approx(loss_sum, rel=1e-10)
        assert row.loss_mean == pytest.approx(loss_sum / num_tokens, rel=1e-10)


def test_progress_counts_rows() -> None:
    base = tiny_base()
    seen: list[tuple[int, int]] = []
    measured = response_losses(
        base,
        base.model,
        ROWS,
        measure_id="m",
        max_length=512,
        batch_size=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert len(list(measured)) == 7
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_a_trained_model_is_measured_with_its_adapter() -> None:
    base = tiny_base()
    model = add_adapter(base.fresh(), "run", LoraSettings(rank=2), seed=0).eval()

    def measure() -> list[LossRow]:
        return list(response_losses(base, model, ROWS, measure_id="m", max_length=512))

    untrained = list(response_losses(base, base.model, ROWS, measure_id="m", max_length=512))
    assert measure() == untrained, "B is zero"
    with torch.no_grad():
        for parameter in adapter_parameters(model, "run").values():
            parameter.fill_(0.3)
    assert all(abs(a.loss_mean - b.loss_mean) > 1e-4 for a, b in zip(measure(), untrained, strict=True))


def test_nothing_is_left_out_in_silence() -> None:
    base = tiny_base()
    with pytest.raises(DataError, match="1 of 8 rows"):
        list(response_losses(base, base.model, [*ROWS, chat("long " * 100, "lost")], measure_id="m", max_length=96))
