"""The base: the pretrained model that all runs of a sweep start from."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from trainables.config import Config
from trainables.embedded import PREFIX, embedded_folder, embedded_revision, embedded_shape
from trainables.errors import ConfigError, Fault
from trainables.model_parts import decoder_layers
from trainables.shapes import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class BaseConfig(Config):
    """The pretrained model that every run starts from."""

    model: str = Field(min_length=1)
    """``embedded:smollm2-135m-instruct``, a local folder with ``config.json``, or a Hugging Face id. A folder is
    looked for beside the sweep file, in the current directory and in this project."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id. null: its main branch, recorded as the commit that was found."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the frozen weights; adapters stay float32. ``auto``: bfloat16 on a GPU, float32 on a CPU. It is part
    of a run's identity."""


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

    A local folder is known by the content of the files that transformers reads (see ``model_files``), so neither its
    path nor anything else that lies in it is in an identity. Raises ConfigError with the key ``base.model`` if there
    is no such model, or if it is not a decoder-only language model whose blocks can be found.
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
        if (folder / "adapter_config.json").exists():
            message = f"{base.model!r} holds an adapter beside the model, which transformers would put on it; "
            raise ConfigError(
                [Fault("base.model", message + "give the model alone, or with the adapter merged into it")]
            )
        resolved = ResolvedBase(
            model="folder", revision=_folder_hash(folder), dtype=dtype, source=str(folder.resolve())
        )
    else:
        revision = getattr(config, "_commit_hash", None) or base.revision or "main"
        resolved = ResolvedBase(model=base.model, revision=revision, dtype=dtype, source=base.model)
    return resolved, _shape(config, base.model)


def _hub_config(base: BaseConfig) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    allowed = "give embedded:NAME, a local folder with config.json, or a Hugging Face id"
    if base.model.startswith(("/", ".", "~")) and not Path(base.model).is_dir():
        message = f"{base.model!r} cannot be opened (there is no such folder); {allowed}"
        raise ConfigError([Fault("base.model", message)])
    try:
        return AutoConfig.from_pretrained(base.model, revision=base.revision, trust_remote_code=False)
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise ConfigError([Fault("base.model", f"the config of {base.model!r} is impossible: {reason}")]) from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError([Fault("base.model", f"{base.model!r} cannot be opened ({reason}); {allowed}")]) from error


def _shape(config: Any, model: str) -> ModelShape:
    """What the config says about the language model in it, which may be a part of a larger one (``text_config``).

    The model is built without weights, so that one whose blocks cannot be hooked is refused before anything starts.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    kind = f"{model!r} (model type {config.model_type!r})"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        message = f"{kind} is not a causal language model of transformers; give one that AutoModelForCausalLM loads"
        raise ConfigError([Fault("base.model", message)])
    text = config.get_text_config(decoder=True)
    names = ("num_hidden_layers", "hidden_size", "vocab_size")
    missing = [name for name in names if not isinstance(getattr(text, name, None), int)]
    if missing:
        message = f"the config of {kind} does not say {', '.join(missing)}, neither itself nor in its text_config"
        raise ConfigError([Fault("base.model", message)])
    try:
        with torch.device("meta"):
            decoder_layers(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError([Fault("base.model", f"{kind} cannot be used: {type(error).__name__}: {reason}")]) from error
    return ModelShape(text.num_hidden_layers, text.hidden_size, text.vocab_size)


# What transformers reads from a model's folder by a fixed name; the vocabularies are those that its tokenizers know.
_FIXED_NAMES = """
config.json generation_config.json special_tokens_map.json added_tokens.json chat_template.jinja chat_template.json
vocab.json vocab.txt merges.txt vocab-src.json vocab-tgt.json entity_vocab.json target_vocab.json
spiece.model spm.model spm_char.model sentencepiece.model sentencepiece.bpe.model source.spm target.spm
bpe.codes dict.txt tekken.json byte_maps.json emoji.json normalizer.json word_shape.json word_pronunciation.json
prophetnet.tokenizer
"""
# tokenizer.json, tokenizer.4.0.json, tokenizer_config.json, tokenizer.model, tokenizer.model.v3
_TOKENIZER = re.compile(r"tokenizer(_config|[.\d]*)\.json|tokenizer\.model.*")
_TEMPLATES = "additional_chat_templates"
# In this order: transformers takes the first that is there.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def model_files(folder: Path) -> list[Path]:
    """The files of a local model that ``from_pretrained`` reads, sorted by name: what the model IS.

    Config, generation config, tokenizer, chat templates, and one set of weights: a single file, or an index and the
    shards that it names. Readmes, notes, licences, other formats of the weights and hidden files are none of them.
    """
    fixed = _FIXED_NAMES.split()
    found = {path for path in folder.iterdir() if path.name in fixed or _TOKENIZER.fullmatch(path.name)}
    found |= set((folder / _TEMPLATES).glob("*.jinja"))
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is not None:
        found.add(weights)
        if weights.suffix == ".json":
            found |= {folder / name for name in _shards(weights)}
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(folder).as_posix())


def _shards(index: Path) -> set[str]:
    try:
        return {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        message = f"{index} is not an index of weights ({type(error).__name__}: {error})"
        raise ConfigError([Fault("base.model", message)]) from error


def _folder_hash(folder: Path) -> str:
    """sha256 over names and contents of ``model_files``."""
    digest = hashlib.sha256()
    for path in model_files(folder):
        name = path.relative_to(folder).as_posix()
        with path.open("rb") as handle:
            digest.update(f"{name}\0{hashlib.file_digest(handle, 'sha256').hexdigest()}\n".encode())
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


def empty_model(base: ResolvedBase) -> Any:
    """The model without its weights, on no device: names and shapes of its parameters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(_folder_or_id(base), **_revision(base), trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def load_base(base: ResolvedBase, device: torch.device) -> LoadedBase:
    """Load weights (frozen, evaluation mode) and tokenizer onto ``device``.

    Raises ConfigError if the files lack weights of the model.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging as transformers_logging

    from trainables.loss import head_is_plain_linear

    logging.getLogger("httpx").setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        _folder_or_id(base),
        dtype=getattr(torch, base.dtype),
        trust_remote_code=False,
        output_loading_info=True,
        **_revision(base),
    )
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        # transformers makes them up, with a warning: what is then trained and measured is not the model
        message = f"{base.source!r} has no weights for {len(missing)} parameters of the model, such as {missing[0]}"
        raise ConfigError([Fault("base.model", message)], "the model was not used")
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
