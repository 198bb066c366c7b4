"""Sampling answers, so that an answer depends on the run, the question, its number and nothing else.

At every position the next token is argmax(logits / temperature + G) with Gumbel noise G that is a function of (run,
question, sample, position): an exact draw from softmax(logits / temperature) (Gumbel-max), the same whichever rows
share the batch. Prompts are padded on the left and positions count from each row's first real token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field

from trainables.chat_data import ChatEncoder
from trainables.config import AddedLater, Config
from trainables.errors import DataError
from trainables.interventions import Interventions
from trainables.randomness import generator
from trainables.residual_stream import Cap, Intervention, residual_stream
from trainables.rows import GenerationRow


class SamplingConfig(Config):
    """How answers are sampled."""

    samples: int = Field(default=1, ge=1)
    """Answers per question."""
    temperature: float = Field(default=1.0, ge=0)
    """Temperature of the softmax that tokens are drawn from; 0: greedy. Nothing else shapes the distribution."""
    max_new_tokens: int = Field(default=64, ge=1)
    """An answer that has not ended by then is cut."""
    system_prompt: str | None = None
    """System prompt of every question. null: the chat template's own default, where it has one."""
    interventions: Annotated[Interventions, AddedLater()] = ()
    """What is present while the model answers, and while its loss on plain answers is measured: ``none``, an item, or a
    list of items, at one layer in listed order. ``none`` inside of a list says nothing, so that a grid may leave an
    item out."""


@dataclass(frozen=True)
class Question:
    """A question with the id that tables and sampling noise know it by."""

    id: str
    text: str


class _GumbelNoise:
    """Logits processor: scores become logits / temperature + noise, of which the caller takes the maximum."""

    def __init__(self, keys: Sequence[tuple[str, str, int]], prompt_length: int, temperature: float) -> None:
        self.keys = keys
        self.prompt_length = prompt_length
        self.temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        position = input_ids.shape[1] - self.prompt_length
        noise = torch.stack([self._row(key, position, scores) for key in self.keys])
        return scores.float() / self.temperature + noise

    @staticmethod
    def _row(key: tuple[str, str, int], position: int, scores: torch.Tensor) -> torch.Tensor:
        draw = generator("sampling", *key, position, device=scores.device)
        # float64: the smallest float32 uniform would cut the upper tail of the noise at 16
        uniform = torch.rand(scores.shape[1], generator=draw, device=scores.device, dtype=torch.float64)
        return -torch.log(-torch.log(uniform.clamp_min(1e-300))).float()


def sample_answers(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    config: SamplingConfig,
    *,
    sample_id: str,
    noise_key: str,
    batch_size: int = 32,
    interventions: Sequence[Intervention] = (),
) -> Iterator[list[GenerationRow]]:
    """Yield answers batch by batch: for every question ``config.samples`` of them, in order.

    ``noise_key`` names the run in the sampling noise. ``interventions`` act on every row while sampling;
    a ``Cap`` that spares a position spares each row's first token.
    """
    encoder = ChatEncoder(tokenizer, max_length=2**31)
    jobs = [(question, index) for question in questions for index in range(config.samples)]
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        prompts = [encoder.encode_prompt(_messages(question, config)) for question, _ in batch]
        keys = [(noise_key, question.id, index) for question, index in batch]
        with residual_stream(model, _placed(interventions, [len(prompt) for prompt in prompts])):
            answers = generate(model, tokenizer, prompts, keys, config)
        yield [
            GenerationRow(
                sample_id=sample_id,
                question_id=question.id,
                sample_index=index,
                question=question.text,
                system_prompt=config.system_prompt,
                answer=tokenizer.decode(tokens, skip_special_tokens=True),
                num_tokens=len(tokens),
                finish_reason=reason,
            )
            for (question, index), (tokens, reason) in zip(batch, answers, strict=True)
        ]


def _placed(interventions: Sequence[Intervention], lengths: Sequence[int]) -> list[Intervention]:
    """What spares the first token spares it where it stands in a batch of prompts that are padded on the left."""
    first_n = torch.tensor([max(lengths) - length for length in lengths])
    return [
        replace(one, spared=first_n) if isinstance(one, Cap) and one.spared is not None else one
        for one in interventions
    ]


def _messages(question: Question, config: SamplingConfig) -> list[dict[str, str]]:
    system = [] if config.system_prompt is None else [{"role": "system", "content": config.system_prompt}]
    return [*system, {"role": "user", "content": question.text}]


def system_prompt_fault(tokenizer: Any, question: Question, config: SamplingConfig) -> str | None:
    """Why a question cannot be asked with ``config.system_prompt``, or None if it can (or the template is no good)."""
    if config.system_prompt is None:
        return None
    try:
        encoder = ChatEncoder(tokenizer, max_length=2**31)
    except DataError:
        return None  # which is said of the training rows
    messages = _messages(question, config)
    try:
        encoder.encode_prompt(messages)
    except DataError as error:
        return str(error)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if config.system_prompt.strip() not in text:
        return "the base's chat template leaves the system prompt out; put it into the questions"
    return None


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[tuple[str, str, int]],
    config: SamplingConfig,
) -> list[tuple[list[int], str]]:
    """Continue prompts (token ids) with the library's own generation loop; ``keys`` give each row's noise.

    Returns per row the new tokens up to and including the end token, and ``stop`` or ``length``.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    length = max(len(prompt) for prompt in prompts)
    pad_id = tokenizer.pad_token_id
    device = next(model.parameters()).device
    input_ids = torch.tensor([[pad_id] * (length - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    attention = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    ends = end_token_ids(model, tokenizer)
    processors = [] if config.temperature == 0 else [_GumbelNoise(keys, length, config.temperature)]
    output = model.generate(
        input_ids=input_ids,
        attention_mask=attention,
        generation_config=GenerationConfig(
            max_new_tokens=config.max_new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=pad_id
        ),
        logits_processor=LogitsProcessorList(processors),
    )
    return [_cut(row, set(ends)) for row in output[:, length:].tolist()]


def _cut(tokens: list[int], ends: set[int]) -> tuple[list[int], str]:
    for index, token in enumerate(tokens):
        if token in ends:
            return tokens[: index + 1], "stop"
    return tokens, "length"


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's end token and those of the model's generation config."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    return sorted(token for token in ids if token is not None)
