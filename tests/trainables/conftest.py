"""Fixtures of tests of trainings."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def float64_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed rounds float64 gradients to float32 on their way between workers, of which there is one here."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.engine import DeepSpeedEngine

    kind = type(get_accelerator())
    monkeypatch.setattr(kind, "supported_dtypes", lambda _: [torch.float32, torch.bfloat16, torch.float64])
    own = property(lambda engine: next(p.dtype for p in engine.module.parameters() if p.requires_grad))
    monkeypatch.setattr(DeepSpeedEngine, "communication_data_type", own)
