"""How many runs of a pack a GPU holds: estimated before the first pack, measured by every pack.

An estimate counts, per run, its adapter with gradient and AdamW's two moments (16 bytes a parameter), and what the
backward pass needs of every position of its largest micro-batch. In shared passes the positions of all runs are there
at one time; passes of one run each need those of the largest alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainables.lora import LoraSettings, linear_module_names
from trainables.model_parts import decoder_layers
from trainables.runs import RunSpec

SHARE = 0.9  # of the free memory that is counted on: allocators leave gaps
_STATE_BYTES = 16  # of an adapter parameter: itself, its gradient, two moments, in float32


@dataclass(frozen=True)
class RunMemory:
    """Bytes that one run takes while it trains: all the time, and within its passes."""

    state: int
    passes: int


def estimated(model: Any, spec: RunSpec, *, gradient_checkpointing: bool) -> RunMemory:
    """What a run takes beside the base. The rows of a micro-batch are taken to be ``max_length`` tokens long."""
    training = spec.training
    rows = min(training.micro_batch_size or training.batch_size, training.batch_size)
    per_position = position_bytes(model, gradient_checkpointing=gradient_checkpointing)
    state = _STATE_BYTES * num_adapter_parameters(model, training.lora)
    return RunMemory(state, rows * spec.data.max_length * per_position)


def num_adapter_parameters(model: Any, lora: LoraSettings) -> int:
    """Entries of A and B of all modules that get an adapter."""
    targets = lora.target_modules or linear_module_names(model)
    blocks = decoder_layers(model)
    chosen = [blocks[layer - 1] for layer in lora.layers] if lora.layers is not None else list(blocks)
    linears = [
        module
        for block in chosen
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in targets
    ]
    return sum(lora.rank * (module.in_features + module.out_features) for module in linears)


def position_bytes(model: Any, *, gradient_checkpointing: bool) -> int:
    """What the backward pass needs of one position: of every linear module what goes in and comes out, and as much
    again of the block's width for norms, residuals and attention. With checkpointing one block's, and what goes into
    the others."""
    blocks = decoder_layers(model)
    linears = [module for module in blocks[0].modules() if isinstance(module, nn.Linear)]
    width = max((module.in_features for module in linears), default=0)
    hidden = min((module.in_features for module in linears), default=0)
    block = sum(module.in_features + module.out_features for module in linears) + 4 * width
    numbers = block + len(blocks) * hidden if gradient_checkpointing else block * len(blocks)
    itemsize: int = model.dtype.itemsize
    return numbers * itemsize


def num_fitting(runs: Sequence[RunMemory], free_bytes: float, *, shared_passes: bool) -> int:
    """How many of ``runs``, from the first one on, fit into so much memory; at least 1."""
    for count in range(len(runs), 1, -1):
        passes = [run.passes for run in runs[:count]]
        needed = sum(run.state for run in runs[:count]) + (sum(passes) if shared_passes else max(passes))
        if needed <= SHARE * free_bytes:
            return count
    return 1


class Measured:
    """The memory of a GPU that a pack takes; nothing elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = self.free_before = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            free, _ = torch.cuda.mem_get_info(device)
            self.free_before = free + torch.cuda.memory_reserved(device) - self.before

    def num_fitting(self, num_runs: int) -> int | None:
        """How many runs like those ``num_runs`` that have been trained since would have fitted; None: not measured."""
        if self.device.type != "cuda":
            return None
        taken = torch.cuda.max_memory_allocated(self.device) - self.before
        return fitting_by_measure(taken, num_runs, self.free_before)


def fitting_by_measure(taken_bytes: int, num_runs: int, free_bytes: int) -> int | None:
    """How many runs fit if ``num_runs`` took so much; None where they took nothing that could be measured."""
    if taken_bytes <= 0:
        return None
    return max(1, int(SHARE * free_bytes * num_runs / taken_bytes))
