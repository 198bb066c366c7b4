"""A base with a vision tower beside its language model: hooks, adapters and losses are the language model's alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.bases import base_of
from tests.tiny import tiny_model
from tests.trainings import HIDDEN, spec, train
from trainables.base_model import LoadedBase
from trainables.defenses import Pps
from trainables.lora import LoraSettings, add_adapter, load_adapter
from trainables.loss import head_is_plain_linear
from trainables.model_parts import backbone, decoder_layers
from trainables.residual_stream import Add, ReadValue, residual_stream
from trainables.sample import Question, SamplingConfig, sample_answers

NUM_LAYERS = 3


@pytest.fixture
def model() -> Any:
    return tiny_model("gemma3", num_layers=NUM_LAYERS)


@pytest.fixture
def base(model: Any) -> LoadedBase:
    return base_of(model)


def test_its_parts_are_those_of_the_language_model(base: LoadedBase) -> None:
    model = base.model
    assert backbone(model) is model.model.language_model
    assert decoder_layers(model) is model.model.language_model.layers
    assert len(model.model.vision_tower.encoder.layers) == NUM_LAYERS, "the vision tower has as many blocks"
    assert head_is_plain_linear(model)


def test_the_residual_stream_is_that_of_the_language_model(model: Any, random_ids: torch.Tensor) -> None:
    read: dict[int, torch.Tensor] = {}
    readers = [ReadValue(layer, read.__setitem__) for layer in range(NUM_LAYERS + 1)]
    with torch.no_grad(), residual_stream(model, [], readers):
        plain = model(input_ids=random_ids, output_hidden_states=True)
    for layer in range(NUM_LAYERS):  # transformers gives the last one after the final norm
        assert torch.equal(read[layer], plain.hidden_states[layer])
    with torch.no_grad(), residual_stream(model, [Add(1, torch.ones(HIDDEN))]):
        assert not torch.equal(model(input_ids=random_ids).logits, plain.logits)


def test_adapters_stay_off_the_vision_tower(base: LoadedBase) -> None:
    """Its modules have the names of those in the blocks, and PEFT would match them."""
    assert any(name.endswith("q_proj") for name, _ in base.model.model.vision_tower.named_modules())
    wrapped = add_adapter(base.fresh(), "first", LoraSettings(rank=2), seed=0)
    add_adapter(wrapped, "second", LoraSettings(rank=2, target_modules=("q_proj", "v_proj")), seed=0)
    for adapter, per_block in (("first", 7), ("second", 2)):
        names = [name for name, _ in wrapped.named_modules() if name.endswith(f"lora_A.{adapter}")]
        assert len(names) == NUM_LAYERS * per_block
        assert all(".language_model.layers." in name for name in names)


def test_a_model_without_other_parts_keeps_the_short_names() -> None:
    wrapped = add_adapter(base_of(tiny_model("llama", num_layers=2)).fresh(), "run", LoraSettings(rank=2), seed=0)
    assert all("." not in name for name in wrapped.peft_config["run"].target_modules)  # type: ignore[union-attr,unused-ignore]


def test_it_trains_with_a_defense_and_its_adapter_loads_with_peft_alone(
    base: LoadedBase, tmp_path: Path, random_ids: torch.Tensor
) -> None:
    steering = {"pps": torch.ones(NUM_LAYERS + 1, HIDDEN)}
    defense = [Pps(vector="pps", layer=2, coefficient=0.5)]
    (result,), (sink,) = train(base, spec(defense=defense, vectors=steering))
    assert result.num_steps == 6
    assert sink.rows[-1].loss < sink.rows[0].loss
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, content in sink.files.items():
        (folder / name).write_bytes(content)
    ours = load_adapter(base.fresh(), folder, "run0")
    alone = PeftModel.from_pretrained(tiny_model("gemma3", num_layers=NUM_LAYERS), folder).eval()
    with torch.no_grad():
        expected = alone(input_ids=random_ids).logits
        assert torch.equal(ours(input_ids=random_ids).logits, expected)
        assert not torch.equal(base.model(input_ids=random_ids).logits, expected)


def test_it_answers(base: LoadedBase) -> None:
    """Batched on padded prompts as alone."""
    questions = [Question("a", "Why?"), Question("b", "What is the best way to cook rice?")]
    config = SamplingConfig(max_new_tokens=6, temperature=0)

    def answers(*asked: Question) -> list[str]:
        rows = sample_answers(base.model, base.tokenizer, asked, config, sample_id="s", noise_key="run")
        return [row.answer for batch in rows for row in batch]

    assert answers(*questions) == [*answers(questions[0]), *answers(questions[1])]
