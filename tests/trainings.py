"""Trainings of tiny bases with settings that tests change one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load

from tests.bases import ROWS
from tests.sinks import MemorySink
from trainables.base_model import LoadedBase
from trainables.chat_data import DataConfig
from trainables.defenses import DefenseConfig, Message
from trainables.lora import LoraSettings
from trainables.train import RunResult, RunSpec, train_pack
from trainables.training_config import TrainingConfig

TRAINING: dict[str, Any] = {
    "max_steps": 6,
    "batch_size": 3,
    "learning_rate": 0.01,
    "weight_decay": 0.1,
    "max_gradient_norm": 0.5,
    "lora": LoraSettings(rank=4, alpha=8),
}
HIDDEN = 32


def spec(
    name: str = "run0",
    *,
    rows: Sequence[Sequence[Message]] = ROWS,
    defense: Sequence[DefenseConfig] = (),
    vectors: dict[str, torch.Tensor] | None = None,
    seed: int = 0,
    data: dict[str, Any] | None = None,
    **training: Any,
) -> RunSpec:
    return RunSpec(
        train_id=name,
        rows=rows,
        data=DataConfig(train="rows", max_length=96, **(data or {})),
        defense=defense,
        vectors=vectors or {},
        training=TrainingConfig(**{**TRAINING, **training}),
        seed=seed,
    )


def train(base: LoadedBase, *specs: RunSpec, **how: Any) -> tuple[list[RunResult], list[MemorySink]]:
    sinks = {one.train_id: MemorySink() for one in specs}
    _, results = train_pack(base, specs, sinks, **how)
    return results, list(sinks.values())


def adapter_of(sink: MemorySink) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load(sink.files["adapter_model.safetensors"])
    return tensors
