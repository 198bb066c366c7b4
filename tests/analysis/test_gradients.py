"""The gradient readout against plain PyTorch, finite differences and a case known by hand; what it must not depend on.

float64, 1e-10, where nothing but the order of sums differs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from analysis.conditions import NOTHING, Condition, Steering
from analysis.gradients import gradient_rows
from analysis.measured_batches import Measured, aligned_items, read_gradients
from analysis.measured_rows import GradientRow
from analysis.rows import LossRow
from tests.analysis.plain_gradients import mean_cosine, plain_gradients
from tests.bases import ROWS, base_of, chat, tiny_base
from tests.float64 import float64_model
from tests.tiny import ModelKind, tiny_model
from trainables.base_model import LoadedBase
from trainables.defenses import Inoculation, Message, Pps
from trainables.errors import DataError
from trainables.residual_stream import Add, residual_stream

NUM_LAYERS = 4
LAYERS = list(range(NUM_LAYERS + 1))
DRAW = torch.Generator().manual_seed(0)
VECTORS = {name: torch.randn(NUM_LAYERS + 1, 32, generator=DRAW, dtype=torch.float64) for name in ("a", "b", "c")}
PROMPT = "Mention the orange bridge."
STEERED = Condition("steered", (Steering(VECTORS["a"], [2], 1.5), Steering(VECTORS["b"], [1, 2, 4], -0.3)))
PROMPTED = Condition("prompted", prompt=PROMPT)
BOTH = Condition("both", STEERED.interventions, PROMPT)
CONDITIONS = [NOTHING, STEERED, PROMPTED, BOTH]


def measure(
    base: LoadedBase,
    rows: Any = ROWS,
    conditions: Any = CONDITIONS,
    vectors: Any = VECTORS,
    layers: Any = LAYERS,
    **rest: Any,
) -> list[GradientRow | LossRow]:
    rest = {"measure_id": "m", "max_length": 512, **rest}
    return list(gradient_rows(base, base.model, rows, conditions, vectors, layers, **rest))


def numbers(rows: list[GradientRow | LossRow]) -> dict[tuple[Any, ...], tuple[float, ...]]:
    found: dict[tuple[Any, ...], tuple[float, ...]] = {}
    for row in rows:
        if isinstance(row, LossRow):
            found[row.row, row.condition] = (row.num_tokens, row.loss_sum, row.loss_mean)
        else:
            assert row.cosine is not None
            assert row.positive_share is not None
            key = (row.row, row.condition, row.layer, row.vector)
            found[key] = (row.num_tokens, row.cosine, row.positive_share, row.gradient_norm)
    assert len(found) == len(rows), "every key once"
    return found


def same(one: Any, other: Any, tolerance: float) -> None:
    assert one.keys() == other.keys()
    for key, values in one.items():
        assert values == pytest.approx(other[key], rel=tolerance, abs=tolerance), key


def prompted(messages: list[Message]) -> list[Message]:
    first = next(index for index, message in enumerate(messages) if message["role"] == "user")
    changed = [dict(message) for message in messages]
    changed[first]["content"] = f"{PROMPT}\n\n{changed[first]['content']}"
    return list(changed)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("positions", ["response", "predicting"])
def test_equal_plain_autograd_under_every_condition(kind: ModelKind, positions: str) -> None:
    base = base_of(float64_model(kind))
    found = numbers(measure(base, positions=positions, layers=LAYERS[:-1]))
    expected: dict[tuple[Any, ...], tuple[float, ...]] = {}
    for index, messages in enumerate(ROWS):
        for condition in CONDITIONS:
            read = prompted(messages) if condition.prompt else messages
            shifts: dict[int, torch.Tensor] = {}
            if condition.interventions:
                shifts = {layer: -0.3 * VECTORS["b"][layer] for layer in (1, 2, 4)}
                shifts[2] = shifts[2] + 1.5 * VECTORS["a"][2]
            loss, by_layer = plain_gradients(base, read, shifts, positions=positions)
            tokens = int(found[index, condition.name][0])
            expected[index, condition.name] = (tokens, loss, loss / tokens)
            for layer, gradients in by_layer.items():
                for name, vector in VECTORS.items():
                    expected[index, condition.name, layer, name] = mean_cosine(gradients, vector[layer])
    same(found, expected, 1e-10)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox"])
def test_equal_finite_differences_of_the_loss(kind: ModelKind) -> None:
    """Central differences, step 1e-5: their own error is about 1e-10 times the third derivative."""
    base = base_of(float64_model(kind))
    (group,) = aligned_items(base, ROWS[2:3], [BOTH], max_length=512)
    gradients: dict[int, torch.Tensor] = {}
    places: list[int] = []

    def read(batch: Any, layer: int, values: torch.Tensor) -> None:
        gradients[layer] = values
        places[:] = batch.places_n.tolist()

    read_gradients(base, base.model, group, LAYERS, read)
    batch = Measured.of(base, group)
    for layer in LAYERS[1:]:
        for token in (0, len(places) // 2, len(places) - 2):
            direction = VECTORS["c"][layer] / VECTORS["c"][layer].norm()
            mask = torch.zeros(batch.padded.input_ids_bt.shape, dtype=torch.bool)
            mask[0, places[token]] = True
            sums = []
            for step in (1e-5, -1e-5):
                with (
                    torch.no_grad(),
                    residual_stream(
                        base.model, [*batch.interventions(), Add(layer, step * direction, token_mask=mask)]
                    ),
                ):
                    sums.append(float(batch.losses(base, base.model).sum()))
            slope = (sums[0] - sums[1]) / 2e-5
            assert float(gradients[layer][token] @ direction) == pytest.approx(slope, abs=1e-7)
            assert abs(slope) > 1e-4, "or the comparison says nothing"


def test_no_batching_packing_order_or_sharding_changes_the_numbers() -> None:
    base = base_of(float64_model())
    whole = numbers(measure(base))
    alone: dict[Any, Any] = {}
    for condition in CONDITIONS:
        alone |= numbers(measure(base, conditions=[condition], batch_tokens=1))
    same(alone, whole, 1e-10)
    same(numbers(measure(base, batch_tokens=10**6)), whole, 1e-10)
    same(numbers(measure(base, batch_tokens=150, conditions=CONDITIONS[::-1])), whole, 1e-10)
    order = [5, 0, 3, 6, 1, 2, 4]
    same(numbers(measure(base, [ROWS[index] for index in order], row_numbers=order)), whole, 1e-10)
    shards: dict[Any, Any] = {}
    for part in ([0, 1, 2], [3], [4, 5, 6]):
        shards |= numbers(measure(base, [ROWS[index] for index in part], row_numbers=part))
    same(shards, whole, 1e-10)
    few = numbers(measure(base, layers=[3], vectors={"b": VECTORS["b"]}))
    same(few, {key: value for key, value in whole.items() if key in few}, 1e-10)


def test_float32_agrees_where_the_gradient_is_above_the_floor() -> None:
    """1e-4 is documented for float32 where |g| is at least 1e-3 of the largest of the layer, as it is here everywhere:
    rounding is relative to the largest, so the direction of a much smaller gradient is made of it."""
    exact = numbers(measure(base_of(float64_model())))
    rounded = numbers(measure(base_of(float64_model().float())))
    largest = {layer: max(v[3] for k, v in exact.items() if len(k) == 4 and k[2] == layer) for layer in LAYERS}
    for key, values in exact.items():
        if len(key) == 4:
            assert values[3] > 1e-3 * largest[key[2]]
            assert rounded[key][1] == pytest.approx(values[1], abs=1e-4), key
            assert rounded[key][3] == pytest.approx(values[3], rel=1e-4), key
        else:
            assert rounded[key][1] == pytest.approx(values[1], rel=1e-5), key


def test_the_sign_of_a_case_known_by_hand() -> None:
    """The head knows one direction: it raises every token of the answer and no other. So at the last layer descent
    pushes every predicting position along it (negative), and against its opposite (positive)."""
    base = base_of(float64_model("gpt_neox"))
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    direction -= direction.mean()  # the final layer norm takes the mean away
    row = chat("Why?", "Because.")
    (group,) = aligned_items(base, [row], [NOTHING], max_length=512)
    encoded = group[0].encoded
    answer = [token for token, on in zip(encoded.input_ids, encoded.response_mask, strict=True) if on]
    head = base.model.get_output_embeddings().weight
    head.zero_()
    head[answer] = direction
    vector = direction.expand(NUM_LAYERS + 1, -1)
    found = numbers(measure(base, [row], [NOTHING], {"v": vector, "-v": -vector}, [NUM_LAYERS], positions="predicting"))
    tokens, cosine, share, _ = found[0, "none", NUM_LAYERS, "v"]
    assert tokens == len(answer)
    assert cosine < -0.5
    assert share == 0
    assert found[0, "none", NUM_LAYERS, "-v"][1:3] == pytest.approx((-cosine, 1))


def test_tokens_without_a_gradient_are_left_out() -> None:
    """Nothing is predicted from the last end mark, at any layer."""
    base = base_of(float64_model())
    rows = measure(base, conditions=[NOTHING])
    losses = {row.row: row.num_tokens for row in rows if isinstance(row, LossRow)}
    for row in rows:
        if isinstance(row, GradientRow):
            assert row.num_tokens == losses[row.row] - 1
    for row in measure(base, conditions=[NOTHING], positions="predicting"):
        assert row.num_tokens == losses[row.row]


def test_a_row_without_any_gradient_has_no_cosine() -> None:
    base = base_of(float64_model("gpt_neox"))
    base.model.get_output_embeddings().weight.zero_()
    for row in measure(base, conditions=[NOTHING]):
        if isinstance(row, GradientRow):
            assert (row.cosine, row.positive_share, row.num_tokens, row.gradient_norm) == (None, None, 0, 0.0)


def test_a_cut_row_keeps_the_same_tokens_under_a_prompt() -> None:
    base = base_of(float64_model())
    long = [chat("Why?", "Because it takes time, and time again, to learn it well.")]
    (full,) = aligned_items(base, long, [NOTHING, PROMPTED], max_length=512)
    (cut,) = aligned_items(base, long, [NOTHING, PROMPTED], max_length=full[0].length - 9)
    texts = [[t for t, on in zip(i.encoded.input_ids, i.encoded.response_mask, strict=True) if on] for i in cut]
    assert texts[0] == texts[1]
    assert len(texts[0]) == sum(full[0].encoded.response_mask) - 9
    assert cut[1].length > cut[0].length


def test_shared_positions_are_all_that_follow_the_prompt() -> None:
    base = base_of(float64_model())
    for group in aligned_items(base, ROWS, [NOTHING, PROMPTED, STEERED], max_length=512, positions="shared"):
        read = [[t for t, on in zip(i.encoded.input_ids, i.measured, strict=True) if on] for i in group]
        assert read[0] == read[1] == read[2]
        messages = ROWS[group[0].row]
        question = next(m["content"] for m in messages if m["role"] == "user")
        text = str(base.tokenizer.decode(read[0]))
        # the header ends with a new line, as what stands between prompt and question does
        assert text.removeprefix("\n").startswith(question)
        assert text.endswith(f"{messages[-1]['content']}<|im_end|>")
    (alone,) = aligned_items(base, ROWS[:1], [NOTHING], max_length=512, positions="shared")
    assert all(alone[0].measured)


def test_of_several_prompts_each_row_draws_one_whatever_the_shard() -> None:
    base = base_of(float64_model())
    bank = Condition("bank", prompt=("Be brief.", PROMPT, "Say it twice, please."))
    groups = aligned_items(base, ROWS, [bank], max_length=512)
    lengths = {
        group[0].length - plain[0].length
        for group, plain in zip(groups, aligned_items(base, ROWS, [NOTHING], max_length=512), strict=True)
    }
    assert len(lengths) > 1
    part = aligned_items(base, ROWS[4:], [bank], max_length=512, row_numbers=[4, 5, 6])
    assert [group[0].encoded for group in part] == [group[0].encoded for group in groups[4:]]


def test_a_defense_at_work_is_a_condition_too() -> None:
    base = base_of(float64_model())
    pps = Pps(vector="a", layer=2, coefficient=1.5).mechanism({"a": VECTORS["a"]})
    inoculation = Inoculation(prompts=(PROMPT,)).mechanism({})
    whole = numbers(measure(base, conditions=[Condition("x", mechanisms=(pps, inoculation))]))
    parts = numbers(measure(base, conditions=[Condition("x", ((VECTORS["a"], (2,), 1.5),), PROMPT)]))
    same(whole, parts, 1e-10)


def test_the_model_is_left_as_it_was() -> None:
    base = tiny_base(num_layers=NUM_LAYERS)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    measure(base)
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    assert all(parameter.grad is None for parameter in base.model.parameters())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in base.model.modules()]
    assert sum(hooks) == 0


def test_bfloat16_models_are_reduced_in_float32() -> None:
    base = base_of(tiny_model(num_layers=NUM_LAYERS, dtype=torch.bfloat16))
    (group,) = aligned_items(base, ROWS[:1], [NOTHING], max_length=512)
    dtypes = set()

    def read(batch: Measured, layer: int, values: torch.Tensor) -> None:
        del batch, layer
        dtypes.add(values.dtype)

    losses = read_gradients(base, base.model, group, LAYERS, read)
    assert dtypes == {torch.float32}
    assert losses[0].dtype == torch.float64
    exact = numbers(measure(base_of(tiny_model(num_layers=NUM_LAYERS)), conditions=[NOTHING]))
    rounded = numbers(measure(base, conditions=[NOTHING]))
    difference = max(abs(rounded[key][1] - exact[key][1]) for key in exact if len(key) == 4)
    assert 0 < difference < 0.1


def test_losses_alone_need_no_backward_pass() -> None:
    base = base_of(float64_model())
    losses = {k: v for k, v in numbers(measure(base)).items() if len(k) == 2}
    same(numbers(measure(base, layers=[])), losses, 1e-12)


def test_progress_counts_rows_times_conditions() -> None:
    seen: list[tuple[int, int]] = []
    measure(tiny_base(num_layers=NUM_LAYERS), batch_tokens=200, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert len(seen) > 2
    assert seen[-1] == (28, 28)


def test_faults_are_said() -> None:
    base = tiny_base(num_layers=NUM_LAYERS)
    with pytest.raises(ValueError, match="'z' is zero at layer 3"):
        measure(base, vectors={"z": torch.zeros(5, 32)}, layers=[3])
    with pytest.raises(ValueError, match="different names"):
        measure(base, conditions=[NOTHING, Condition()])
    with pytest.raises(DataError, match="beyond max_length"):
        measure(base, max_length=8)
    with pytest.raises(ValueError, match="layer 9"):
        measure(base, vectors={}, layers=[9])
