"""Sums of gradients in a store's files, read one parameter at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from analysis.weight_space.pile_gradients import GradientSum, MeanGradient
from trainables.errors import StoreError


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file by name; each is read when it is asked for. In the order of their names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, "pt") as file:
            self._names = tuple(file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self.path, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def sum_to_bytes(part: GradientSum) -> bytes:
    """One shard of a pile as a safetensors file. Of a shard without answers no tensor is kept."""
    counts = {"num_rows": str(part.num_rows), "num_tokens": str(part.num_tokens), "loss_sum": repr(part.loss_sum)}
    tensors = {name: value.contiguous() for name, value in part.sums.items()} if part.num_rows else {}
    content: bytes = save(tensors, metadata={"format": "pt", **counts})
    return content


def read_sum(path: Path) -> GradientSum:
    """The shard in this file; its tensors stay on disk until they are asked for. Raises StoreError for another file."""
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
        return GradientSum(
            StoredTensors(path), int(facts["num_rows"]), int(facts["num_tokens"]), float(facts["loss_sum"])
        )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        message = f"{path}: no sum of gradients ({error}); remove it and run the sweep again"
        raise StoreError(message) from error


def read_pile(paths: Sequence[Path]) -> MeanGradient:
    """The mean gradient of a pile of which these files hold the shards."""
    return MeanGradient([read_sum(path) for path in paths])
