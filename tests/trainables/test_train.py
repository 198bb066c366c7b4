"""A training against a plain loop of PyTorch, PEFT and torch.optim.AdamW, and against itself done in other ways.

Tolerances. In float64 both sides differ by rounding near 1e-14, which AdamW may enlarge where a gradient is nearly
zero: 1e-10 is asked. In float32 with the model's own logits both sides do the same operations, if the loop has
our modules for adapters, norms and rotary embeddings (proved against PEFT's and transformers' own elsewhere, and here
in float64) and no attention mask (padding stands on the right; with a mask the same sums are taken in another order):
equality to the bit.
In float32 with our chunked loss the two cross-entropies round differently (1e-7 relative): 1e-6 relative on losses.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.bases import base_of, tiny_base
from tests.float64 import float64_model
from tests.plain_loop import assert_same_training, plain_loop
from tests.tiny import ModelKind
from tests.trainings import HIDDEN, adapter_of, spec, train
from trainables.defenses import Pps
from trainables.lora import LoraSettings
from trainables.train import RunSpec


@pytest.mark.usefixtures("float64_gradients")
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox"])
@pytest.mark.parametrize(
    "training",
    [
        {"schedule": "linear"},
        {"schedule": "cosine", "warmup_ratio": 0.34},
        {"schedule": "linear", "warmup_ratio": 0.5, "weight_decay": 0.0, "max_gradient_norm": None},
    ],
)
def test_equals_a_plain_loop_in_float64(kind: ModelKind, training: dict[str, Any]) -> None:
    base = base_of(float64_model(kind, num_layers=2))
    one = spec(**training)
    _, (sink,) = train(base, one)
    reference = plain_loop(base, one, lora_dtype=torch.float64)
    assert_same_training(sink, reference, relative=1e-10, adapter=1e-10)
    if one.training.max_gradient_norm is not None:
        assert max(reference[1]) > one.training.max_gradient_norm, "clipping must act"


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_equals_a_plain_loop_in_float32_to_the_bit(schedule: str, zero_stage: int) -> None:
    base = tiny_base(plain_head=False)
    one = spec(schedule=schedule, warmup_ratio=0.2)
    _, (sink,) = train(base, one, zero_stage=zero_stage)
    assert_same_training(sink, plain_loop(base, one, lora_dtype=torch.float32, as_ours=True), relative=0.0, adapter=0.0)


def test_equals_a_plain_loop_in_float32_with_the_chunked_loss() -> None:
    base = tiny_base()
    one = spec()
    _, (sink,) = train(base, one)
    losses, norms, _ = plain_loop(base, one, lora_dtype=torch.float32)
    assert [row.loss for row in sink.rows] == pytest.approx(losses, rel=1e-6)
    assert [row.gradient_norm for row in sink.rows] == pytest.approx(norms, rel=1e-5)


@pytest.mark.usefixtures("float64_gradients")
def test_preventative_steering_equals_a_plain_loop_that_adds_the_vector() -> None:
    base = base_of(float64_model(num_layers=3))
    vector = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(1))
    one = spec(defense=[Pps(vector="v", layer=2, coefficient=1.5)], vectors={"v": vector})
    _, (sink,) = train(base, one)
    shift = (1.5 * vector[2]).double()
    assert_same_training(
        sink, plain_loop(base, one, shift=(2, shift), lora_dtype=torch.float64), relative=1e-10, adapter=1e-10
    )
    undefended, _ = train(base, spec())
    assert abs(sink.rows[0].loss - undefended[0].losses[0]) > 1e-3


@pytest.mark.usefixtures("float64_gradients")
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_accumulation_changes_nothing(micro_batch_size: int) -> None:
    """float64: micro-batches are padded to other lengths and summed in another order, which is rounding alone.

    Stage 0, because stages 1 and 2 keep float32 copies; that they equal stage 0 with accumulation is shown below.
    """
    base = base_of(float64_model(num_layers=2))
    (whole,), (whole_sink,) = train(base, spec())
    (cut,), (cut_sink,) = train(base, spec(micro_batch_size=micro_batch_size))
    assert cut.losses == pytest.approx(whole.losses, rel=1e-10)
    assert (cut.num_tokens, cut.num_loss_tokens) == (whole.num_tokens, whole.num_loss_tokens)
    for name, values in adapter_of(whole_sink).items():
        torch.testing.assert_close(adapter_of(cut_sink)[name], values, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stages_give_the_same_adapter(dtype: torch.dtype) -> None:
    """To the bit for one worker, with accumulation and clipping; a bfloat16 base keeps its float32 adapters."""
    base = tiny_base(dtype=dtype)
    files = []
    for zero_stage in (0, 1, 2):
        _, (sink,) = train(base, spec(micro_batch_size=2, max_steps=5), zero_stage=zero_stage)
        assert {values.dtype for values in adapter_of(sink).values()} == {torch.float32}
        files.append((sink.files["adapter_model.safetensors"], [row.gradient_norm for row in sink.rows]))
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_clipping_acts(zero_stage: int) -> None:
    """AdamW hides the size of a first gradient; later steps mix gradients that were clipped by different factors."""
    base = tiny_base(plain_head=False)
    adapters = []
    for limit in (0.05, None):
        one = spec(max_gradient_norm=limit, max_steps=4)
        _, (sink,) = train(base, one, zero_stage=zero_stage)
        assert_same_training(
            sink, plain_loop(base, one, lora_dtype=torch.float32, as_ours=True), relative=0.0, adapter=0.0
        )
        adapters.append(adapter_of(sink))
    assert any(not torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_same_config_twice_gives_the_same_adapter_file() -> None:
    torch.manual_seed(1)
    _, (first,) = train(tiny_base(), spec(lora=LoraSettings(rank=4, dropout=0.2)))
    torch.manual_seed(2)
    _, (second,) = train(tiny_base(), spec(lora=LoraSettings(rank=4, dropout=0.2)))
    assert first.files == second.files
    _, (other,) = train(tiny_base(), spec(seed=1, lora=LoraSettings(rank=4, dropout=0.2)))
    assert other.files["adapter_model.safetensors"] != first.files["adapter_model.safetensors"]
    _, (without,) = train(tiny_base(), spec(lora=LoraSettings(rank=4)))
    assert without.files["adapter_model.safetensors"] != first.files["adapter_model.safetensors"]


def test_dropout_inside_the_base_stays_off() -> None:
    """It would draw from a global generator: the same config would not give the same adapter."""
    from transformers import AutoModelForCausalLM

    config = tiny_base("gpt_neox").model.config.__class__(
        **{**tiny_base("gpt_neox").model.config.to_dict(), "hidden_dropout": 0.5, "attention_dropout": 0.5}
    )
    results = []
    for seed in (1, 2):
        torch.manual_seed(0)
        base = base_of(AutoModelForCausalLM.from_config(config))
        torch.manual_seed(seed)
        (result,), _ = train(base, spec(max_steps=2), gradient_checkpointing=seed == 2)
        results.append(result.losses)
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_gradient_checkpointing_changes_nothing(
    kind: ModelKind, zero_stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(kind)
    vector = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))
    one = spec(
        defense=[Pps(vector="v", layer=1, coefficient=1.0)],
        vectors={"v": vector},
        lora=LoraSettings(rank=4, dropout=0.3),
    )
    _, (plain,) = train(base, one)
    real, calls = torch.utils.checkpoint.checkpoint, []

    def spy(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        return real(*arguments, **keywords)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", spy)
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", spy)
    _, (checkpointed,) = train(base, one, gradient_checkpointing=True, zero_stage=zero_stage)
    assert len(calls) == 2 * 6, "two blocks in six steps"
    assert plain.files["adapter_model.safetensors"] == checkpointed.files["adapter_model.safetensors"]


def pack() -> list[RunSpec]:
    """Runs that differ in everything that may differ: seed, defense, rank, modules, rate, schedule, length."""
    vector = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))
    return [
        spec("run0", max_steps=6),
        spec(
            "run1",
            seed=1,
            defense=[Pps(vector="v", layer=1, coefficient=1.0)],
            vectors={"v": vector},
            max_steps=4,
            batch_size=2,
            learning_rate=0.003,
            schedule="constant",  # a rate that does not fall to zero by itself: the run must be stopped at its end
            max_gradient_norm=0.2,
            lora=LoraSettings(rank=2, dropout=0.1, target_modules=("q_proj", "down_proj")),
        ),
        spec("run2", seed=1, max_steps=6, micro_batch_size=1, weight_decay=0.0, max_gradient_norm=None),
    ]


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_a_pack_gives_every_run_what_it_gets_alone(zero_stage: int) -> None:
    """To the bit: each micro-batch is one run's own, and every sum is taken in the same order on one thread."""
    base = tiny_base()
    results, sinks = train(base, *pack(), zero_stage=zero_stage)
    for one, result, sink in zip(pack(), results, sinks, strict=True):
        (alone,), (alone_sink,) = train(base, one)
        assert result.losses == alone.losses
        assert [row.gradient_norm for row in sink.rows] == [row.gradient_norm for row in alone_sink.rows]
        assert sink.files == alone_sink.files
        assert len(sink.rows) == one.training.max_steps


def test_training_leaves_the_base_as_it_was() -> None:
    base = tiny_base()
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    modules = [name for name, _ in base.model.named_modules()]
    train(base, spec())
    assert all(torch.equal(before[name], tensor) for name, tensor in base.model.state_dict().items())
    assert [name for name, _ in base.model.named_modules()] == modules
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in base.model.modules())
