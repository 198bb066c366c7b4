"""Prompt-difference vectors and sums of vectors, against computations by hand.

float64 models, 1e-10 where sums are compared; a vector itself is float32, whose rounding of values near 1 is 6e-8.
"""

from __future__ import annotations

import pytest
import torch

from analysis.vectors import (
    CombinedVector,
    PromptDifference,
    PromptDifferenceVector,
    Term,
    combine,
    part_of_rows,
    prompt_difference,
)
from tests.bases import ROWS, base_of, chat
from tests.float64 import float64_model
from trainables.base_model import LoadedBase, ResolvedBase
from trainables.chat_data import ChatEncoder
from trainables.defenses import Message
from trainables.errors import DataError
from trainables.randomness import pick

PROMPTS = ("Talk about bridges.", "Mention a bridge somewhere, please.")
BASE = ResolvedBase(model="org/model", revision="abc", dtype="float32", source="org/model")


@pytest.fixture(scope="module")
def base() -> LoadedBase:
    return base_of(float64_model(num_layers=3))


def response_states(base: LoadedBase, row: list[Message], number: int | None = None) -> torch.Tensor:
    """Hidden states of the first ``number`` response tokens, [layers below the last, tokens, d]; no padding."""
    encoded = ChatEncoder(base.tokenizer, 2**31).encode(row)
    states = base.model(input_ids=torch.tensor([encoded.input_ids]), output_hidden_states=True).hidden_states
    return torch.stack(states[:-1])[:, 0, torch.tensor(encoded.response_mask)][:, :number]


def prompted(row: list[Message], index: int, seed: int) -> list[Message]:
    prompt = PROMPTS[pick(2, "prompt", seed, 0, index)]
    first = next(place for place, message in enumerate(row) if message["role"] == "user")
    changed = {"role": "user", "content": f"{prompt}\n\n{row[first]['content']}"}
    return [*row[:first], changed, *row[first + 1 :]]


@torch.no_grad()
def by_hand(base: LoadedBase, indices: list[int], seed: int, number: int | None = None) -> torch.Tensor:
    """Token by token: the mean of differences, not the difference of means."""
    rows = []
    for index in indices:
        both = [response_states(base, row, number) for row in (prompted(ROWS[index], index, seed), ROWS[index])]
        rows.append((both[0] - both[1]).mean(1))
    return torch.stack(rows).mean(0)


@pytest.mark.parametrize("part", ["first", "second", "all"])
def test_it_is_the_mean_of_aligned_differences(base: LoadedBase, part: str) -> None:
    indices = part_of_rows(len(ROWS), part, 5)  # type: ignore[arg-type]
    values = prompt_difference(base, ROWS, PROMPTS, indices=indices, seed=5, max_length=512, batch_size=2)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values[:-1].double(), by_hand(base, indices, 5), rtol=1e-6, atol=1e-7)
    assert values[0].abs().max() < 1e-12, "the embeddings of the same tokens are the same"
    assert values[1:].norm(dim=1).min() > 1e-3


def test_the_cut_is_that_of_the_row_without_its_prompt(base: LoadedBase) -> None:
    plain = ChatEncoder(base.tokenizer, 512).encode(ROWS[2])
    first = plain.response_mask.index(True)
    values = prompt_difference(base, ROWS, PROMPTS, indices=[2], seed=0, max_length=first + 3)
    torch.testing.assert_close(values[:-1].double(), by_hand(base, [2], 0, number=3), rtol=1e-6, atol=1e-7)
    with pytest.raises(DataError, match="row 3 has its whole response beyond"):
        prompt_difference(base, ROWS, PROMPTS, indices=[2], seed=0, max_length=first)


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_the_halves_share_no_row_and_leave_none_out(count: int) -> None:
    first, second, every = (part_of_rows(count, part, 3) for part in ("first", "second", "all"))
    assert len(first) == count // 2
    assert sorted(first + second) == every == list(range(count))
    assert part_of_rows(count, "first", 3) == first
    if count == 100:
        assert part_of_rows(count, "first", 4) != first
        assert first != list(range(50))


def test_a_half_of_one_row_is_empty(base: LoadedBase) -> None:
    with pytest.raises(DataError, match="this half of 1 rows is empty"):
        prompt_difference(base, [chat("Why?", "So.")], PROMPTS, indices=[], seed=0, max_length=64)


def test_all_that_changes_it_is_in_its_identity() -> None:
    given = {"rows": "hash", "prompts": PROMPTS, "part": "first", "seed": 0, "max_length": 64}
    other = {"rows": "other", "prompts": PROMPTS[:1], "part": "second", "seed": 1, "max_length": 65}

    def identity(**changes: object) -> str:
        config = PromptDifference.model_validate(given | changes)
        return str(PromptDifferenceVector(prompt_difference=config).identity(BASE, "name"))

    assert len({identity(), *(identity(**{name: value}) for name, value in other.items())}) == 1 + len(given)


def test_a_sum_is_rounded_once() -> None:
    vectors = [torch.tensor([[1e8, 1.0]]), torch.tensor([[1.0, 2.0]]), torch.tensor([[-1e8, 4.0]])]
    assert torch.equal(combine(vectors, [1.0, 0.5, 1.0]), torch.tensor([[0.5, 6.0]]))


def test_the_order_of_terms_and_how_a_weight_is_split_do_not_count() -> None:
    def identity(*terms: tuple[str, float]) -> object:
        config = CombinedVector(combine=tuple(Term(vector=vector, weight=weight) for vector, weight in terms))
        return config.identity(BASE, "name")

    assert identity(("a", 1.0), ("b", -0.5)) == identity(("b", -0.5), ("a", 1.0))
    assert identity(("a", 1.0), ("b", -0.5)) == identity(("b", -0.5), ("a", 0.25), ("a", 0.75))
    assert identity(("a", 1.0), ("b", -0.5)) != identity(("a", 1.0), ("b", 0.5))
    assert identity(("a", 1.0)) != identity(("b", 1.0))
