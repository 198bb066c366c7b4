"""Packs: each run gets what it gets alone.

``exact``: equal to the bit on one thread, for runs that differ in everything that may differ. ``fast``: the gradients
of a step, at equal weights, are those of the run alone computed by PEFT's and transformers' own modules, in a loop
written here. In float64 both sides differ by rounding near 1e-14: 1e-10 is asked, relative to the largest entry of the
gradient. In float32 sums over up to 100 terms of like size, taken in another order, differ by 1e-6 of the largest; 1e-5
is asked. bfloat16 rounds at 2^-8 = 4e-3, in every module and in both passes: 5e-2 of the gradient's norm is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer

from tests.bases import ROWS, base_of, chat, tiny_base
from tests.float64 import float64_model
from tests.trainings import HIDDEN, adapter_of, spec, train
from trainables.base_model import LoadedBase
from trainables.chat_data import Encoded, cut, pad
from trainables.defenses import ActivationPenalty, GradientEdit, GradientPenalty, Inoculation, Pps, RunRows
from trainables.errors import ConfigError, DataError, ShiftgradError, TrainingError
from trainables.lora import LoraSettings, adapter_parameters, add_adapter, set_dropout_key
from trainables.lora_linear import use_lora_linear
from trainables.packed_lora import PackRows, can_be_packed, packed
from trainables.residual_stream import residual_stream
from trainables.runs import Run
from trainables.signals import WatchConfig
from trainables.step import StepLosses, backward_passes
from trainables.train import RunSpec

LAYERS = 2
VECTORS = {
    name: torch.randn(LAYERS + 1, HIDDEN, generator=torch.Generator().manual_seed(number))
    for number, name in enumerate(("v", "w"))
}
LONG = [*ROWS, chat("And then?", "Then it rained for a week, and nobody went out of the house before it was over.")]


def different() -> list[RunSpec]:
    """Runs that differ in defense, rank, modules, rate, schedule, length, data, dropout, seed and micro-batches."""
    return [
        spec("plain"),
        spec(
            "steered",
            rows=LONG,
            seed=1,
            defense=[Pps(vector="v", layer=1, coefficient=1.0)],
            vectors=VECTORS,
            max_steps=4,
            batch_size=2,
            learning_rate=0.003,
            schedule="constant",  # a rate that does not fall to zero by itself: the run must be stopped at its end
            max_gradient_norm=0.2,
            lora=LoraSettings(rank=2, dropout=0.3, target_modules=("q_proj", "down_proj")),
        ),
        spec(
            "prompted",
            seed=1,
            defense=[Inoculation(prompts=("Be odd.", "Be very odd.", "Say it.")), *edit()],
            vectors=VECTORS,
            micro_batch_size=1,
            weight_decay=0.0,
            max_gradient_norm=None,
            watch=WatchConfig(vectors=("w",), layers=(1, 2)),
        ),
        spec(
            "penalised",
            rows=LONG[2:],
            seed=2,
            defense=[ActivationPenalty(mean="w", strength=0.01, positions="response")],
            vectors=VECTORS,
            max_steps=5,
            pad_to_multiple_of=1,
            lora=LoraSettings(rank=4, alpha=5, layers=(2,), rslora=True),
            schedule="cosine",
            warmup_steps=2,
        ),
        spec("dropped", seed=3, max_steps=3, lora=LoraSettings(rank=4, dropout=0.2)),
    ]


def edit() -> list[GradientEdit]:
    return [GradientEdit(vector="v", layers=(1,), mode="attenuate")]


def test_exact_packs_give_every_run_what_it_gets_alone_to_the_bit() -> None:
    base = tiny_base()
    ended: list[str] = []
    results, sinks = train(base, *different(), on_done=lambda run: ended.append(run.train_id))
    for one, result, sink in zip(different(), results, sinks, strict=True):
        (alone,), (alone_sink,) = train(base, one)
        assert result.losses == alone.losses
        assert [row.gradient_norm for row in sink.rows] == [row.gradient_norm for row in alone_sink.rows]
        assert sink.signals == alone_sink.signals
        assert sink.files == alone_sink.files
    assert ended == ["dropped", "steered", "penalised", "plain", "prompted"], "each as soon as it is done"
    assert "in a pack of 5 runs, exact" in sinks[0].lines[0]


def reference_gradients(base: LoadedBase, adapter: Any, run: Run, batch: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """The gradient of a run's step by PEFT's own modules, its rows alone, micro-batch by micro-batch.

    ``adapter``: its parameters by their names in a model that has this adapter alone.
    """
    training = run.spec.training
    model = add_adapter(base.fresh(), run.name, training.lora, run.spec.seed)
    own = adapter_parameters(model, run.name)
    for name, values in adapter.items():
        own[name].data.copy_(values)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for dropout in module.lora_dropout.values():
                dropout.train()
    this = run.this_step()
    parts = [
        pad(rows, 0, training.pad_to_multiple_of)
        for rows in cut(batch, training.micro_batch_size or training.batch_size)
    ]
    rows_of = [
        RunRows(torch.arange(len(p.input_ids_bt)), p.attention_mask_bt, p.response_mask_bt, this.step, this.num_steps)
        for p in parts
    ]
    predicted = sum(int(part.loss_mask_bt[:, 1:].sum()) for part in parts)
    responses = sum(int(part.response_mask_bt.sum()) for part in parts)
    for index, (part, rows) in enumerate(zip(parts, rows_of, strict=True)):
        if training.lora.dropout > 0:
            set_dropout_key(model, run.name, (run.spec.seed, this.step - 1, index))
        edits = [one for mechanism in this.mechanisms for one in mechanism.interventions(rows)]
        blocks: Any = model.get_base_model().model.layers
        seen: dict[int, torch.Tensor] = {}
        handles = [
            block.register_forward_hook(lambda *got, layer=layer, seen=seen: seen.__setitem__(layer, got[2]))
            for layer, block in enumerate(blocks, start=1)
        ]
        with residual_stream(model, edits):
            logits = model(input_ids=part.input_ids_bt, attention_mask=part.attention_mask_bt.long()).logits
            wanted = part.loss_mask_bt[:, 1:]
            loss = F.cross_entropy(logits[:, :-1][wanted], part.input_ids_bt[:, 1:][wanted], reduction="sum")
            loss = loss / predicted
            for item in run.spec.defense:
                if isinstance(item, ActivationPenalty):
                    for layer in (1,):  # all but the last of two
                        away = seen[layer] - VECTORS["w"][layer].to(seen[layer].dtype)
                        squared = away.square().sum(-1)[part.response_mask_bt]
                        loss = loss + item.strength / responses * squared.sum()
            loss.backward()
        for handle in handles:
            handle.remove()
    return {name: parameter.grad for name, parameter in own.items() if parameter.grad is not None}


class PlainBackward:
    """Stands in for the optimizer driver: gradients stay in the parameters."""

    def __init__(self) -> None:
        self.passes = 0

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        del last
        self.passes += 1
        loss.backward()


def packed_model(base: LoadedBase, runs: Sequence[Run]) -> Any:
    """A model with the adapters of ``runs``, which all act already; every one asks for gradients."""
    model: Any = base.fresh()
    for run in runs:
        model = add_adapter(model, run.name, run.spec.training.lora, run.spec.seed)
    use_lora_linear(model)
    for number, run in enumerate(runs):
        draw = torch.Generator().manual_seed(number)
        for parameter in adapter_parameters(model, run.name).values():
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
            parameter.requires_grad_(True)
        for module in model.modules():
            if isinstance(module, LoraLayer) and run.name in module.lora_dropout:
                module.lora_dropout[run.name].train()
    return model


def passes(
    base: LoadedBase, specs: Sequence[RunSpec]
) -> tuple[Any, list[Run], list[list[Encoded]], dict[str, StepLosses], PlainBackward]:
    """The first step of all runs in passes that they share."""
    runs = [Run.prepared(base, one) for one in specs]
    model = packed_model(base, runs)
    batches = [run.next_batch() for run in runs]
    driver = PlainBackward()
    steps = [(run.this_step(), batch) for run, batch in zip(runs, batches, strict=True)]
    return model, runs, batches, backward_passes(base, model, driver, steps, last=True), driver


@pytest.mark.parametrize(
    ("base", "tolerance"),
    [
        (base_of(float64_model("llama", num_layers=LAYERS)), 1e-10),
        (base_of(float64_model("qwen2", num_layers=LAYERS)), 1e-10),
        (base_of(float64_model("llama", num_layers=LAYERS), plain_head=False), 1e-10),
        (tiny_base(num_layers=LAYERS), 1e-5),
    ],
    ids=["llama float64", "qwen2 float64", "own logits", "llama float32"],
)
def test_fast_packs_have_the_gradients_that_peft_gives_each_run_alone(base: LoadedBase, tolerance: float) -> None:
    model, runs, batches, losses, driver = passes(base, different())
    assert can_be_packed(model)
    assert driver.passes == 3, "as many as the most micro-batches of a run, not one per run"
    for run, batch in zip(runs, batches, strict=True):
        own = adapter_parameters(model, run.name)
        expected = reference_gradients(base, {name: one.data for name, one in own.items()}, run, batch)
        assert len(expected) > 3
        assert losses[run.name].failure is None
        for name, parameter in own.items():
            assert parameter.grad is not None
            atol = tolerance * float(expected[name].abs().max())
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0.0, atol=atol)


def test_fast_packs_over_a_bfloat16_base() -> None:
    """Adapters stay float32. Both sides round in bfloat16 at every module; nobody is right, they must be near."""
    base = tiny_base(num_layers=LAYERS, dtype=torch.bfloat16)
    model, runs, batches, _, _ = passes(base, different()[:2])
    for run, batch in zip(runs, batches, strict=True):
        own = adapter_parameters(model, run.name)
        expected = reference_gradients(base, {name: one.data for name, one in own.items()}, run, batch)
        pairs = [(parameter.grad, expected[name]) for name, parameter in own.items()]
        assert all(found is not None and found.dtype == torch.float32 for found, _ in pairs)
        away = sum(float((found - wanted).square().sum()) for found, wanted in pairs if found is not None)
        assert away**0.5 < 5e-2 * sum(float(wanted.square().sum()) for _, wanted in pairs) ** 0.5


def test_fast_packs_train_what_exact_ones_train() -> None:
    """The first step's losses are equal up to rounding; later ones as far as Adam, which divides by the size of a
    gradient, lets rounding grow: 1e-3 of the loss over five steps was 1e-5 where it was measured."""
    base = tiny_base()
    results, sinks = train(base, *different(), packing="fast")
    assert [result.num_steps for result in results] == [6, 4, 6, 5, 3]
    for one, result, sink in zip(different(), results, sinks, strict=True):
        (alone,), (alone_sink,) = train(base, one)
        assert result.losses[0] == pytest.approx(alone.losses[0], rel=1e-6)
        assert result.losses == pytest.approx(alone.losses, rel=1e-3)
        assert [row.learning_rate for row in sink.rows] == [row.learning_rate for row in alone_sink.rows]
        assert [row.num_loss_tokens for row in sink.rows] == [row.num_loss_tokens for row in alone_sink.rows]
        assert [signal.value for signal in sink.signals] == pytest.approx(
            [signal.value for signal in alone_sink.signals], rel=1e-2, abs=1e-4
        )
        assert adapter_of(sink).keys() == adapter_of(alone_sink).keys()
    assert len(sinks[2].signals) > 0
    assert "in a pack of 5 runs, fast" in sinks[0].lines[0]


def test_a_stage_and_checkpointing_change_no_bit_of_a_fast_pack() -> None:
    base = tiny_base()
    _, plain = train(base, *different()[:3], packing="fast")
    _, other = train(base, *different()[:3], packing="fast", zero_stage=2, gradient_checkpointing=True)
    assert [sink.files["adapter_model.safetensors"] for sink in plain] == [
        sink.files["adapter_model.safetensors"] for sink in other
    ]


def bursting(name: str = "bad") -> RunSpec:
    """Its first step throws it so far that its second loss is none."""
    return spec(name, learning_rate=1e30, schedule="constant", max_gradient_norm=None, seed=5)


@pytest.mark.parametrize("packing", ["exact", "fast"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_a_run_that_is_not_finite_is_frozen_and_the_others_go_on(packing: str, zero_stage: int) -> None:
    base = tiny_base()
    failures: dict[str, ShiftgradError] = {}
    others = [spec("first"), spec("last", seed=2, max_steps=5)]
    for order in ([others[0], bursting(), others[1]], [*others, bursting()]):
        results, sinks = train(base, *order, packing=packing, zero_stage=zero_stage, on_failure=failures.__setitem__)
        assert str(failures.pop("bad")).startswith("run bad, step 2: the ")
        assert not failures
        assert [result.train_id for result in results] == ["first", "last"]
        (bad,) = [sink for one, sink in zip(order, sinks, strict=True) if one.train_id == "bad"]
        assert [row.step for row in bad.rows] == [1]
        assert not bad.files, "a failed run has no adapter"
        assert bad.lines[-1].startswith("failed: TrainingError: run bad, step 2")
        for one, sink in zip(order, sinks, strict=True):
            if one.train_id == "bad":
                continue
            (alone,), (alone_sink,) = train(base, one)
            if packing == "exact":
                assert sink.files == alone_sink.files
            else:
                assert [row.loss for row in sink.rows] == pytest.approx(alone.losses, rel=1e-3)


def test_what_is_not_finite_in_one_run_reaches_no_gradient_of_another() -> None:
    base = base_of(float64_model("llama", num_layers=LAYERS))
    specs = different()
    runs = [Run.prepared(base, one) for one in specs]
    model = packed_model(base, runs)
    batches = [run.next_batch() for run in runs]
    for parameter in adapter_parameters(model, "steered").values():
        parameter.data.fill_(float("nan"))
    steps = [(run.this_step(), batch) for run, batch in zip(runs, batches, strict=True)]
    losses = backward_passes(base, model, PlainBackward(), steps, last=True)
    assert "the loss is nan" in str(losses["steered"].failure)
    for run, batch in zip(runs, batches, strict=True):
        if run.name != "steered":
            own = adapter_parameters(model, run.name)
            expected = reference_gradients(base, {name: one.data for name, one in own.items()}, run, batch)
            for name, parameter in own.items():
                assert parameter.grad is not None
                atol = 1e-10 * float(expected[name].abs().max())
                torch.testing.assert_close(parameter.grad, expected[name], rtol=0.0, atol=atol)


def test_a_pack_of_which_nothing_is_left() -> None:
    failures: dict[str, ShiftgradError] = {}
    pushed_out = spec("long", defense=[Inoculation(prompts=("very " * 60,))])
    results, _ = train(tiny_base(), bursting(), pushed_out, packing="fast", on_failure=failures.__setitem__)
    assert results == []
    assert isinstance(failures["bad"], TrainingError)
    assert isinstance(failures["long"], DataError)


def test_runs_that_cannot_share_a_pack() -> None:
    second = spec("second", defense=[GradientPenalty(vector="v", strength=0.1)], vectors=VECTORS)
    with pytest.raises(ValueError, match="second order"):
        train(tiny_base(), spec(), second)
    half = tiny_base(dtype=torch.float16)
    with pytest.raises(ConfigError, match=r"execution\.pack: runs over a float16 base"):
        train(half, spec(), spec("run1", seed=1))


def test_runs_of_second_order_are_passed_one_by_one_in_either_packing() -> None:
    runs = [
        spec(name, seed=seed, defense=[GradientPenalty(vector="v", strength=0.1)], vectors=VECTORS, max_steps=2)
        for seed, name in enumerate(("run0", "run1"))
    ]
    _, sinks = train(tiny_base(), *runs, packing="fast")
    assert "in a pack of 2 runs, exact" in sinks[0].lines[0]
    for one, sink in zip(runs, sinks, strict=True):
        assert sink.files == train(tiny_base(), one)[1][0].files


def test_no_pack_stays_on_a_model(random_ids: torch.Tensor) -> None:
    """Passes of one run are its own again after a shared one, also after an error."""
    base = tiny_base()
    runs = [Run.prepared(base, one) for one in (spec("plain"), spec("other", seed=1))]
    model = packed_model(base, runs)
    model.set_adapter("plain")
    before = model(input_ids=random_ids).logits
    with packed(model, [PackRows("other", 0, 4, 9)]):
        assert not torch.equal(model(input_ids=random_ids).logits, before)
    with packed(model, [PackRows("plain", 0, 3, 9)]), pytest.raises(TrainingError, match=r"execution\.packing: exact"):
        model(input_ids=random_ids)
    assert torch.equal(model(input_ids=random_ids).logits, before)
