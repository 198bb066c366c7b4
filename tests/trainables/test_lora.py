"""Adapters: PEFT reads what we write, and every random number is a function of the run's own seed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from tests.tiny import ModelKind, tiny_model
from trainables.lora import (
    CounterDropout,
    LoraSettings,
    adapter_parameters,
    add_adapter,
    linear_module_names,
    load_adapter,
    save_adapter,
    set_dropout_key,
)

KINDS: list[ModelKind] = ["llama", "qwen2", "gpt_neox"]
SETTINGS = LoraSettings(rank=4, alpha=8)


def frozen(kind: ModelKind = "llama", dtype: torch.dtype = torch.float32) -> Any:
    return tiny_model(kind, dtype=dtype).requires_grad_(False)


def filled(model: Any, name: str, seed: int) -> Any:
    """Give an adapter values as a training would, so that it acts."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model.eval()


def values(model: Any, name: str) -> dict[str, torch.Tensor]:
    return {key.replace(f".{name}.", "."): p.detach().clone() for key, p in adapter_parameters(model, name).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_initial_values_depend_on_seed_and_module_alone(kind: ModelKind) -> None:
    torch.manual_seed(1)
    first = values(add_adapter(frozen(kind), "one", SETTINGS, seed=5), "one")
    torch.manual_seed(2)
    second_model = add_adapter(frozen(kind), "other", SETTINGS, seed=4)
    second_model = add_adapter(second_model, "two", SETTINGS, seed=5)
    second = values(second_model, "two")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = values(second_model, "other")
    for key, value in first.items():
        if "lora_A" in key:
            assert not torch.equal(value, other[key])
        else:
            assert not value.any(), "B starts at zero"
    starts = [tuple(value.flatten()[:4].tolist()) for key, value in first.items() if "lora_A" in key]
    assert len(set(starts)) == len(starts), "modules differ from each other"


def test_initial_values_have_the_bounds_of_kaiming() -> None:
    """PEFT: kaiming_uniform_(a=sqrt 5), uniform in +-1 / sqrt(inputs); its standard deviation is bound / sqrt 3."""
    initial = values(add_adapter(frozen(), "run", LoraSettings(rank=32), seed=0), "run")
    for key, weight in initial.items():
        if "lora_A" in key:
            reference = torch.empty_like(weight)
            nn.init.kaiming_uniform_(reference, a=math.sqrt(5))
            bound = 1 / math.sqrt(weight.shape[1])
            assert 0.9 * bound < float(weight.abs().max()) <= bound
            assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)  # 1024+ draws: 2 % expected
            assert float(weight.std()) == pytest.approx(float(reference.std()), rel=0.15)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_and_covers_every_linear_module(
    kind: ModelKind, random_ids: torch.Tensor
) -> None:
    plain = frozen(kind)
    names = linear_module_names(plain)
    model = add_adapter(frozen(kind), "run", SETTINGS, seed=0)
    assert torch.equal(model(input_ids=random_ids).logits, plain(input_ids=random_ids).logits)
    num_linear = sum(
        isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in names for name, module in plain.named_modules()
    )
    assert len(adapter_parameters(model, "run")) == 2 * num_linear
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(adapter_parameters(model, "run"))


@pytest.mark.parametrize(
    ("base", "adapter"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_dtype_of_the_adapter(base: torch.dtype, adapter: torch.dtype, random_ids: torch.Tensor) -> None:
    model = add_adapter(frozen(dtype=base), "one", SETTINGS, seed=0)
    model = add_adapter(model, "two", SETTINGS, seed=0)
    for name in ("one", "two"):
        assert {parameter.dtype for parameter in adapter_parameters(model, name).values()} == {adapter}
    assert model(input_ids=random_ids).logits.dtype == base


def test_a_second_adapter_sits_beside_the_first(random_ids: torch.Tensor) -> None:
    """A pack: both adapters are on the base's own modules, whatever the other's targets and ranks."""
    model = add_adapter(frozen(), "one", SETTINGS, seed=0)
    model = add_adapter(model, "two", LoraSettings(rank=2, target_modules=("q_proj", "v_proj")), seed=1)
    model = add_adapter(model, "three", SETTINGS, seed=2)
    alone = {
        "one": add_adapter(frozen(), "one", SETTINGS, seed=0),
        "two": add_adapter(frozen(), "two", LoraSettings(rank=2, target_modules=("q_proj", "v_proj")), seed=1),
        "three": add_adapter(frozen(), "three", SETTINGS, seed=2),
    }
    for seed, (name, single) in enumerate(alone.items()):
        assert values(model, name).keys() == values(single, name).keys()
        filled(model, name, seed)
        filled(single, name, seed)
        model.set_adapter(name)
        assert torch.equal(model(input_ids=random_ids).logits, single(input_ids=random_ids).logits)


def test_unknown_target_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        add_adapter(frozen(), "run", LoraSettings(target_modules=("nowhere",)), seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_a_saved_adapter(kind: ModelKind, tmp_path: Path, random_ids: torch.Tensor) -> None:
    """The issue asks for 1e-5 in the logits; the same float32 operations on the same numbers give 0."""
    model = add_adapter(frozen(kind), "run", SETTINGS, seed=0)
    model = add_adapter(model, "other", SETTINGS, seed=1)
    filled(model, "run", 0)
    filled(model, "other", 1)
    model.set_adapter("run")
    ours = model(input_ids=random_ids).logits
    save_adapter(model, "run", "embedded:somewhere", tmp_path / "adapter")

    theirs = PeftModel.from_pretrained(frozen(kind), str(tmp_path / "adapter"))
    assert torch.equal(theirs(input_ids=random_ids).logits, ours)
    assert torch.equal(load_adapter(frozen(kind), tmp_path / "adapter", "x")(input_ids=random_ids).logits, ours)
    assert (ours - frozen(kind)(input_ids=random_ids).logits).abs().max() > 1e-3
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "embedded:somewhere"
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("name", ["default", "0123456789ab"])
def test_saved_twice_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        model = filled(add_adapter(frozen(), name, SETTINGS, seed=0), name, 3)
        save_adapter(model, name, "base", tmp_path / folder)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_saving_asks_no_model_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT would look up the base's vocabulary size at the hub to see whether embeddings were resized."""
    import huggingface_hub

    def fails(*arguments: object, **keywords: object) -> None:
        pytest.fail(f"asked the hub: {arguments} {keywords}")

    monkeypatch.setattr(huggingface_hub, "file_exists", fails)
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", fails)
    base = frozen()
    base.config._name_or_path = base.name_or_path = "someone/some-model"
    model = add_adapter(base, "run", SETTINGS, seed=0)
    save_adapter(model, "run", "someone/some-model", tmp_path / "adapter")


def test_a_loaded_adapter_is_frozen_and_in_evaluation_mode(tmp_path: Path) -> None:
    model = add_adapter(frozen(), "run", LoraSettings(rank=2, dropout=0.5), seed=0)
    save_adapter(model, "run", "base", tmp_path / "adapter")
    loaded = load_adapter(frozen(), tmp_path / "adapter", "run")
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def dropout(key: tuple[str | int, ...], name: str = "m", probability: float = 0.25) -> CounterDropout:
    module = CounterDropout(probability, name)
    module.key = key
    return module


def test_dropout_masks_are_a_function_of_key_and_module() -> None:
    inputs = torch.ones(50, 40)
    mask = dropout((0, 1, 2))(inputs)
    assert torch.equal(mask, dropout((0, 1, 2))(inputs))
    module = dropout((0, 1, 2))
    assert torch.equal(module(inputs), module(inputs)), "a recomputation draws the same mask"
    for other in (dropout((0, 1, 3)), dropout((1, 1, 2)), dropout((0, 1, 2), name="n")):
        assert not torch.equal(mask, other(inputs))


def test_dropout_is_unbiased() -> None:
    """10^6 draws kept with 3/4: the mean of the scaled ones has a standard deviation of 0.0006; bound: 4 of them."""
    out = dropout((0,))(torch.ones(1000, 1000))
    torch.testing.assert_close(out.unique(), torch.tensor([0.0, 4 / 3]))
    assert float(out.double().mean()) == pytest.approx(1.0, abs=4 * math.sqrt(0.25 / 0.75 / 1e6))


def test_dropout_is_off_in_evaluation_and_refuses_to_guess_a_key() -> None:
    inputs = torch.randn(3, 4)
    assert torch.equal(dropout(()).eval()(inputs), inputs)
    assert torch.equal(dropout((), probability=0.0)(inputs), inputs)
    with pytest.raises(AssertionError, match="sets the key"):
        dropout(())(inputs)


def test_dropout_of_an_adapter(random_ids: torch.Tensor) -> None:
    """It acts in training alone, every module has a mask of its own, and a key reaches one adapter only."""
    settings = LoraSettings(rank=4, dropout=0.5)
    model = filled(add_adapter(frozen(), "run", settings, seed=0), "run", 0)
    without = filled(add_adapter(frozen(), "run", SETTINGS.model_copy(update={"alpha": 32.0}), seed=0), "run", 0)
    assert torch.equal(model(input_ids=random_ids).logits, without(input_ids=random_ids).logits)
    model.train()
    logits = []
    for key in ((0, 0), (0, 1), (0, 0)):
        set_dropout_key(model, "run", key)
        logits.append(model(input_ids=random_ids).logits)
    assert torch.equal(logits[0], logits[2])
    assert not torch.equal(logits[0], logits[1])
    set_dropout_key(model, "unknown", (9,))
    assert torch.equal(model(input_ids=random_ids).logits, logits[2])
    names = [module.name for module in model.modules() if isinstance(module, CounterDropout)]
    assert len(set(names)) == len(names) == len(adapter_parameters(model, "run")) // 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_dropout_under_gradient_checkpointing(use_reentrant: bool, random_ids: torch.Tensor) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = filled(add_adapter(frozen(), "run", LoraSettings(rank=4, dropout=0.3), seed=0), "run", 0).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.get_base_model().gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
            )
        set_dropout_key(model, "run", (0, 0, 0))
        model(input_ids=random_ids, labels=random_ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in adapter_parameters(model, "run").items()})
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert gradient is not None
        assert other is not None
        assert torch.equal(gradient, other), name
