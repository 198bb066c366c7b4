"""Settings and small things that many tests share. Nothing here or below reaches a network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)  # sums are taken in one order: tests may ask for equality to the bit


@pytest.fixture
def random_ids() -> torch.Tensor:
    """[4, 9] token ids without special tokens, the same every time."""
    return torch.randint(3, 300, (4, 9), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def without_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are put together but not made into files, which takes most of a report's time."""
    from analysis import panels  # brings matplotlib
    from analysis.figure_style import Drawn

    monkeypatch.setattr(panels, "drawn", lambda _: Drawn(b"", b""))
