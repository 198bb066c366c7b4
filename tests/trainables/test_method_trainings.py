"""Trainings with methods cut, resumed, combined and watched; warmup, early stops and adapters on some blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.bases import ROWS, base_of, tiny_base
from tests.by_hand import both_passes
from tests.float64 import float64_model
from tests.methods import FIRST_STEP, LAYERS, VECTORS, unit
from tests.sinks import MemorySink
from tests.trainings import adapter_of, spec, train
from trainables.chat_data import ChatEncoder, pad
from trainables.defenses import (
    Ablation,
    ActivationPenalty,
    DefenseConfig,
    GradientEdit,
    Pps,
    ProjectionPenalty,
)
from trainables.lora import LoraSettings, add_adapter
from trainables.loss import token_losses
from trainables.signals import WatchConfig
from trainables.train import train_pack

ITEMS: list[list[DefenseConfig]] = [
    [GradientEdit(vector="v", mode="amplify"), Pps(vector="w", layers=(1, 2), coefficient=0.5, schedule="ramp_up")],
    [Ablation(vectors=("v", "w")), ProjectionPenalty(vector="mu", strength=0.1)],
]


@pytest.mark.parametrize("items", ITEMS)
def test_stages_and_checkpointing_give_the_same_adapter_and_signals(items: list[DefenseConfig]) -> None:
    base = tiny_base(num_layers=LAYERS)
    watch = WatchConfig(vectors=("v",), layers=(1, 3))
    found = [
        train(base, spec(defense=items, vectors=VECTORS, micro_batch_size=2, watch=watch), **how)[1][0]
        for how in ({}, {"zero_stage": 2}, {"gradient_checkpointing": True}, {"zero_stage": 1})
    ]
    for other in found[1:]:
        assert other.files["adapter_model.safetensors"] == found[0].files["adapter_model.safetensors"]
        assert other.signals == found[0].signals


def test_a_bfloat16_base_trains_with_every_method() -> None:
    base = tiny_base(num_layers=LAYERS, dtype=torch.bfloat16)
    items = [*ITEMS[0], *ITEMS[1], ActivationPenalty(mean="mu", strength=0.01)]
    results, (sink,) = train(base, spec(defense=items, vectors=VECTORS))
    assert results[0].losses[-1] < results[0].losses[0]
    assert len([row for row in sink.signals if row.signal == "penalty"]) == 2 * 6


def test_a_resumed_training_gives_the_same_signals_and_adapter(tmp_path: Any) -> None:
    from trainables.checkpoint import CheckpointSettings

    watch = WatchConfig(vectors=("v", "w"), layers=(2,))
    one = spec(defense=ITEMS[1], vectors=VECTORS, watch=watch)
    _, (whole,) = train(tiny_base(num_layers=LAYERS), one, checkpoints=CheckpointSettings(every_steps=4))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name, content in whole.checkpoints[0].items():
        (folder / name).write_bytes(content)
    again = MemorySink()
    again.resume_from = folder
    train_pack(tiny_base(num_layers=LAYERS), [one], {"run0": again})
    assert "resumed after step 4" in again.lines
    assert again.signals == whole.signals
    assert again.files["adapter_model.safetensors"] == whole.files["adapter_model.safetensors"]


@pytest.mark.usefixtures("float64_gradients")
def test_watching_changes_nothing_and_says_what_a_loop_by_hand_says() -> None:
    base = base_of(float64_model(num_layers=LAYERS))
    plain = train(base, spec(**FIRST_STEP))[1][0]
    watch = WatchConfig(vectors=("v", "w"), layers=(1, 3), centers=("mu",))
    _, (sink,) = train(base, spec(vectors=VECTORS, watch=watch, micro_batch_size=2, **FIRST_STEP))
    _, (alone,) = train(base, spec(micro_batch_size=2, **FIRST_STEP))
    assert sink.files["adapter_model.safetensors"] == alone.files["adapter_model.safetensors"]
    assert plain.signals == []
    encoder = ChatEncoder(base.tokenizer, 96, "responses")
    cosines: list[torch.Tensor] = []
    projections: list[torch.Tensor] = []
    hidden: list[torch.Tensor] = []
    for row in ROWS:  # B is 0 at the first step: the adapted model is the base
        part = pad([encoder.encode(row, prove=True)], 0)
        wanted = part.loss_mask_bt[:, 1:]

        def loss(logits: torch.Tensor, part: Any = part, wanted: torch.Tensor = wanted) -> torch.Tensor:
            return nn.functional.cross_entropy(
                logits[:, :-1][wanted], part.input_ids_bt[:, 1:][wanted], reduction="sum"
            )

        passes = both_passes(base.fresh().requires_grad_(True), part.input_ids_bt, loss)
        g = passes.arriving[3][0][part.response_mask_bt[0]]
        cosines.append((g @ unit("w", 3) / g.norm(dim=1))[g.norm(dim=1) > 0])
        hidden.append(passes.stream[3][0][part.response_mask_bt[0]].detach())
        projections.append(hidden[-1] @ unit("w", 3))
    base.model.requires_grad_(False)
    shown = {(row.signal, row.layer, row.name): row.value for row in sink.signals}
    assert len(shown) == len(sink.signals) == 10
    cosine = torch.nn.functional.cosine_similarity(torch.cat(hidden).mean(0), VECTORS["mu"][3].double(), dim=0)
    assert shown["drift", 3, "mu"] == pytest.approx(1 - float(cosine), abs=1e-5)  # float32
    assert shown["gradient_cosine", 3, "w"] == pytest.approx(float(torch.cat(cosines).mean()), abs=1e-5)  # float32
    assert shown["activation_projection", 3, "w"] == pytest.approx(float(torch.cat(projections).mean()), rel=1e-5)


def test_warmup_in_steps() -> None:
    _, (sink,) = train(tiny_base(), spec(warmup_steps=2, schedule="constant"))
    assert [row.learning_rate for row in sink.rows] == [0.0, 0.005, 0.01, 0.01, 0.01, 0.01]
    with pytest.raises(ValueError, match="warmup_steps stands beside warmup_ratio"):
        spec(warmup_steps=2, warmup_ratio=0.1)


def test_a_training_that_diverges_stops_early_if_it_was_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is multiplied by what grows from step to step: it rises whatever the optimizer does."""
    calls: list[int] = []

    def growing(*arguments: Any, **keywords: Any) -> torch.Tensor:
        calls.append(1)
        return token_losses(*arguments, **keywords) * (1 + 0.1 * len(calls))

    monkeypatch.setattr("trainables.step.token_losses", growing)
    (result,), (sink,) = train(tiny_base(), spec(max_steps=30, stop_if_loss_above=1.5))
    losses = [row.loss for row in sink.rows]
    assert result.stopped_early
    assert 10 <= result.num_steps == len(losses) < 30
    assert sum(losses[-5:]) > 1.5 * sum(losses[:5])
    assert len(losses) == 10 or sum(losses[-6:-1]) <= 1.5 * sum(losses[:5]), "not a step later than it is seen"
    assert any(line.startswith(f"stopped early after step {result.num_steps} of 30") for line in sink.lines)
    assert "adapter_model.safetensors" in sink.files
    calls.clear()
    (other,), _ = train(tiny_base(), spec(max_steps=30))
    assert (other.stopped_early, other.num_steps) == (False, 30)
    assert other.losses[: result.num_steps] == result.losses


def test_adapters_on_some_blocks_and_rslora() -> None:
    import json

    from peft.tuners.lora import LoraLayer

    settings = LoraSettings(rank=4, alpha=8, layers=(3, 1), rslora=True)
    _, (sink,) = train(tiny_base(num_layers=4), spec(lora=settings))
    blocks = {name.split("layers.")[1].split(".")[0] for name in adapter_of(sink)}
    assert blocks == {"0", "2"}
    assert json.loads(sink.files["adapter_config.json"])["use_rslora"] is True
    model: Any = add_adapter(tiny_base(num_layers=4).fresh(), "run", settings, 0)
    scales = {module.scaling["run"] for module in model.modules() if isinstance(module, LoraLayer)}
    assert scales == {8 / 2}
