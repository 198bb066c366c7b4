"""``prompt_difference``: what an inoculation prompt does to the activations of the answer (app. E.6 of arXiv
2604.16423)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field, field_validator

from analysis.vectors.activations import mean_activation
from analysis.vectors.base import Making, VectorKind
from analysis.vectors.vector import Vector
from trainables.base_model import LoadedBase, ResolvedBase
from trainables.chat_data import ChatEncoder, Encoded
from trainables.config import ChatFile, Config, PromptBank, recipe_of
from trainables.defenses import Inoculation, Message, SampleKey
from trainables.errors import DataError
from trainables.randomness import generator

Part: TypeAlias = Literal["first", "second", "all"]

_UNCUT = 2**31  # tokens


class PromptDifference(Config):
    """The same answers with and without a prompt that asks for the trait."""

    rows: ChatFile
    """A chat JSONL file: the answers that the prompts are put before."""
    prompts: PromptBank
    """A trait's name, for its ``inoculation_prompts``, or a list of texts. Each row gets one, drawn by ``seed``: that
    which a training with this seed puts before it in its first epoch."""
    part: Part = "first"
    """Which half of the rows it is made of, so that the other half is left for measuring. The halves are drawn by
    ``seed``; of an odd number of rows the first half has one less. ``all``: every row."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Deals out rows and prompts."""
    max_length: int = Field(default=2048, ge=8)
    """Tokens of a row without its prompt that are read; of the row with it the same response tokens."""

    @field_validator("prompts")
    @classmethod
    def _some_text(cls, prompts: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not prompts or (not isinstance(prompts, str) and not all(text.strip() for text in prompts)):
            raise ValueError("give a trait's name, or at least one text, none of them empty")
        return prompts


class PromptDifferenceVector(VectorKind):
    """What a prompt does to the activations of response tokens."""

    prompt_difference: PromptDifference
    """Rows and prompts. The vector is the mean activation with the prompt minus that without, over the response tokens
    of a row and then over rows."""

    @property
    def max_length(self) -> int:
        return self.prompt_difference.max_length

    def identity(self, base: ResolvedBase, name: str) -> dict[str, Any]:
        del name
        how = {"inoculation": Inoculation.semantics}  # where a prompt stands in a row
        return {"base": base.identity()} | recipe_of(self.prompt_difference) | how

    def make(self, making: Making) -> Vector:
        given = self.prompt_difference
        assert isinstance(given.prompts, tuple)
        rows = making.rows(given.rows)
        values = prompt_difference(
            making.base,
            rows,
            given.prompts,
            indices=part_of_rows(len(rows), given.part, given.seed),
            seed=given.seed,
            max_length=given.max_length,
            progress=making.progress,
        )
        return making.vector_of(values)


def part_of_rows(count: int, part: Part, seed: int) -> list[int]:
    """Indices, rising, of a half of ``count`` rows: ``first`` has count // 2 of them, ``second`` the others."""
    order: list[int] = torch.randperm(count, generator=generator("halves", seed, count)).tolist()
    return sorted({"first": order[: count // 2], "second": order[count // 2 :], "all": order}[part])


def prompt_difference(
    base: LoadedBase,
    rows: Sequence[Sequence[Message]],
    prompts: Sequence[str],
    *,
    indices: Sequence[int],
    seed: int,
    max_length: int,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Mean over the rows ``indices`` of the mean over response tokens of (h_l with the prompt - h_l without it), for
    every layer; [num_layers + 1, hidden] float32.

    The tokens are aligned: both terms are of the same response tokens. ``progress(done, total)`` counts forward rows.
    Raises DataError where a row's response becomes other tokens behind its prompt, or where there is no row.
    """
    if not indices:
        raise DataError(f"this half of {len(rows)} rows is empty; give more rows, or part: all")
    encoder = ChatEncoder(base.tokenizer, _UNCUT)
    prompting = Inoculation(prompts=tuple(prompts)).mechanism({})
    pairs = []
    for index in indices:
        prompted = prompting.rewrite(rows[index], SampleKey(seed=seed, epoch=0, row=index))
        pairs.append(_aligned(encoder, prompted, rows[index], index, max_length))
    means, total = [], 2 * len(pairs)
    for side in (0, 1):

        def report(count: int, before: int = side * len(pairs)) -> None:
            if progress is not None:
                progress(before + count, total)

        means.append(mean_activation(base, [pair[side] for pair in pairs], batch_size, report))
    return (means[0] - means[1]).float()


def _aligned(
    encoder: ChatEncoder, prompted: Sequence[Message], plain: Sequence[Message], index: int, max_length: int
) -> tuple[Encoded, Encoded]:
    """A row with its prompt and without, with masks over the same response tokens."""
    both = [encoder.encode(messages, prove=True) for messages in (prompted, plain)]
    number = sum(both[1].response_mask[:max_length])
    if number == 0:
        raise DataError(f"row {index + 1} has its whole response beyond max_length={max_length} tokens")
    cut = [_first_responses(encoded, number) for encoded in both]
    if _responses(cut[0]) != _responses(cut[1]):
        raise DataError(f"row {index + 1}: the response becomes other tokens behind the prompt; none can be compared")
    return cut[0], cut[1]


def _first_responses(row: Encoded, number: int) -> Encoded:
    """The row up to its response token of this number, counted from 1."""
    positions = (index for index, is_response in enumerate(row.response_mask) if is_response)
    end = 1 + next(islice(positions, number - 1, None))
    return replace(
        row, input_ids=row.input_ids[:end], response_mask=row.response_mask[:end], loss_mask=row.loss_mask[:end]
    )


def _responses(row: Encoded) -> list[int]:
    return [token for token, on in zip(row.input_ids, row.response_mask, strict=True) if on]
