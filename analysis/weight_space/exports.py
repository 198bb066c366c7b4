"""A direction as a file: whole tensors that are added to weights, or an adapter that PEFT loads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from analysis.weight_space.delta import LowRank
from analysis.weight_space.directions import factors
from trainables.errors import DataError
from trainables.model_parts import causal_lm

MAX_LOSS = 1e-5
"""Share of a matrix's norm that an adapter may leave out: rounding to float32, and no more."""


def save_delta(
    file: Path, changes: Iterable[tuple[str, torch.Tensor]], alpha: float, metadata: Mapping[str, str]
) -> None:
    """Write alpha V as one safetensors file: a tensor of the parameter's shape by the parameter's name. Adding each to
    the parameter of its name is the edit. ``metadata`` goes into the file's head."""
    tensors = {name: (values.double() * alpha).to(values.dtype).contiguous() for name, values in changes}
    save_file(tensors, file, metadata={"format": "pt", "alpha": repr(alpha), **metadata})


def low_rank_changes(
    model: nn.Module, changes: Iterable[tuple[str, torch.Tensor]], alpha: float, rank: int
) -> dict[str, LowRank]:
    """alpha V as factors of this rank by name of the parameter.

    Raises DataError if V is more than that: a matrix of a higher rank, or a parameter that is not the weight of a
    linear module, which an adapter cannot change.
    """
    found = {}
    for name, values in changes:
        module = causal_lm(model).get_submodule(name.rpartition(".")[0])
        if not isinstance(module, nn.Linear) or not name.endswith(".weight"):
            raise DataError(
                f"{name} is not the weight of a linear module, and an adapter changes these alone; "
                "restrict the direction by its modules, or save whole tensors"
            )
        low = factors(values, rank)
        left = float((values.double() - low.values()).norm() / values.double().norm())
        if left > MAX_LOSS:
            raise DataError(
                f"{name}: at rank {rank} {left:.2%} of the direction would be lost; give it this rank first"
            )
        found[name] = LowRank(low.up_or * alpha, low.down_ri)
    return found


def together(first: Mapping[str, LowRank], second: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The sum of two low-rank changes, such as a finetuning's Delta and an edit of the finetuned model."""
    names = dict.fromkeys((*first, *second))
    return {name: _sum([part[name] for part in (first, second) if name in part]) for name in names}


def _sum(parts: list[LowRank]) -> LowRank:
    up = torch.cat([part.up_or.double() for part in parts], dim=1)
    return LowRank(up, torch.cat([part.down_ri.double() for part in parts], dim=0))


def save_adapter(folder: Path, changes: Mapping[str, LowRank], base_name: str) -> None:
    """Write low-rank changes into the new folder ``folder`` as a LoRA adapter of the base ``base_name``:
    ``PeftModel.from_pretrained`` reads it, and its B A are the changes themselves (the scale is 1).

    Ranks are filled up with zeros to the greatest. Raises DataError if there is no change.
    """
    if not changes:
        raise DataError("the direction is zero, so there is nothing to write")
    rank = max(low.up_or.shape[1] for low in changes.values())
    tensors = {}
    for name, low in changes.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        fill = rank - low.up_or.shape[1]
        tensors[f"{module}.lora_A.weight"] = nn.functional.pad(low.down_ri, (0, 0, 0, fill)).float().contiguous()
        tensors[f"{module}.lora_B.weight"] = nn.functional.pad(low.up_or, (0, fill)).float().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(name.removesuffix(".weight") for name in changes),
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
