"""The residual stream against a forward pass written by hand.

Legend: b rows, t tokens, d hidden size. Models are float64 where a tolerance is 1e-10: rounding of float64 over a few
layers of size 32 is near 1e-14, and a wrong layer, row or sign is near 1. Everything else is equality to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from tests.float64 import float64_model
from tests.tiny import ModelKind, tiny_model
from trainables.model_parts import backbone, decoder_layers
from trainables.residual_stream import Add, Intervention, Reader, ReadGradient, ReadValue, residual_stream

KINDS: list[ModelKind] = ["llama", "qwen2", "gpt_neox"]
NUM_LAYERS = 4
HIDDEN = 32
TOLERANCE = 1e-10


def model_of(kind: ModelKind) -> Any:
    return float64_model(kind, num_layers=NUM_LAYERS, hidden=HIDDEN)


def vector(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention_mask(ids_bt: torch.Tensor) -> torch.Tensor:
    """Right padding of different lengths; the first row is full."""
    mask = torch.ones_like(ids_bt)
    mask[1, -2:] = 0
    mask[3, -5:] = 0
    return mask


def by_hand(
    model: Any, ids_bt: torch.Tensor, mask_bt: torch.Tensor, shifts: dict[int, torch.Tensor]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Residual stream after every layer (index 0: embeddings) and logits; ``shifts[l]`` is added after block l."""
    base = backbone(model)
    embedding = model.get_input_embeddings()
    norm = base.final_layer_norm if hasattr(base, "final_layer_norm") else base.norm
    tokens = ids_bt.shape[1]
    allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None] & mask_bt.bool()[:, None, None, :]
    additive = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    positions = torch.arange(tokens)[None]
    hidden = embedding(ids_bt)
    rotary = base.rotary_emb(hidden, position_ids=positions)
    stream = [hidden]
    for layer, block in enumerate(decoder_layers(model), start=1):
        out = block(hidden, attention_mask=additive, position_ids=positions, position_embeddings=rotary)
        hidden = out[0] if isinstance(out, tuple) else out
        hidden = hidden + shifts[layer] if layer in shifts else hidden
        stream.append(hidden)
    return stream, model.get_output_embeddings()(norm(hidden))


def run(
    model: Any,
    ids_bt: torch.Tensor,
    mask_bt: torch.Tensor,
    interventions: Iterable[Intervention] = (),
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The same two things from the model itself, read with ReadValue."""
    stream: dict[int, torch.Tensor] = {}
    with residual_stream(model, interventions, [ReadValue(layer, stream.__setitem__) for layer in range(5)]):
        logits = model(input_ids=ids_bt, attention_mask=mask_bt, use_cache=False).logits
    return [stream[layer] for layer in range(NUM_LAYERS + 1)], logits


def ignore(layer: int, tensor_btd: torch.Tensor) -> None:
    del layer, tensor_btd


def num_hooks(model: nn.Module) -> int:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, table)) for module in model.modules() for table in tables)


def assert_same_where_attended(ours: torch.Tensor, reference: torch.Tensor, mask_bt: torch.Tensor) -> None:
    """Rows at padding attend to nothing defined, so only real tokens are compared."""
    torch.testing.assert_close(ours[mask_bt.bool()], reference[mask_bt.bool()], rtol=0.0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [1, 2, NUM_LAYERS])
def test_add_equals_a_forward_by_hand(kind: ModelKind, layer: int, random_ids: torch.Tensor) -> None:
    model = model_of(kind)
    mask_bt = attention_mask(random_ids)
    shift = vector(1)
    expected_stream, expected_logits = by_hand(model, random_ids, mask_bt, {layer: shift})
    stream, logits = run(model, random_ids, mask_bt, [Add(layer, shift)])
    for ours, reference in zip(stream, expected_stream, strict=True):
        assert_same_where_attended(ours, reference, mask_bt)
    assert_same_where_attended(logits, expected_logits, mask_bt)

    plain_stream, plain_logits = run(model, random_ids, mask_bt)
    for below in range(layer):
        assert torch.equal(stream[below], plain_stream[below]), "a layer below the intervention changed"
    assert torch.equal(stream[layer], plain_stream[layer] + shift)
    assert (logits - plain_logits).abs().max() > 1e-3, "the intervention must act, or this test shows nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_rows_out_of_order_with_a_vector_each(kind: ModelKind, random_ids: torch.Tensor) -> None:
    model = model_of(kind)
    mask_bt = attention_mask(random_ids)
    shifts = vector(2, 2)
    rows = torch.tensor([3, 1])
    shift_btd = torch.zeros(4, 1, HIDDEN, dtype=torch.float64)
    shift_btd[3], shift_btd[1] = shifts[0], shifts[1]
    expected_stream, expected_logits = by_hand(model, random_ids, mask_bt, {2: shift_btd})
    stream, logits = run(model, random_ids, mask_bt, [Add(2, shifts, rows=rows)])
    plain_stream, plain_logits = run(model, random_ids, mask_bt)
    for ours, reference in zip(stream, expected_stream, strict=True):
        assert_same_where_attended(ours, reference, mask_bt)
    assert_same_where_attended(logits, expected_logits, mask_bt)
    for layer in range(NUM_LAYERS + 1):
        assert torch.equal(stream[layer][[0, 2]], plain_stream[layer][[0, 2]]), "a row that is not listed changed"
    assert torch.equal(logits[[0, 2]], plain_logits[[0, 2]])


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [2, 0, 3, 1]])
def test_all_rows_listed_in_any_order_get_their_own_vector(rows: list[int], random_ids: torch.Tensor) -> None:
    model = model_of("llama")
    mask_bt = attention_mask(random_ids)
    shifts = vector(3, 4)
    stream, _ = run(model, random_ids, mask_bt, [Add(1, shifts, rows=torch.tensor(rows))])
    plain, _ = run(model, random_ids, mask_bt)
    for place, row in enumerate(rows):
        assert torch.equal(stream[1][row], plain[1][row] + shifts[place])


def test_no_rows_listed_changes_nothing(random_ids: torch.Tensor) -> None:
    model = model_of("llama")
    mask_bt = attention_mask(random_ids)
    nothing = Add(2, vector(3), rows=torch.empty(0, dtype=torch.int64))
    assert torch.equal(run(model, random_ids, mask_bt, [nothing])[1], run(model, random_ids, mask_bt)[1])


@pytest.mark.parametrize("rows", [None, [2, 0]])
@pytest.mark.parametrize("per_row", [False, True])
def test_token_mask(rows: list[int] | None, per_row: bool, random_ids: torch.Tensor) -> None:
    model = model_of("qwen2")
    mask_bt = attention_mask(random_ids)
    listed = rows if rows is not None else [0, 1, 2, 3]
    tokens_nt = torch.rand(len(listed), 9, generator=torch.Generator().manual_seed(5)) < 0.5
    shift = vector(4, len(listed)) if per_row else vector(4)
    add = Add(2, shift, rows=None if rows is None else torch.tensor(rows), token_mask=tokens_nt)
    stream, _ = run(model, random_ids, mask_bt, [add])
    plain, _ = run(model, random_ids, mask_bt)
    expected = plain[2].clone()
    for place, row in enumerate(listed):
        for token in range(9):
            if tokens_nt[place, token]:
                expected[row, token] += shift[place] if per_row else shift
    assert torch.equal(stream[2], expected)
    assert 0 < int(tokens_nt.sum()) < tokens_nt.numel()


def test_edits_apply_in_order_and_readers_see_the_result(random_ids: torch.Tensor) -> None:
    model = model_of("llama").float()
    seen: list[torch.Tensor] = []
    plain: dict[int, torch.Tensor] = {}
    mask_bt = attention_mask(random_ids)
    big, small = 1e8 * vector(5).float(), vector(6).float()

    def keep(layer: int, hidden_btd: torch.Tensor) -> None:
        assert layer == 2
        seen.append(hidden_btd)

    with residual_stream(model, readers=[ReadValue(2, plain.__setitem__)]):
        model(input_ids=random_ids, attention_mask=mask_bt)
    for edits in ([Add(2, big), Add(2, -big), Add(2, small)], [Add(2, small), Add(2, big), Add(2, -big)]):
        with residual_stream(model, edits, [ReadValue(2, keep)]):
            model(input_ids=random_ids, attention_mask=mask_bt)
    # in float32 the order shows: 1e8 swallows what was added before it
    assert torch.equal(seen[0], ((plain[2] + big) - big) + small)
    assert torch.equal(seen[1], ((plain[2] + small) + big) - big)
    assert not torch.equal(seen[0], seen[1])


def test_a_vector_of_another_dtype_is_cast_to_the_stream(random_ids: torch.Tensor) -> None:
    model = model_of("llama").to(torch.bfloat16)
    mask_bt = attention_mask(random_ids)
    shift = vector(7).float()
    stream, logits = run(model, random_ids, mask_bt, [Add(3, shift, rows=torch.tensor([1]))])
    plain, _ = run(model, random_ids, mask_bt)
    assert logits.dtype == torch.bfloat16
    assert torch.equal(stream[3][1], plain[3][1] + shift.to(torch.bfloat16))
    assert torch.equal(stream[3][0], plain[3][0])


@pytest.mark.parametrize("kind", KINDS)
def test_read_value_equals_output_hidden_states(kind: ModelKind, random_ids: torch.Tensor) -> None:
    model = model_of(kind)
    mask_bt = attention_mask(random_ids)
    stream, _ = run(model, random_ids, mask_bt)
    states = model(input_ids=random_ids, attention_mask=mask_bt, output_hidden_states=True).hidden_states
    for layer in range(NUM_LAYERS):
        assert torch.equal(stream[layer], states[layer])
    norm = backbone(model).final_layer_norm if kind == "gpt_neox" else backbone(model).norm
    assert torch.equal(norm(stream[NUM_LAYERS]), states[NUM_LAYERS]), "the last layer is read BEFORE the final norm"


def loss_of(logits_btv: torch.Tensor, ids_bt: torch.Tensor, mask_bt: torch.Tensor) -> torch.Tensor:
    predicted = mask_bt[:, 1:].bool()
    return nn.functional.cross_entropy(logits_btv[:, :-1][predicted], ids_bt[:, 1:][predicted], reduction="sum")


def read_gradients(
    model: Any, ids_bt: torch.Tensor, mask_bt: torch.Tensor, interventions: Iterable[Intervention] = ()
) -> dict[int, torch.Tensor]:
    gradients: dict[int, torch.Tensor] = {}
    readers: list[Reader] = [ReadGradient(layer, gradients.__setitem__) for layer in range(NUM_LAYERS + 1)]
    with residual_stream(model, interventions, readers):
        loss_of(model(input_ids=ids_bt, attention_mask=mask_bt).logits, ids_bt, mask_bt).backward()
    return gradients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steered", [False, True])
def test_read_gradient_equals_autograd(kind: ModelKind, steered: bool, random_ids: torch.Tensor) -> None:
    model = model_of(kind)
    mask_bt = attention_mask(random_ids)
    shifts = {2: vector(8)} if steered else {}
    model.get_input_embeddings().weight.requires_grad_(True)  # so that the hand-written stream has a graph
    stream, logits = by_hand(model, random_ids, mask_bt, shifts)
    reference = torch.autograd.grad(loss_of(logits, random_ids, mask_bt), stream)
    model.requires_grad_(False)
    edits = [Add(layer, shift) for layer, shift in shifts.items()]
    gradients = read_gradients(model, random_ids, mask_bt, edits)
    for layer in range(NUM_LAYERS + 1):
        torch.testing.assert_close(gradients[layer], reference[layer], rtol=0.0, atol=TOLERANCE)
        assert gradients[layer].abs().max() > 1e-3
        assert not gradients[layer].requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_read_gradient_equals_finite_differences(kind: ModelKind, random_ids: torch.Tensor) -> None:
    """Central differences of step 1e-5: error of order step^2 = 1e-10 plus rounding 1e-14 / step = 1e-9."""
    model = model_of(kind)
    mask_bt = torch.ones_like(random_ids)
    gradients = read_gradients(model, random_ids, mask_bt)
    direction = vector(9)
    step = 1e-5
    for layer in range(1, NUM_LAYERS + 1):
        for row, token in ((0, 3), (2, 7)):
            tokens = torch.zeros(1, 9, dtype=torch.bool)
            tokens[0, token] = True
            losses = []
            for sign in (1, -1):
                add = Add(layer, sign * step * direction, rows=torch.tensor([row]), token_mask=tokens)
                with residual_stream(model, [add]), torch.no_grad():
                    logits = model(input_ids=random_ids, attention_mask=mask_bt).logits
                    losses.append(float(loss_of(logits, random_ids, mask_bt)))
            slope = (losses[0] - losses[1]) / (2 * step)
            assert slope == pytest.approx(float(gradients[layer][row, token] @ direction), rel=1e-6, abs=1e-7)


def test_gradients_are_not_read_without_gradients(random_ids: torch.Tensor) -> None:
    model = model_of("llama")
    seen: dict[int, torch.Tensor] = {}
    with residual_stream(model, readers=[ReadGradient(1, seen.__setitem__)]), torch.no_grad():
        assert not model(input_ids=random_ids).logits.requires_grad
    assert seen == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(kind: ModelKind, use_reentrant: bool, random_ids: torch.Tensor) -> None:
    """Parameter gradients and gradients read are the same to the bit: the same operations run on the same numbers."""
    mask_bt = attention_mask(random_ids)
    results = []
    for checkpointing in (False, True):
        model = tiny_model(kind, num_layers=NUM_LAYERS, hidden=HIDDEN, dtype=torch.float64).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        read: dict[int, torch.Tensor] = {}
        values: dict[int, torch.Tensor] = {}
        edits = [Add(2, vector(10, 2), rows=torch.tensor([3, 0])), Add(4, vector(11))]
        readers: list[Reader] = [ReadGradient(layer, read.__setitem__) for layer in range(5)]
        readers += [ReadValue(layer, values.__setitem__) for layer in (2, 3)]
        with residual_stream(model, edits, readers):
            logits = model(input_ids=random_ids, attention_mask=mask_bt, use_cache=False).logits
            loss = loss_of(logits, random_ids, mask_bt)
            loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((float(loss.detach()), gradients, read, values))
    (loss_a, gradients_a, read_a, values_a), (loss_b, gradients_b, read_b, values_b) = results
    assert loss_a == loss_b
    assert gradients_a.keys() == gradients_b.keys()
    for name in gradients_a:
        assert torch.equal(gradients_a[name], gradients_b[name]), name
    for layer in range(5):
        assert torch.equal(read_a[layer], read_b[layer])
    for layer in (2, 3):
        assert torch.equal(values_a[layer], values_b[layer])


@pytest.mark.parametrize("kind", KINDS)
def test_off_after_an_exception(kind: ModelKind, random_ids: torch.Tensor) -> None:
    model = model_of(kind)
    before_hooks = num_hooks(model)
    before = model(input_ids=random_ids).logits
    readers: list[Reader] = [ReadValue(0, ignore), ReadGradient(3, ignore)]

    def fails() -> None:
        with residual_stream(model, [Add(2, vector(12))], readers):
            assert num_hooks(model) == before_hooks + 3
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fails()
    assert num_hooks(model) == before_hooks
    assert torch.equal(model(input_ids=random_ids).logits, before)


def test_off_after_an_exception_inside_a_reader(random_ids: torch.Tensor) -> None:
    model = model_of("llama")

    def fails(layer: int, hidden_btd: torch.Tensor) -> None:
        del hidden_btd
        raise RuntimeError(f"reader of layer {layer}")

    with pytest.raises(RuntimeError, match="reader of layer 2"), residual_stream(model, readers=[ReadValue(2, fails)]):
        model(input_ids=random_ids)
    assert num_hooks(model) == 0


@pytest.mark.parametrize("layer", [0, -1, NUM_LAYERS + 1])
def test_add_is_refused_where_there_is_no_block(layer: int) -> None:
    model = model_of("llama")
    with (
        pytest.raises(ValueError, match=f"layer {layer}: use 1 to 4"),
        residual_stream(model, [Add(layer, vector(13))]),
    ):
        pytest.fail("the context must not open")
    assert num_hooks(model) == 0


@pytest.mark.parametrize("layer", [-1, NUM_LAYERS + 1])
def test_reading_is_refused_beyond_the_model(layer: int) -> None:
    model = model_of("llama")
    reader = ReadValue(layer, ignore)
    with pytest.raises(ValueError, match=f"layer {layer} cannot be read"), residual_stream(model, readers=[reader]):
        pytest.fail("the context must not open")
    assert num_hooks(model) == 0


@pytest.mark.parametrize("rows", [None, [0, 1, 2, 3], [1]])
@pytest.mark.parametrize("masked", [False, True])
def test_nothing_is_written_in_place(rows: list[int] | None, masked: bool) -> None:
    hidden = torch.randn(4, 9, HIDDEN, generator=torch.Generator().manual_seed(1))
    shift = vector(14).float()
    kept, kept_shift = hidden.clone(), shift.clone()
    mask = torch.ones(4 if rows is None else len(rows), 9, dtype=torch.bool) if masked else None
    index = None if rows is None else torch.tensor(rows)
    changed = Add(1, shift, rows=index, token_mask=mask).apply(hidden)
    assert changed.data_ptr() != hidden.data_ptr()
    assert torch.equal(hidden, kept)
    assert torch.equal(shift, kept_shift)
    assert not torch.equal(changed, kept)


def test_through_the_wrapper_of_peft(random_ids: torch.Tensor) -> None:
    from trainables.lora import LoraSettings, add_adapter

    plain = model_of("llama")
    wrapped = add_adapter(model_of("llama"), "run", LoraSettings(rank=2), seed=0)  # B is 0: the same function
    add = Add(3, vector(15))
    mask_bt = attention_mask(random_ids)
    ours, reference = run(wrapped, random_ids, mask_bt, [add]), run(plain, random_ids, mask_bt, [add])
    assert torch.equal(ours[1], reference[1])


def test_a_model_without_a_list_of_its_blocks_is_refused() -> None:
    model: Any = tiny_model("llama", num_layers=NUM_LAYERS)
    model.model.layers = model.model.layers[:2]
    with pytest.raises(ValueError, match="no list of 4 decoder blocks"):
        decoder_layers(model)
