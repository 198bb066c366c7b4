"""LoRA adapters: PEFT's modules own the parameters, one named adapter per run of a pack.

Two things are ours so that a run's result depends on its own seed alone: the initial values are a function of (seed,
module), and dropout masks are a function of (seed, step, micro-batch, module) instead of the state of a generator
(which under gradient checkpointing would draw a second mask in the backward pass and give wrong gradients).
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from trainables.config import AddedLater, Config
from trainables.model_parts import causal_lm, decoder_layers
from trainables.randomness import Key, generator

if TYPE_CHECKING:
    from peft import PeftModel


ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""What PEFT calls the file with an adapter's values."""


class LoraSettings(Config):
    """Shape of the adapter (arXiv 2106.09685): W + (alpha / rank) B A on the named linear modules of every block."""

    rank: int = Field(default=16, ge=1)
    """Rank of A and B."""
    alpha: float = Field(default=32.0, gt=0)
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs that are dropped while training."""
    target_modules: tuple[str, ...] | None = None
    """Last names of the linear modules that get an adapter, such as ``[q_proj, v_proj]``. null: all linear modules of
    the decoder blocks."""
    rslora: Annotated[bool, AddedLater()] = False
    """Scale by alpha / sqrt(rank) instead, so that the scale of an update does not fall with the rank
    (arXiv 2312.03732)."""
    layers: Annotated[tuple[Annotated[int, Field(ge=1)], ...] | None, Field(min_length=1), AddedLater()] = None
    """Decoder blocks that get an adapter, as layers: 1 is the first block. null: all."""


class CounterDropout(nn.Module):
    """Dropout whose mask is a function of ``key`` and the module's name; the training loop sets ``key``.

    ``length``: how many tokens the rows [b, t, i] have when their run is alone. Where a pack pads them further, nothing
    of the padding is dropped, and all else is as it is alone.
    """

    def __init__(self, probability: float, name: str) -> None:
        super().__init__()
        self.probability = probability
        self.name = name
        self.key: tuple[Key, ...] = ()
        self.length: int | None = None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not self.training or self.probability == 0:
            return inputs
        assert self.key, "the training loop sets the key before every forward pass"
        draw = generator("dropout", *self.key, self.name, device=inputs.device)
        shape = list(inputs.shape)
        padding = 0 if self.length is None else shape[1] - self.length
        shape[1] -= padding
        kept = torch.rand(shape, generator=draw, device=inputs.device) >= self.probability
        if padding > 0:
            kept = F.pad(kept, (0, 0, 0, padding), value=True)
        return inputs * kept.to(inputs.dtype) / (1 - self.probability)


def linear_module_names(model: nn.Module) -> tuple[str, ...]:
    """Last names of all linear modules in the decoder blocks, sorted (q_proj, v_proj, ...).

    The same with adapters on them: the linear modules inside PEFT's wrappers count as the module that is wrapped.
    """
    from peft.tuners.lora import LoraLayer

    names: set[str] = set()
    inside: tuple[str, ...] = ()
    for name, module in decoder_layers(model).named_modules():  # a module comes before what is inside it
        if isinstance(module, LoraLayer):
            inside = (f"{name}.",)
        if isinstance(module, LoraLayer | nn.Linear) and not name.startswith(inside):
            names.add(_last(name))
    return tuple(sorted(names))


def _unambiguous(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """The last names of modules, or their full names where a module outside of the decoder blocks has such a name too.

    PEFT would put adapters on those as well: on a vision tower, which no text reaches and no gradient comes from.
    """
    blocks = {id(module) for module in decoder_layers(model).modules()}
    named = [(name, module) for name, module in causal_lm(model).named_modules() if _last(name) in targets]
    in_blocks = {_last(name) for name, module in named if id(module) in blocks}
    wanted = [name for name, module in named if id(module) in blocks or _last(name) not in in_blocks]
    return list(targets) if len(wanted) == len(named) else wanted


def _targets(model: nn.Module, targets: Sequence[str], layers: Sequence[int] | None) -> list[str]:
    """What PEFT is given as target modules: names that mean those of the chosen decoder blocks alone."""
    if layers is None:
        return _unambiguous(model, targets)
    blocks = decoder_layers(model)
    beyond = [layer for layer in layers if not 1 <= layer <= len(blocks)]
    if beyond:
        raise ValueError(f"there is no decoder block {beyond[0]}: the model has 1 to {len(blocks)}")
    chosen = {id(module) for layer in layers for module in blocks[layer - 1].modules()}
    return [
        name for name, module in causal_lm(model).named_modules() if id(module) in chosen and _last(name) in targets
    ]


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def add_adapter(model: Any, name: str, settings: LoraSettings, seed: int) -> PeftModel:
    """Give ``model`` (plain or already a PeftModel) one more adapter; A is Kaiming-uniform from ``seed``, B is 0.

    Adapter parameters are float32 whatever the base's dtype is (float64 over a float64 base). Raises ValueError if no
    module has one of the target names.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    targets = settings.target_modules or linear_module_names(model)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type,unused-ignore]
        lora_dropout=settings.dropout,
        target_modules=_targets(model, targets, settings.layers),
        use_rslora=settings.rslora,
        task_type="CAUSAL_LM",
    )
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        peft_model = model
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            peft_model = get_peft_model(model, config, adapter_name=name)
    _initialise(peft_model, name, settings, seed)
    return peft_model


def _initialise(model: nn.Module, name: str, settings: LoraSettings, seed: int) -> None:
    for module_name, module in _lora_modules(model, name):
        weight = module.lora_A[name].weight
        bound = math.sqrt(3.0) * math.sqrt(2.0 / (1 + 5.0)) / math.sqrt(weight.shape[1])  # kaiming_uniform_, a=sqrt 5
        draw = generator("lora_init", seed, module_name)
        values = torch.rand(weight.shape, generator=draw, dtype=torch.float64) * (2 * bound) - bound
        with torch.no_grad():
            weight.copy_(values)
            module.lora_B[name].weight.zero_()
        if settings.dropout > 0:
            module.lora_dropout[name] = CounterDropout(settings.dropout, module_name)


def _lora_modules(model: nn.Module, adapter: str) -> list[tuple[str, Any]]:
    """The modules that have this adapter, by name; another adapter of the model may be on others."""
    from peft.tuners.lora import LoraLayer

    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    ]


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The trainable parameters of one adapter by their full names, in the model's order."""
    return {
        full_name: parameter
        for full_name, parameter in model.named_parameters()
        if f".{name}." in full_name and ("lora_A" in full_name or "lora_B" in full_name)
    }


def set_dropout_key(model: nn.Module, name: str, key: tuple[Key, ...]) -> None:
    """Fix the dropout masks of one adapter for the forward passes (and recomputations) that follow."""
    for _, module in _lora_modules(model, name):
        dropout = module.lora_dropout[name]
        if isinstance(dropout, CounterDropout):
            dropout.key = key


def save_adapter(model: PeftModel, name: str, base_name: str, folder: Path) -> None:
    """Write one adapter in PEFT's format into the new folder ``folder``: PeftModel.from_pretrained reads it alone."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        # save_embedding_layers="auto" would ask the model hub whether the vocabulary has been resized
        model.save_pretrained(scratch, selected_adapters=[name], safe_serialization=True, save_embedding_layers=False)
        inner = Path(scratch) / name if name != "default" else Path(scratch)
        shutil.copytree(inner, folder, ignore=shutil.ignore_patterns("README.md"))
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base_name  # PEFT writes the folder of this machine's cache here
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])  # PEFT writes a set in hash order
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_adapter(model: Any, folder: Path, name: str) -> PeftModel:
    """A fresh base with a saved adapter for sampling and measuring: frozen, evaluation mode."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT calls a name that transformers is giving up
        loaded = PeftModel.from_pretrained(model, str(folder), adapter_name=name, is_trainable=False)
    loaded.eval()
    return loaded
