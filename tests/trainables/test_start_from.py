"""Trainings that start from another one's adapter, against PEFT doing the same by hand.

In float64 both sides differ by rounding near 1e-14, which AdamW may enlarge where a gradient is nearly zero: 1e-10 is
asked, as of any training.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.bases import ROWS, base_of, tiny_base
from tests.float64 import float64_model
from tests.plain_loop import assert_same_training, new_adapter, plain_loop
from tests.sinks import MemorySink
from tests.trainings import adapter_of, spec, train
from trainables.base_model import LoadedBase
from trainables.checkpoint import CheckpointSettings
from trainables.errors import TrainingError
from trainables.lora import LoraSettings, load_adapter
from trainables.start_from import merged_base
from trainables.train import train_pack


def first_adapter(base: LoadedBase, folder: Path, **training: Any) -> Path:
    """A trained adapter, as its folder."""
    _, (sink,) = train(base, spec("first", max_steps=4, seed=7, **training))
    folder.mkdir()
    for name, content in sink.files.items():
        (folder / name).write_bytes(content)
    return folder


def digest(base: LoadedBase) -> str:
    """Of every weight of the base, as it lies in memory."""
    total = hashlib.sha256()
    for name, parameter in base.model.named_parameters():
        total.update(name.encode() + parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    sink = MemorySink()
    sink.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return adapter_of(sink)


@pytest.mark.usefixtures("float64_gradients")
def test_continuing_equals_peft_that_continues_the_same_adapter(tmp_path: Path) -> None:
    base = base_of(float64_model("llama", num_layers=2))
    folder = first_adapter(base, tmp_path / "first")
    one = dataclasses.replace(spec("child", rows=ROWS[:5], seed=1, max_steps=5), adapter=weights_of(folder))
    _, (sink,) = train(base, one)
    by_hand: Any = PeftModel.from_pretrained(base.fresh(), str(folder), is_trainable=True).train()
    reference = plain_loop(base, one, lora_dtype=torch.float64, model=by_hand)
    assert_same_training(sink, reference, relative=1e-10, adapter=1e-10)
    fresh, _ = train(base, dataclasses.replace(one, adapter=None))
    assert abs(fresh[0].losses[0] - sink.rows[0].loss) > 0.1, "the adapter must have learned, or this shows nothing"


@pytest.mark.usefixtures("float64_gradients")
@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_merging_equals_peft_that_merges_and_begins_a_new_adapter(kind: Any, tmp_path: Path) -> None:
    base = base_of(float64_model(kind, num_layers=2))
    before = digest(base)
    first = first_adapter(base, tmp_path / "first")
    once = merged_base(base, [first])
    second = first_adapter(once, tmp_path / "second", lora=LoraSettings(rank=2, alpha=8))
    one = spec("child", rows=ROWS[:5], seed=1, lora=LoraSettings(rank=3, alpha=6))
    _, (sink,) = train(merged_base(base, [first, second]), one)

    by_hand: Any = float64_model(kind, num_layers=2)
    for folder in (first, second):
        by_hand = PeftModel.from_pretrained(by_hand, str(folder)).merge_and_unload()
    theirs = base_of(by_hand)
    reference = plain_loop(theirs, one, lora_dtype=torch.float64, model=new_adapter(theirs, one))
    assert_same_training(sink, reference, relative=1e-10, adapter=1e-10)
    assert digest(base) == before != digest(theirs)
    assert digest(merged_base(base, [first, second])) == digest(theirs), "the same sums, so to the bit"


def test_merging_shares_what_it_does_not_change_and_gives_the_adapted_model(tmp_path: Path) -> None:
    base = tiny_base()
    folder = first_adapter(base, tmp_path / "first", lora=LoraSettings(rank=4, alpha=8, target_modules=("q_proj",)))
    merged = merged_base(base, [folder])
    own = dict(base.model.named_parameters())
    assert merged.model is not base.model
    assert {name for name, one in merged.model.named_parameters() if one is not own[name]} == {
        name for name in own if "q_proj.weight" in name
    }
    assert not any(parameter.requires_grad for parameter in merged.model.parameters())
    ids = torch.arange(12)[None]
    with torch.no_grad():
        adapted = load_adapter(base.fresh(), folder, "first")(ids).logits
        # W x + s B A x against (W + s B A) x: float32 rounds at 6e-8, over a few hundred terms
        torch.testing.assert_close(merged.model(ids).logits, adapted, rtol=0.0, atol=1e-5)
        assert (merged.model(ids).logits - base.model(ids).logits).abs().max() > 1e-2
    assert merged_base(base, []) is base


def test_another_run_over_the_same_base_is_equal_to_the_bit_before_and_after(tmp_path: Path) -> None:
    base = tiny_base()
    _, (alone,) = train(base, spec("other"))
    folder = first_adapter(base, tmp_path / "first")
    train(merged_base(base, [folder]), spec("child", seed=3))
    _, (after,) = train(base, spec("other"))
    assert after.files == alone.files
    assert [row.loss for row in after.rows] == [row.loss for row in alone.rows]


def test_a_child_goes_on_from_its_checkpoint_not_from_its_parent(tmp_path: Path) -> None:
    base = tiny_base()
    weights = weights_of(first_adapter(base, tmp_path / "first"))
    one = dataclasses.replace(spec("child", seed=1), adapter=weights)
    _, (whole,) = train(base, one, checkpoints=CheckpointSettings(every_steps=2))
    saved = tmp_path / "checkpoint"
    saved.mkdir()
    for name, content in whole.checkpoints[0].items():
        (saved / name).write_bytes(content)
    sink = MemorySink()
    sink.resume_from = saved
    train_pack(base, [one], {"child": sink})
    assert "resumed after step 2" in sink.lines
    assert sink.files == whole.files


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    base = tiny_base()
    weights = weights_of(first_adapter(base, tmp_path / "first", lora=LoraSettings(rank=2, alpha=8)))
    with pytest.raises(TrainingError, match=r"lora_A\.weight is \(2, 32\) there and \(4, 32\) here"):
        train(base, dataclasses.replace(spec("child"), adapter=weights))
