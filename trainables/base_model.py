"""The base: the pretrained model that all runs of a sweep start from."""

from __future__ import annotations

import copy
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from trainables.config import Config
from trainables.embedded import PREFIX, embedded_folder, embedded_revision, embedded_shape
from trainables.errors import ConfigError, Fault
from trainables.shapes import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class BaseConfig(Config):
    """Which model. ``dtype: auto`` is bfloat16 on CUDA and float32 on a CPU."""

    model: str = Field(min_length=1)  # embedded:NAME, a local folder, or a Hugging Face id
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


class ResolvedBase(Config):
    """A base with nothing left open: what identities are made of and workers load.

    ``source`` is where the weights are read from; it is not part of any identity.
    """

    model: str
    revision: str
    dtype: Literal["float32", "bfloat16"]
    source: str

    def identity(self) -> dict[str, str]:
        return {"model": self.model, "revision": self.revision, "dtype": self.dtype}


def resolve_base(base: BaseConfig, *, cuda: bool) -> tuple[ResolvedBase, ModelShape]:
    """Fix the revision and the dtype and read the shape, without loading weights or writing anything.

    A local folder's model name is the hash of its contents, so that its path is in no identity. Raises ConfigError
    with the key ``base.model`` if there is no such model.
    """
    dtype = base.dtype if base.dtype != "auto" else ("bfloat16" if cuda else "float32")
    if base.model.startswith(PREFIX):
        revision = embedded_revision(base.model)
        if base.revision not in (None, revision):
            fault = f"{base.revision!r} is not installed; installed is {revision!r}"
            raise ConfigError([Fault("base.revision", fault)])
        resolved = ResolvedBase(model=base.model, revision=revision, dtype=dtype, source=base.model)
        return resolved, embedded_shape(base.model)
    config = _hub_config(base)
    folder = Path(base.model)
    if folder.is_dir():
        resolved = ResolvedBase(
            model="folder", revision=_folder_hash(folder), dtype=dtype, source=str(folder.resolve())
        )
    else:
        revision = getattr(config, "_commit_hash", None) or base.revision or "main"
        resolved = ResolvedBase(model=base.model, revision=revision, dtype=dtype, source=base.model)
    return resolved, ModelShape(config.num_hidden_layers, config.hidden_size, config.vocab_size)


def _hub_config(base: BaseConfig) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base.model, revision=base.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        allowed = "give embedded:NAME, a local folder with config.json, or a Hugging Face id"
        raise ConfigError([Fault("base.model", f"{base.model!r} cannot be opened ({reason}); {allowed}")]) from error


def _folder_hash(folder: Path) -> str:
    """sha256 over names and contents of the files that a model is made of."""
    digest = hashlib.sha256()
    suffixes = {".json", ".safetensors", ".bin", ".model", ".txt", ".jinja"}
    for path in sorted(file for file in folder.iterdir() if file.suffix in suffixes):
        with path.open("rb") as handle:
            digest.update(f"{path.name}\0{hashlib.file_digest(handle, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class LoadedBase:
    """A base in memory. ``model`` is never trained or wrapped: every training takes ``fresh()``."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    plain_head: bool

    def fresh(self) -> Any:
        """New modules over the SAME frozen weights: costs no copy, and no hook of an earlier training is on them."""
        shared = {id(parameter): parameter for parameter in self.model.parameters()}
        return copy.deepcopy(self.model, shared)


def load_tokenizer(base: ResolvedBase) -> PreTrainedTokenizerBase:
    """The base's tokenizer with a padding token (the end token where the model names none)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_folder_or_id(base), **_revision(base), trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(base: ResolvedBase, device: torch.device) -> LoadedBase:
    """Load weights (frozen, evaluation mode) and tokenizer onto ``device``."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging as transformers_logging

    from trainables.loss import head_is_plain_linear

    logging.getLogger("httpx").setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(
        _folder_or_id(base), dtype=getattr(torch, base.dtype), trust_remote_code=False, **_revision(base)
    )
    ends = model.generation_config.eos_token_id
    # a model's own top-p, temperature or repetition penalty would silently become part of what is measured
    model.generation_config = GenerationConfig(eos_token_id=ends)
    model.requires_grad_(False)
    model.eval()
    model.to(device)
    return LoadedBase(model, load_tokenizer(base), device, head_is_plain_linear(model))


def _folder_or_id(base: ResolvedBase) -> str:
    return str(embedded_folder(base.source)) if base.source.startswith(PREFIX) else base.source


def _revision(base: ResolvedBase) -> dict[str, str]:
    is_hub_id = not base.source.startswith(PREFIX) and not Path(base.source).is_dir()
    return {"revision": base.revision} if is_hub_id else {}
