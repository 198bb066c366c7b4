"""A training by two workers against the same by one.

Tolerances. The two add the micro-batches' gradients in other orders, and at ZeRO stage 3 the base computes with
PyTorch's own operations: 1e-7 relative in a step, which AdamW enlarges where a gradient is nearly zero. 1e-5 is asked
of losses (what the whole engine promises), of gradient norms relative to 1 and of signals, and 1e-4 of adapter values:
a hundredth of one step of AdamW, whose size is the learning rate, 0.01.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from tests.trainings import HIDDEN, spec
from tests.worker_processes import SIZE, Case, Found, alone, by_workers
from trainables.checkpoint import CheckpointSettings
from trainables.defenses import GradientEdit, Inoculation, Pps, ProjectionPenalty
from trainables.lora import LoraSettings
from trainables.rows import SignalRow
from trainables.signals import WatchConfig
from trainables.workers import Workers

STAGES = (0, 1, 2, 3)
VECTORS = {"v": torch.linspace(-1, 1, 3 * HIDDEN).reshape(3, HIDDEN), "c": torch.ones(3, HIDDEN)}
EVERY_STEP = CheckpointSettings(every_steps=1)
pytestmark = pytest.mark.slow


def kinds() -> dict[str, dict[str, Any]]:
    """Trainings of which no two workers have the same work: 5 rows are 3 micro-batches of 2, then rows of 1."""
    pps = Pps(vector="v", layer=1, coefficient=0.5)
    watch = WatchConfig(vectors=("v",), layers=(1, 2), centers=("c",))
    lora = LoraSettings(rank=3, alpha=4, dropout=0.2)  # 3: parts of an adapter do not come out even
    return {
        "pps": {"defense": [Inoculation(prompts=("One.", "Two.")), pps], "lora": lora, "max_gradient_norm": 0.3},
        "edit": {"defense": [GradientEdit(vector="v", mode="neutralize")], "watch": watch},
        "penalty": {"defense": [ProjectionPenalty(vector="v", strength=0.1)], "micro_batch_size": 5},
    }


def case(kind: str, stage: int, resume_from: Path | None = None, **how: Any) -> Case:
    settings: dict[str, Any] = {"batch_size": 5, "micro_batch_size": 2, "vectors": VECTORS} | kinds()[kind]
    return Case(spec(**settings), {"zero_stage": stage} | how, resume_from)


@pytest.fixture(scope="module")
def reference() -> dict[str, Found]:
    return {kind: alone(case(kind, 0, checkpoints=EVERY_STEP)) for kind in kinds()}


@pytest.fixture(scope="module")
def found(reference: dict[str, Found], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Found]]:
    folder = tmp_path_factory.mktemp("workers")
    half = folder / "half"
    half.mkdir()
    for name, content in reference["pps"].checkpoints[2].items():  # after step 3, by one worker
        (half / name).write_bytes(content)
    cases = {f"{kind} {stage}": case(kind, stage) for kind in kinds() for stage in STAGES}
    cases |= {f"resumed {stage}": case("pps", stage, half, checkpoints=EVERY_STEP) for stage in STAGES}
    return by_workers(cases, folder)


def assert_same(one: Found, other: Found) -> None:
    assert len(one.losses) == len(other.losses)
    assert one.losses == pytest.approx(other.losses, abs=1e-5)
    assert one.norms == pytest.approx(other.norms, abs=1e-5)
    mine, theirs = (load(each.files["adapter_model.safetensors"]) for each in (one, other))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-4)


def by_place(signals: list[SignalRow]) -> dict[tuple[object, ...], float]:
    return {(row.step, row.signal, row.name, row.layer): row.value for row in signals}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", list(kinds()))
def test_two_workers_train_what_one_does(
    kind: str, stage: int, found: dict[str, list[Found]], reference: dict[str, Found]
) -> None:
    for one in found[f"{kind} {stage}"]:
        assert_same(one, reference[kind])


@pytest.mark.parametrize("stage", STAGES)
def test_signals_are_those_of_all_workers(
    stage: int, found: dict[str, list[Found]], reference: dict[str, Found]
) -> None:
    for kind, names in (("edit", {"activation_projection", "gradient_cosine", "drift"}), ("penalty", {"penalty"})):
        wanted = reference[kind].signals
        assert {row.signal for row in wanted} == names
        for one in found[f"{kind} {stage}"]:
            assert len(one.signals) == len(wanted)
            assert by_place(one.signals) == pytest.approx(by_place(wanted), abs=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_two_workers_go_on_where_one_was_and_one_where_two_were(
    stage: int, found: dict[str, list[Found]], reference: dict[str, Found], tmp_path: Path
) -> None:
    ours = found[f"resumed {stage}"]
    for one in ours:
        assert len(one.checkpoints) == 3, "steps 4, 5 and 6"
        assert_same(one, reference["pps"])
    for name, content in ours[0].checkpoints[0].items():
        (tmp_path / name).write_bytes(content)
    assert_same(alone(case("pps", 0, tmp_path)), reference["pps"])


@pytest.mark.parametrize("count", range(1, 8))
def test_every_micro_batch_counts_once(count: int) -> None:
    shares = [list(Workers(rank, SIZE).own(count)) for rank in range(SIZE)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(index for share in shares for index, counts in share if counts) == list(range(count))


def test_workers_that_differ_do_not_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other worker says is added here; a checkpoint that one of them has not seen is the case meant."""
    one = Workers(0, 2)
    for other, fits in ((3.0, True), (0.0, False), (2.0, False)):
        said = [3.0 + other]
        monkeypatch.setattr(Workers, "added", lambda *_, said=said: said)
        if fits:
            one.must_agree([3.0], "steps")
        else:
            with pytest.raises(RuntimeError, match=r"workers differ in steps: worker 0 of 2 has \[3.0\]"):
                one.must_agree([3.0], "steps")
