"""Every intervention on every kind of model against passes written by hand, and each for itself on plain tensors.

Legend: b rows, t tokens, d hidden size. Models are float64: their rounding over a few layers of size 32 is near 1e-14,
gradients are near 1; a wrong layer, row, token or sign is near 1e-2 or above.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import nn

from tests.by_hand import Change, both_passes
from tests.float64 import float64_model
from tests.tiny import ModelKind, tiny_model
from trainables.model_parts import decoder_layers
from trainables.residual_stream import (
    Ablate,
    Add,
    Cap,
    EditGradient,
    GradientMode,
    Intervention,
    Reader,
    ReadGradient,
    ReadValue,
    orthonormal,
    residual_stream,
)

KINDS: list[ModelKind] = ["llama", "qwen2", "qwen3", "gemma", "mistral", "gpt_neox"]
MODES: tuple[GradientMode, ...] = get_args(GradientMode)
VALUES = ["add", "cap", "ablate"]
LAYERS, HIDDEN = 3, 32
TOLERANCE = 1e-10


def vector(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def summed_loss(ids_bt: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    def loss(logits_btv: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits_btv[:, :-1].flatten(0, 1), ids_bt[:, 1:].flatten(), reduction="sum")

    return loss


def by_loops(rows: list[int], mask: torch.Tensor, change: Callable[[torch.Tensor, int], torch.Tensor]) -> Change:
    """``change(token's vector, place of its row in rows)`` at every token of the mask, one after the other."""

    def everywhere(tensor_btd: torch.Tensor) -> torch.Tensor:
        done = [[tensor_btd[row, token] for token in range(tensor_btd.shape[1])] for row in range(tensor_btd.shape[0])]
        for place, row in enumerate(rows):
            for token in range(tensor_btd.shape[1]):
                if mask[place, token]:
                    done[row][token] = change(tensor_btd[row, token], place)
        return torch.stack([torch.stack(tokens) for tokens in done])

    return everywhere


def gradient_by_formula(mode: GradientMode, gradient: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """App. E.2 as it is printed."""
    v = direction / direction.norm()
    s = gradient @ v
    p = s * v
    match mode:
        case "attenuate":
            return gradient - p + s.abs() * v
        case "amplify":
            return gradient - p - s.abs() * v
        case "neutralize":
            return gradient - p
        case "block":
            return gradient - min(0.0, float(s)) * v


def value_by_formula(
    name: str, directions: torch.Tensor, floor: float, ceiling: float
) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Add the row's own vector; clamp along it; project on the complement of all of them by least squares."""

    def change(hidden: torch.Tensor, place: int) -> torch.Tensor:
        if name == "add":
            return hidden + directions[place]
        if name == "cap":
            a = directions[place] / directions[place].norm()
            s = hidden @ a
            return hidden - torch.relu(s - ceiling) * a + torch.relu(floor - s) * a
        weights = torch.linalg.lstsq(directions.T, hidden[:, None]).solution
        return hidden - (directions.T @ weights)[:, 0]

    return change


def run(
    model: Any, ids_bt: torch.Tensor, edits: list[Intervention]
) -> tuple[dict[int, torch.Tensor], torch.Tensor, dict[int, torch.Tensor], dict[str, torch.Tensor]]:
    """Stream, logits, gradients as read, gradients of the blocks' parameters, from the model itself."""
    model.zero_grad()
    values: dict[int, torch.Tensor] = {}
    arriving: dict[int, torch.Tensor] = {}
    readers: list[Reader] = [ReadValue(layer, values.__setitem__) for layer in range(LAYERS + 1)]
    readers += [ReadGradient(layer, arriving.__setitem__) for layer in range(LAYERS + 1)]
    with residual_stream(model, edits, readers):
        logits = model(input_ids=ids_bt, use_cache=False).logits
        summed_loss(ids_bt)(logits).backward()
    parameters = {
        name: parameter.grad
        for layer, block in enumerate(decoder_layers(model), start=1)
        for name, parameter in block.named_parameters(prefix=f"{layer}")
        if parameter.grad is not None
    }
    return values, logits.detach(), arriving, parameters


def trained(kind: ModelKind, checkpointing: bool) -> Any:
    """A float64 model whose blocks ask for gradients, also of their input."""
    model = float64_model(kind, num_layers=LAYERS, hidden=HIDDEN)
    decoder_layers(model).requires_grad_(True)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*VALUES, *MODES])
def test_equals_both_passes_by_hand(name: Any, kind: ModelKind, checkpointing: bool, random_ids: torch.Tensor) -> None:
    """At two layers and at the last one, on two rows out of order, with a vector each and some of their tokens."""
    rows, at = [3, 1], (1, LAYERS)
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(3)) < 0.7
    directions = vector(1, 2)
    values: dict[int, Change] = {}
    gradients: dict[int, Change] = {}
    edits: list[Intervention] = []
    for layer in at:
        where = {"rows": torch.tensor(rows), "token_mask": mask}
        if name in MODES:
            edits.append(EditGradient(layer, directions, name, **where))
            gradients[layer] = by_loops(rows, mask, lambda g, place: gradient_by_formula(name, g, directions[place]))
            continue
        made: dict[str, Intervention] = {
            "add": Add(layer, directions, **where),
            "cap": Cap(layer, directions, ceiling=0.3, floor=-0.2, **where),
            "ablate": Ablate(layer, orthonormal(directions), **where),
        }
        edits.append(made[name])
        values[layer] = by_loops(rows, mask, value_by_formula(name, directions, -0.2, 0.3))
    model = trained(kind, checkpointing)
    expected = both_passes(model, random_ids, summed_loss(random_ids), values, gradients)
    stream, logits, arriving, parameters = run(model, random_ids, edits)
    for layer in range(LAYERS + 1):
        torch.testing.assert_close(stream[layer].detach(), expected.stream[layer], rtol=0.0, atol=TOLERANCE)
        torch.testing.assert_close(arriving[layer], expected.arriving[layer], rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(logits, expected.logits, rtol=0.0, atol=TOLERANCE)
    assert parameters.keys() == expected.parameters.keys()
    for parameter, gradient in parameters.items():
        torch.testing.assert_close(gradient, expected.parameters[parameter], rtol=TOLERANCE, atol=TOLERANCE)

    plain_stream, plain_logits, plain_arriving, plain_parameters = run(model, random_ids, [])
    changed = [not torch.allclose(parameters[one], plain_parameters[one], rtol=1e-3) for one in parameters]
    assert any(changed), "the intervention must act, or this test shows nothing"
    if name in MODES:
        assert torch.equal(logits, plain_logits), "an edit of the gradient is none of the values"
        assert torch.equal(arriving[LAYERS], plain_arriving[LAYERS]), "read as it arrives, before this layer's own edit"
    for layer in range(LAYERS + 1):
        for row in (0, 2):
            assert torch.equal(stream[layer][row], plain_stream[layer][row]), "a row that is not listed changed"
            assert torch.equal(arriving[layer][row], plain_arriving[layer][row])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_on_the_right_side_are_untouched_to_the_bit(mode: GradientMode, dtype: torch.dtype) -> None:
    gradient = vector(2, 3, 50).to(dtype)
    direction = vector(3)
    s_bt = gradient.double() @ direction
    kept = {"attenuate": s_bt >= 0, "amplify": s_bt <= 0, "block": s_bt >= 0}.get(mode, torch.zeros(3, 50).bool())
    after = EditGradient(1, direction, mode).edit(gradient)
    assert after.dtype == dtype
    assert torch.equal(after[kept], gradient[kept])
    assert not any(torch.equal(after[row, token], gradient[row, token]) for row, token in (~kept).nonzero().tolist())
    left = after.double() @ (direction / direction.norm())
    # Rounding of each of 32 entries, of size 1, moves a projection by 32 times its unit (bfloat16: 2**-9) at most.
    tolerance = 32 * (2**-9 if dtype == torch.bfloat16 else 2**-24)
    wanted = {"attenuate": s_bt.abs(), "amplify": -s_bt.abs(), "neutralize": 0 * s_bt, "block": s_bt.clamp(min=0)}
    torch.testing.assert_close(left, wanted[mode] / direction.norm(), rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cap_leaves_what_is_allowed_to_the_bit(dtype: torch.dtype) -> None:
    hidden, direction = vector(4, 3, 50).to(dtype), vector(5)
    s_bt = hidden.double() @ (direction / direction.norm())
    allowed = (s_bt < 0.5) & (s_bt > -0.5)
    capped = Cap(1, direction, ceiling=0.5, floor=-0.5).apply(hidden)
    assert torch.equal(capped[allowed], hidden[allowed])
    after = capped.double() @ (direction / direction.norm())
    tolerance = 32 * (2**-8 if dtype == torch.bfloat16 else 2**-23)
    torch.testing.assert_close(after, s_bt.clamp(-0.5, 0.5), rtol=0.0, atol=tolerance)
    only_ceiling = Cap(1, direction, ceiling=0.5).apply(hidden)
    assert torch.equal(only_ceiling[s_bt < 0.5], hidden[s_bt < 0.5])
    only_floor = Cap(1, direction, floor=-0.5).apply(hidden)
    assert torch.equal(only_floor[s_bt > -0.5], hidden[s_bt > -0.5])
    assert torch.equal(Cap(1, direction).apply(hidden), hidden)


def test_a_cap_of_its_own_for_every_row() -> None:
    hidden, direction = vector(6, 3, 9), vector(7)
    ceilings = torch.tensor([0.125, float("inf")])
    capped = Cap(1, direction, ceiling=ceilings, rows=torch.tensor([2, 0])).apply(hidden)
    alone = Cap(1, direction, ceiling=0.125).apply(hidden)[2]
    torch.testing.assert_close(capped[2], alone, rtol=0.0, atol=1e-13)  # a product of other shape sums otherwise
    assert not torch.equal(capped[2], hidden[2])
    assert torch.equal(capped[:2], hidden[:2])


def test_ablating_twice_is_ablating_once_and_nothing_is_left() -> None:
    hidden, directions = vector(8, 3, 9), vector(9, 4)
    ablate = Ablate(1, orthonormal(directions))
    once = ablate.apply(hidden)
    assert float((once @ directions.T).abs().max()) < 1e-12
    torch.testing.assert_close(ablate.apply(once), once, rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_directions_that_span_less_than_they_are_many_are_refused(scale: float) -> None:
    first, second = scale * vector(10), scale * vector(11)
    assert orthonormal(torch.stack([first, second])).shape == (2, HIDDEN)
    for bad in (first + second, 0 * first):
        with pytest.raises(ValueError, match="direction 2 is zero or a combination"):
            orthonormal(torch.stack([first, second, bad]))


def test_nothing_is_written_in_place() -> None:
    hidden, direction = vector(12, 3, 9), vector(13)
    kept = hidden.clone()
    for rows in (None, torch.tensor([1])):
        for changed in (
            Cap(1, direction, ceiling=0.1, rows=rows).apply(hidden),
            Ablate(1, orthonormal(direction[None]), rows=rows).apply(hidden),
            *(EditGradient(1, direction, mode, rows=rows).edit(hidden) for mode in MODES),
        ):
            assert changed.data_ptr() != hidden.data_ptr()
            assert torch.equal(hidden, kept)
            assert not torch.equal(changed, kept)


def test_a_direction_of_length_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="length 0"):
        EditGradient(1, torch.zeros(HIDDEN), "neutralize").edit(vector(14, 3, 9))


def test_a_backward_pass_after_the_context_is_neither_edited_nor_read(random_ids: torch.Tensor) -> None:
    model = trained("llama", False)
    seen: list[int] = []
    plain = run(model, random_ids, [])[3]
    model.zero_grad()
    edit = EditGradient(2, vector(15), "amplify")
    with residual_stream(model, [edit], [ReadGradient(2, lambda layer, _: seen.append(layer))]):
        loss = summed_loss(random_ids)(model(input_ids=random_ids, use_cache=False).logits)
    loss.backward()
    assert seen == []
    for name, gradient in run(model, random_ids, [])[3].items():
        assert torch.equal(gradient, plain[name])


def test_an_edit_where_nothing_below_asks_for_gradients_does_nothing(random_ids: torch.Tensor) -> None:
    model = tiny_model("llama", num_layers=LAYERS).requires_grad_(False)
    with residual_stream(model, [EditGradient(2, vector(16), "attenuate")]):
        assert not model(input_ids=random_ids).logits.requires_grad
