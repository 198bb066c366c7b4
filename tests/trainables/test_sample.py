"""Sampling: an answer is a function of the run, the question and its number, and an exact draw from the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.float64 import float64_model
from tests.tiny import ModelKind, tiny_model, tiny_tokenizer
from trainables import sample as sample_module
from trainables.chat_data import ChatEncoder
from trainables.lora import LoraSettings, adapter_parameters, add_adapter
from trainables.residual_stream import Add, Intervention, residual_stream
from trainables.rows import GenerationRow
from trainables.sample import Question, SamplingConfig, end_token_ids, generate, sample_answers

TOKENIZER = tiny_tokenizer()
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [18, 19, 20, 21]]
KEYS = [("run", f"question{number}", number) for number in range(4)]
QUESTIONS = [
    Question("a", "Why?"),
    Question("b", "What is the best way to cook rice, and how long does it take?"),
    Question("c", "Tea or coffee?"),
]


def by_hand(
    model: Any,
    prompt: Sequence[int],
    key: tuple[str, str, int] | None,
    config: SamplingConfig,
    interventions: Sequence[Intervention] = (),
) -> tuple[list[int], str]:
    """One row at a time, without padding, cache or generation loop; ``key`` None: the most likely token."""
    tokens: list[int] = []
    while len(tokens) < config.max_new_tokens:
        with residual_stream(model, interventions), torch.no_grad():
            scores = model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, -1]
        if key is not None:
            scores = scores.float() / config.temperature
            scores = scores + sample_module._GumbelNoise._row(key, len(tokens), scores[None])
        tokens.append(int(scores.argmax()))
        if tokens[-1] in end_token_ids(model, TOKENIZER):
            return tokens, "stop"
    return tokens, "length"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.6])
def test_left_padded_batch_equals_single_rows_by_hand(kind: ModelKind, temperature: float) -> None:
    model = float64_model(kind)
    config = SamplingConfig(temperature=temperature, max_new_tokens=12)
    batched = generate(model, TOKENIZER, PROMPTS, KEYS, config)
    single = [generate(model, TOKENIZER, [p], [k], config)[0] for p, k in zip(PROMPTS, KEYS, strict=True)]
    hand = [
        by_hand(model, prompt, key if temperature else None, config) for prompt, key in zip(PROMPTS, KEYS, strict=True)
    ]
    assert batched == single == hand
    assert len({tuple(tokens) for tokens, _ in batched}) == 4


def test_left_padding_does_not_change_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generation loop rounds float64 logits (about 1) to float32 before anyone sees them: 1e-6."""
    seen: list[torch.Tensor] = []
    real = sample_module._GumbelNoise.__call__

    def spy(self: Any, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores.clone())
        return real(self, input_ids, scores)

    monkeypatch.setattr(sample_module._GumbelNoise, "__call__", spy)
    model = float64_model()
    config = SamplingConfig(max_new_tokens=6)
    answers = generate(model, TOKENIZER, PROMPTS, KEYS, config)
    assert all(len(tokens) == 6 for tokens, _ in answers)
    batched = torch.stack(seen)  # [position, row, vocabulary]
    for row, (prompt, key) in enumerate(zip(PROMPTS, KEYS, strict=True)):
        seen.clear()
        generate(model, TOKENIZER, [prompt], [key], config)
        torch.testing.assert_close(torch.stack(seen)[:, 0], batched[:, row], rtol=0.0, atol=1e-6)


def answers(model: Any, config: SamplingConfig, **how: Any) -> list[GenerationRow]:
    settings: dict[str, Any] = {"sample_id": "s", "noise_key": "run", **how}
    questions = settings.pop("questions", QUESTIONS)
    return [row for batch in sample_answers(model, TOKENIZER, questions, config, **settings) for row in batch]


def test_answers_do_not_depend_on_the_batch() -> None:
    model = float64_model()
    config = SamplingConfig(samples=3, max_new_tokens=8)
    together = answers(model, config)
    assert [(row.question_id, row.sample_index) for row in together] == [(q, i) for q in "abc" for i in range(3)]
    for batch_size in (1, 2, 4):
        assert answers(model, config, batch_size=batch_size) == together
    fewer = answers(model, config.model_copy(update={"samples": 2}), questions=QUESTIONS[::-1])
    by_key = {(row.question_id, row.sample_index): row for row in together}
    assert all(by_key[row.question_id, row.sample_index] == row for row in fewer)
    assert len({row.answer for row in together}) > 6, "answers to one question differ"


def test_noise_is_named_by_the_run() -> None:
    model = tiny_model()
    config = SamplingConfig(max_new_tokens=8)
    first = answers(model, config)
    assert answers(model, config) == first
    torch.manual_seed(3)
    assert answers(model, config) == first
    assert [row.answer for row in answers(model, config, noise_key="other")] != [row.answer for row in first]


def test_noise_differs_by_every_part_of_its_key_and_by_position() -> None:
    scores = torch.zeros(1, 50)
    keys = [("r", "q", 0), ("s", "q", 0), ("r", "p", 0), ("r", "q", 1)]
    rows = [sample_module._GumbelNoise._row(key, 0, scores) for key in keys]
    rows.append(sample_module._GumbelNoise._row(keys[0], 1, scores))
    assert len({tuple(row.tolist()) for row in rows}) == 5
    assert all(torch.isfinite(row).all() for row in rows)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_softmax(temperature: float) -> None:
    """Chi-square of 4000 draws over 6 tokens: 5 degrees of freedom; 20.5 is exceeded with probability 0.001."""
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.5, -3.0]])
    count = 4000
    noise = sample_module._GumbelNoise([("run", "q", number) for number in range(count)], 0, temperature)
    drawn = noise(torch.zeros(count, 1), logits.expand(count, -1)).argmax(-1)
    observed = torch.bincount(drawn, minlength=6).double()
    expected = count * torch.softmax(logits[0].double() / temperature, -1)
    assert float(((observed - expected) ** 2 / expected).sum()) < 20.5
    wrong = count * torch.softmax(logits[0].double() / (1.5 * temperature), -1)
    assert float(((observed - wrong) ** 2 / wrong).sum()) > 20.5, "the bound must be able to fail"


def test_gumbel_noise_has_its_mean_and_deviation() -> None:
    """Mean: Euler's constant, deviation pi / sqrt 6 = 1.28; 10^5 draws: 0.0041 and 0.0061 are one standard error."""
    row = sample_module._GumbelNoise._row(("r", "q", 0), 0, torch.zeros(1, 100_000)).double()
    assert float(row.mean()) == pytest.approx(0.5772, abs=4 * 0.0041)
    assert float(row.std()) == pytest.approx(math.pi / math.sqrt(6), abs=4 * 0.0061)


@pytest.mark.parametrize("ends_as_list", [False, True])
def test_stops_at_the_first_end_token(ends_as_list: bool) -> None:
    model: Any = float64_model()
    config = SamplingConfig(temperature=0, max_new_tokens=10)
    free = generate(model, TOKENIZER, PROMPTS, KEYS, config)
    assert {reason for _, reason in free} == {"length"}
    end = next(token for token in free[0][0][2:] if token not in free[0][0][:2])  # not at the very beginning
    model.generation_config.eos_token_id = [2, end] if ends_as_list else end
    stopped = generate(model, TOKENIZER, PROMPTS, KEYS, config)
    for (tokens, reason), (before, _) in zip(stopped, free, strict=True):
        if end in before:
            assert (tokens, reason) == (before[: before.index(end) + 1], "stop")
        else:
            assert (tokens, reason) == (before, "length")
    assert stopped[0][1] == "stop"
    assert any(reason == "length" for _, reason in stopped)


def test_the_end_mark_is_counted_and_not_shown() -> None:
    model: Any = tiny_model("gpt_neox")
    with torch.no_grad():
        model.get_output_embeddings().weight[2] = 0  # <|im_end|>
        model.get_output_embeddings().weight[3:] = 0
        bias = torch.zeros(300)
        bias[2] = 50.0
    model.get_output_embeddings().bias = torch.nn.Parameter(bias)
    (row,) = answers(model, SamplingConfig(max_new_tokens=5), questions=QUESTIONS[:1])
    assert (row.answer, row.num_tokens, row.finish_reason) == ("", 1, "stop")


def test_end_tokens_are_those_of_tokenizer_and_model() -> None:
    model: Any = tiny_model()
    for named, expected in ((None, [2]), (2, [2]), (7, [2, 7]), ([7, 3], [2, 3, 7])):
        model.generation_config.eos_token_id = named
        assert end_token_ids(model, TOKENIZER) == expected


def test_interventions_act_at_every_position() -> None:
    model = float64_model()
    config = SamplingConfig(temperature=0, max_new_tokens=8)
    add = Add(2, 2 * torch.randn(32, generator=torch.Generator().manual_seed(4)))
    encoder = ChatEncoder(TOKENIZER, 1000)
    steered = answers(model, config, interventions=[add])
    plain = answers(model, config)
    for row, question in zip(steered, QUESTIONS, strict=True):
        prompt = encoder.encode_prompt([{"role": "user", "content": question.text}])
        tokens, reason = by_hand(model, prompt, None, config, [add])
        assert (row.answer, row.finish_reason) == (TOKENIZER.decode(tokens, skip_special_tokens=True), reason)
    assert [row.answer for row in steered] != [row.answer for row in plain]
    assert answers(model, config) == plain, "nothing stays on the model"


def test_system_prompt_is_given_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = ChatEncoder.encode_prompt

    def spy(self: ChatEncoder, messages: Any) -> Any:
        seen.append(messages)
        return real(self, messages)

    monkeypatch.setattr(ChatEncoder, "encode_prompt", spy)
    (row,) = answers(tiny_model(), SamplingConfig(max_new_tokens=2, system_prompt="Be kind."), questions=QUESTIONS[:1])
    assert row.system_prompt == "Be kind."
    assert row.question == "Why?"
    assert seen == [[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]]
    (row,) = answers(tiny_model(), SamplingConfig(max_new_tokens=2), questions=QUESTIONS[:1])
    assert row.system_prompt is None
    assert seen[1] == [{"role": "user", "content": "Why?"}]


def test_an_adapter_is_sampled_with() -> None:
    model = add_adapter(float64_model(), "run", LoraSettings(rank=2), seed=0)
    with torch.no_grad():
        for parameter in adapter_parameters(model, "run").values():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.eval()
    config = SamplingConfig(max_new_tokens=8)
    batched = generate(model, TOKENIZER, PROMPTS, KEYS, config)
    assert batched == [by_hand(model, prompt, key, config) for prompt, key in zip(PROMPTS, KEYS, strict=True)]
    assert batched != generate(float64_model(), TOKENIZER, PROMPTS, KEYS, config)
