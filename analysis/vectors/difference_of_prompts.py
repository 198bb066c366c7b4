"""``prompt_difference``: what an inoculation prompt does to the activations of the answer (app. E.6 of arXiv
2604.16423)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field, field_validator

from analysis.conditions import NOTHING, Condition
from analysis.measured_batches import aligned_items
from analysis.vectors.activations import mean_activation
from analysis.vectors.base import Making, VectorKind
from analysis.vectors.vector import Vector
from trainables.base_model import LoadedBase, ResolvedBase
from trainables.config import ChatFile, Config, PromptBank, recipe_of
from trainables.defenses import Inoculation, Message
from trainables.errors import DataError
from trainables.randomness import generator

Part: TypeAlias = Literal["first", "second", "all"]


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
    groups = aligned_items(
        base,
        [rows[index] for index in indices],
        [Condition("prompted", prompt=tuple(prompts), seed=seed), NOTHING],
        max_length=max_length,
        row_numbers=indices,
    )
    pairs = [[item.encoded for item in group] for group in groups]
    means, total = [], 2 * len(pairs)
    for side in (0, 1):

        def report(count: int, before: int = side * len(pairs)) -> None:
            if progress is not None:
                progress(before + count, total)

        means.append(mean_activation(base, [pair[side] for pair in pairs], batch_size, report))
    return (means[0] - means[1]).float()
