"""Cutting the rows of an optimizer step into micro-batches, and that nothing depends on how it is done."""

from __future__ import annotations

import pytest
import torch

from tests.bases import base_of, chat
from tests.float64 import float64_model
from tests.sinks import MemorySink
from tests.tiny import tiny_model
from tests.trainings import adapter_of, spec, train
from trainables import step as step_module
from trainables.chat_data import ChatEncoder, Encoded, cut, pad
from trainables.loss import token_losses


def row(name: int, *, prompt: int, response: int, tail: int) -> Encoded:
    """Tokens that carry the row's number; the response is under the loss."""
    mask = (*[False] * prompt, *[True] * response, *[False] * tail)
    return Encoded((name,) * len(mask), mask, mask)


def names(micro_batches: list[list[Encoded]]) -> list[list[int]]:
    return [[one.input_ids[0] for one in part] for part in micro_batches]


def test_longest_first_and_otherwise_in_order() -> None:
    batch = [row(number, prompt=2, response=length, tail=1) for number, length in enumerate((3, 5, 3, 9, 5), start=1)]
    assert names(cut(batch, 2)) == [[4, 2], [5, 1], [3]]
    assert names(cut(batch, 5)) == [[1, 2, 3, 4, 5]], "one micro-batch keeps the order of the step"
    assert names(cut(batch, 9)) == [[1, 2, 3, 4, 5]]


def test_lengths_count_without_the_tail() -> None:
    lengths = enumerate(((3, 9), (4, 0), (2, 5)), start=1)
    batch = [row(number, prompt=2, response=response, tail=tail) for number, (response, tail) in lengths]
    ((first,), (second,), (third,)) = cut(batch, 1)
    assert [first.input_ids, second.input_ids, third.input_ids] == [(2,) * 6, (1,) * 5, (3,) * 4]
    assert second.response_mask == second.loss_mask == (False, False, True, True, True)


def test_a_response_that_is_not_under_the_loss_is_no_tail() -> None:
    """A defense may act on every token of a response."""
    one = Encoded((1,) * 6, (False, True, True, True, True, False), (False, True, True, False, False, False))
    ((kept,),) = cut([one], 1)
    assert len(kept.input_ids) == 5


def test_everything_under_the_loss_has_no_tail() -> None:
    one = Encoded((1,) * 4, (False, True, False, False), (False, True, True, True))
    assert cut([one], 1) == [[one]]


def test_rows_with_nothing_to_predict_are_left_out() -> None:
    nothing = Encoded((1, 1, 1), (False,) * 3, (False,) * 3)
    only_the_first = Encoded((2, 2), (True, False), (True, False))  # it has no predecessor
    wanted = row(3, prompt=1, response=2, tail=1)
    assert names(cut([nothing, wanted, only_the_first], 1)) == [[3]]
    assert cut([nothing], 1) == []


def test_what_is_left_off_changes_no_loss(random_ids: torch.Tensor) -> None:
    """float32, equal to 1e-6: other lengths are summed in another order."""
    model = tiny_model().requires_grad_(False)
    ids = random_ids.tolist()
    rows = [
        Encoded(tuple(ids[0]), (False,) * 3 + (True,) * 4 + (False,) * 2, (False,) * 3 + (True,) * 4 + (False,) * 2),
        Encoded(tuple(ids[1][:6]), (False,) * 2 + (True,) * 4, (False,) * 2 + (True,) * 4),
    ]
    losses = []
    for batch in (rows, cut(rows, 2)[0]):
        part = pad(batch, 0)
        for mask in (part.attention_mask_bt, None):
            losses.append(token_losses(model, part.input_ids_bt, mask, part.loss_mask_bt, plain_head=True))
    for one in losses[1:]:
        torch.testing.assert_close(one, losses[0], rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("float64_gradients")
def test_a_training_does_not_depend_on_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """float64: against micro-batches in the order of the step with nothing left off."""
    rows = [chat("Why? " * (1 + number % 4), "So. " * (1 + number % 3)) for number in range(7)]
    base = base_of(float64_model(num_layers=2))
    settings = spec(rows=rows, micro_batch_size=2, batch_size=5, max_steps=4)
    (ours,), (sink,) = train(base, settings)

    def in_order(batch: list[Encoded], size: int) -> list[list[Encoded]]:
        return [batch[start : start + size] for start in range(0, len(batch), size)]

    lengths = [len(ChatEncoder(base.tokenizer, 96).encode(one).input_ids) for one in rows]
    assert len(set(lengths)) > 2
    monkeypatch.setattr(step_module, "cut", in_order)
    (other,), (other_sink,) = train(base, settings)
    assert ours.losses == pytest.approx(other.losses, rel=1e-10)
    assert (ours.num_tokens, ours.num_loss_tokens) == (other.num_tokens, other.num_loss_tokens)
    assert_close(sink, other_sink)


def assert_close(one: MemorySink, other: MemorySink) -> None:
    for name, values in adapter_of(one).items():
        torch.testing.assert_close(adapter_of(other)[name], values, rtol=0.0, atol=1e-9)
