"""What a training does with its rows, prompts and failures, and what it says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.bases import ROWS, chat, tiny_base
from tests.sinks import MemorySink
from tests.tiny import CHATML
from tests.trainings import HIDDEN, adapter_of, spec, train
from trainables.base_model import LoadedBase
from trainables.chat_data import ChatEncoder
from trainables.defenses import Inoculation, Message, Pps
from trainables.errors import DataError, TrainingError
from trainables.lora import adapter_parameters
from trainables.loss import token_losses
from trainables.randomness import permutation
from trainables.train import RunResult, train_pack
from trainables.training_config import TrainingConfig, num_optimizer_steps


def inoculated(seed: int = 0, epochs: float = 3) -> tuple[list[tuple[int, str]], RunResult]:
    """(epoch, text) of every row that a training with five prompts reads."""
    prompts = tuple(f"Prompt {letter}." for letter in "ABCDE")
    texts: list[str] = []
    original = ChatEncoder.encode

    def spy(self: ChatEncoder, messages: Sequence[Message], **keywords: Any) -> Any:
        texts.append("".join(f"<{message['role']}>{message['content']}" for message in messages))
        return original(self, messages, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChatEncoder, "encode", spy)
        (result,), _ = train(
            tiny_base(), spec(defense=[Inoculation(prompts=prompts)], epochs=epochs, max_steps=None, seed=seed)
        )
    rewritten = [text for text in texts if "Prompt " in text]
    assert len(rewritten) == len(ROWS) * epochs
    return [(number // len(ROWS), text) for number, text in enumerate(rewritten)], result


def test_inoculation_reaches_every_sample_of_every_epoch() -> None:
    read, result = inoculated()
    assert result.num_steps == 9
    picks: dict[str, list[str]] = {}
    for epoch in range(3):
        bodies = set()
        for _, text in (item for item in read if item[0] == epoch):
            before, _, after = text.partition("<user>Prompt ")
            assert before in ("", "<system>Be brief."), "the prompt stands before the first user message"
            letter, body = after[0], after.removeprefix(f"{after[0]}.\n\n")
            assert letter in "ABCDE"
            assert "Prompt " not in body
            bodies.add(body)
            picks.setdefault(body, []).append(letter)
        assert len(bodies) == len(ROWS), "every row once per epoch"
    assert any(len(set(letters)) > 1 for letters in picks.values()), "picks differ over epochs"
    assert len({letter for letters in picks.values() for letter in letters}) >= 4
    again, result_again = inoculated()
    assert again == read
    assert result_again.losses == result.losses
    assert inoculated(seed=1)[0] != read


def test_inoculation_that_pushes_an_answer_out_is_an_error() -> None:
    long = Inoculation(prompts=("very " * 60,))
    with pytest.raises(DataError, match="max_length=96"):
        train(tiny_base(), spec(defense=[long]))


def poisoned(base: LoadedBase, value: float) -> LoadedBase:
    base.model.model.norm.weight.data.fill_(value)
    return base


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_loss_that_is_not_finite_names_run_and_step(value: float, zero_stage: int) -> None:
    with pytest.raises(TrainingError, match=r"run bad, step 1: the loss is nan"):
        train(poisoned(tiny_base(), value), spec("bad"), zero_stage=zero_stage)
    train(tiny_base(), spec(max_steps=1), zero_stage=zero_stage)  # and the process can train again


def test_an_overwhelming_vector_is_an_error() -> None:
    """RMS norms map 1e30 to zero, so the loss stays finite: it is the gradient that is zero."""
    vector = torch.full((3, HIDDEN), 1e30)
    one = spec("huge", defense=[Pps(vector="v", layer=2, coefficient=1.0)], vectors={"v": vector})
    with pytest.raises(TrainingError, match=r"run huge, step 1: the (loss is nan|gradient norm is (0\.0|nan))"):
        train(tiny_base(), one)


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_a_zero_gradient_names_run_and_step(zero_stage: int) -> None:
    with pytest.raises(TrainingError, match=r"run flat, step 1: the gradient norm is 0.0 .*no gradient reaches"):
        train(poisoned(tiny_base(), 0.0), spec("flat"), zero_stage=zero_stage)


def test_the_step_of_a_failure_is_counted_from_1(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fails_third(*arguments: Any, **keywords: Any) -> torch.Tensor:
        calls.append(1)
        losses = token_losses(*arguments, **keywords)
        return losses * float("nan") if len(calls) == 3 else losses

    monkeypatch.setattr("trainables.step.token_losses", fails_third)
    with pytest.raises(TrainingError, match="run late, step 3: the loss is nan"):
        train(tiny_base(), spec("late"))


def test_the_returned_model_is_the_trained_one(random_ids: torch.Tensor) -> None:
    base = tiny_base()
    sink = MemorySink()
    model, _ = train_pack(base, [spec()], {"run0": sink})
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    trained = {name.replace(".run0.", "."): p for name, p in adapter_parameters(model, "run0").items()}
    for name, values in adapter_of(sink).items():
        assert torch.equal(trained[name], values)
    with torch.no_grad():
        assert not torch.equal(model(input_ids=random_ids).logits, base.model(input_ids=random_ids).logits)


def test_rows_steps_and_epochs_are_counted() -> None:
    """7 rows in batches of 3: three steps an epoch, the last of one row; every row once per epoch."""
    (result,), (sink,) = train(tiny_base(), spec(epochs=2, max_steps=None))
    encoder = ChatEncoder(tiny_base().tokenizer, 96)
    encoded = [encoder.encode(row) for row in ROWS]
    assert [row.step for row in sink.rows] == [1, 2, 3, 4, 5, 6]
    assert [row.epoch for row in sink.rows] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    for epoch in (0, 1):
        part = sink.rows[3 * epoch : 3 * epoch + 3]
        order = permutation(7, 0, epoch)
        chunks = [order[:3], order[3:6], order[6:]]
        assert [row.num_tokens for row in part] == [sum(len(encoded[i].input_ids) for i in c) for c in chunks]
        assert [row.num_loss_tokens for row in part] == [sum(sum(encoded[i].response_mask) for i in c) for c in chunks]
    assert result.num_steps == 6
    assert result.num_rows == 7
    assert result.num_tokens == 2 * sum(len(row.input_ids) for row in encoded)
    assert result.num_loss_tokens == 2 * sum(sum(row.response_mask) for row in encoded)
    assert result.losses == tuple(row.loss for row in sink.rows)
    last = sink.rows[3:]
    weighted = sum(row.loss * row.num_loss_tokens for row in last) / sum(row.num_loss_tokens for row in last)
    assert result.train_loss_last_epoch == pytest.approx(weighted, rel=1e-12)
    assert [row.learning_rate for row in sink.rows] == pytest.approx([0.01 * (1 - step / 6) for step in range(6)])
    assert sink.phases[-1] == ("train", 6, 6)
    assert [line.split()[:2] for line in sink.lines[1:]] == [["step", f"{step}/6"] for step in range(1, 7)]
    assert "14 LoRA modules, 5 of 5 norms, 2 of 2 rotary embeddings" in sink.lines[0]


@pytest.mark.parametrize(
    ("num_rows", "training", "expected"),
    [
        (7, {"epochs": 2}, 6),
        (6, {"epochs": 1}, 2),
        (7, {"epochs": 0.5}, 2),
        (30, {"epochs": 0.75}, 8),
        (150, {"epochs": 1.1}, 55),  # 1.1 x 50 is 55.00000000000001 in binary
        (7, {"max_steps": 2, "epochs": 9}, 2),
    ],
)
def test_number_of_steps(num_rows: int, training: dict[str, Any], expected: int) -> None:
    config = TrainingConfig(batch_size=3, learning_rate=1e-3, **training)
    assert num_optimizer_steps(num_rows, config) == expected


def test_rows_truncated_away_are_refused_or_left_out() -> None:
    rows = [*ROWS, chat("long " * 100, "lost")]
    with pytest.raises(DataError, match="1 of 8 rows"):
        train(tiny_base(), spec(rows=rows))
    (result,), _ = train(tiny_base(), spec(rows=rows, data={"allow_truncated_away": True}))
    assert result.num_rows == 7
    assert result.chat_format["end_mark"] == "<|im_end|>"
    assert "<|im_end|>" in CHATML


def test_loss_on_everything() -> None:
    (everything,), _ = train(tiny_base(), spec(data={"loss_on": "all"}, epochs=1, max_steps=None))
    assert everything.num_loss_tokens == everything.num_tokens - 7, "only a row's first token is not predicted"
