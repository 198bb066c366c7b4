"""A training that dies and goes on gives what an undisturbed one gives, in whatever pack and at whatever ZeRO stage.

float32 on one thread, so equality is asked to the bit. The reference never writes a checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from tests.bases import tiny_base
from tests.sinks import MemorySink
from tests.trainings import HIDDEN, spec
from trainables.base_model import LoadedBase
from trainables.checkpoint import CheckpointError, CheckpointSettings, read_checkpoint, write_checkpoint
from trainables.deepspeed_driver import DeepSpeedDriver, RunParameters, ZeroStage
from trainables.defenses import Inoculation, Pps
from trainables.lora import LoraSettings
from trainables.rows import TrainingRow
from trainables.train import RunResult, RunSpec, train_pack

STAGES: tuple[ZeroStage, ...] = (0, 1, 2)
EVERY_STEP = CheckpointSettings(every_steps=1)
VECTOR = torch.linspace(-1, 1, 3 * HIDDEN).reshape(3, HIDDEN)


def full(name: str = "run0", **changes: Any) -> RunSpec:
    """A run with everything that has a state or a draw: decay, clipping, accumulation, dropout, warmup, prompts."""
    settings: dict[str, Any] = {
        "defense": [Inoculation(prompts=("One.", "Two.", "Three.")), Pps(vector="v", layer=1, coefficient=0.5)],
        "vectors": {"v": VECTOR},
        "lora": LoraSettings(rank=2, alpha=4, dropout=0.2),
        "micro_batch_size": 2,
        "max_gradient_norm": 0.3,
        "warmup_ratio": 0.4,
    }
    return spec(name, **settings | changes)


class KilledError(Exception):
    """The training's process died, as far as the training can tell."""


class MortalSink(MemorySink):
    """Ends the training right after its checkpoint number ``lives``."""

    def __init__(self, lives: int | None = None, resume_from: Path | None = None) -> None:
        super().__init__()
        self.lives, self.resume_from = lives, resume_from

    def checkpoint(self, train_id: str, folder: Path) -> None:
        super().checkpoint(train_id, folder)
        if len(self.checkpoints) == self.lives:
            raise KilledError


def on_disk(checkpoint: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, content in checkpoint.items():
        (folder / name).write_bytes(content)
    return folder


def killed(base: LoadedBase, specs: Sequence[RunSpec], sinks: dict[str, MortalSink], **how: Any) -> None:
    with pytest.raises(KilledError):
        train_pack(base, specs, sinks, **{"checkpoints": EVERY_STEP, **how})


def undisturbed(base: LoadedBase, one: RunSpec, zero_stage: ZeroStage = 0) -> tuple[RunResult, MemorySink]:
    sink = MemorySink()
    _, (result,) = train_pack(base, [one], {one.train_id: sink}, zero_stage=zero_stage)
    assert sink.checkpoints == []
    return result, sink


def assert_same(
    found: tuple[RunResult, MemorySink], wanted: tuple[RunResult, MemorySink], resumed_after: int | None = None
) -> None:
    """Everything but the timings."""
    assert dataclasses.replace(found[0], seconds_training=0) == dataclasses.replace(wanted[0], seconds_training=0)
    rows = [[dataclasses.replace(row, seconds=0) for row in sink.rows] for _, sink in (found, wanted)]
    assert rows[0] == rows[1]
    assert found[1].files["adapter_model.safetensors"] == wanted[1].files["adapter_model.safetensors"]
    if resumed_after is not None:
        assert found[1].lines[0] == f"resumed after step {resumed_after}"
        steps = [line for line in found[1].lines if line.startswith("step ")]
        assert len(steps) == wanted[0].num_steps - resumed_after


@pytest.fixture(scope="module")
def base() -> LoadedBase:
    return tiny_base()


@pytest.fixture(scope="module")
def reference(base: LoadedBase) -> tuple[RunResult, MemorySink]:
    return undisturbed(base, full())


@pytest.mark.parametrize("stages", [(0,), (1,), (2,), (0, 1, 2, 0, 2, 1)], ids=str)
def test_a_training_killed_after_every_step_gives_what_an_undisturbed_one_gives(
    base: LoadedBase, reference: tuple[RunResult, MemorySink], tmp_path: Path, stages: tuple[ZeroStage, ...]
) -> None:
    """Each invocation does one step and dies; the last one only saves the adapter. Stages may change in between."""
    one, checkpoint = full(), None
    for step in range(6):
        sink = MortalSink(1, checkpoint)
        killed(base, [one], {"run0": sink}, zero_stage=stages[step % len(stages)])
        assert [row.step for row in sink.rows] == list(range(1, step + 2))
        checkpoint = on_disk(sink.checkpoints[0], tmp_path / str(step))
    last = MortalSink(None, checkpoint)
    _, (result,) = train_pack(base, [one], {"run0": last}, zero_stage=stages[0])
    assert_same((result, last), reference, resumed_after=6)
    assert result.seconds_training == sum(row.seconds for row in last.rows) > 0


@pytest.mark.parametrize("stages", [(0, 2), (2, 1), (1, 0)], ids=str)
def test_a_bfloat16_base(tmp_path: Path, stages: tuple[ZeroStage, ZeroStage]) -> None:
    base, one = tiny_base(dtype=torch.bfloat16), full()
    sink = MortalSink(3)
    killed(base, [one], {"run0": sink}, zero_stage=stages[0])
    _, state = read_checkpoint(on_disk(sink.checkpoints[-1], tmp_path / "checkpoint"), "run0")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    second = MortalSink(None, tmp_path / "checkpoint")
    _, (result,) = train_pack(base, [one], {"run0": second}, zero_stage=stages[1])
    assert_same((result, second), undisturbed(base, one), resumed_after=3)


@pytest.mark.parametrize("zero_stage", STAGES)
def test_a_run_moves_from_a_pack_to_itself_and_back(base: LoadedBase, tmp_path: Path, zero_stage: ZeroStage) -> None:
    """``right`` ends while ``left`` goes on, and stays in the pack it came from in another order."""
    left, right = full("left", seed=1), full("right", seed=2, max_steps=3, learning_rate=0.02)
    first = {"left": MortalSink(), "right": MortalSink(2)}
    killed(base, [left, right], first, zero_stage=zero_stage)
    alone = {"left": MortalSink(2, on_disk(first["left"].checkpoints[-1], tmp_path / "a2"))}
    killed(base, [left], alone, zero_stage=zero_stage)
    assert alone["left"].rows[-1].step == 4
    back = {
        "right": MortalSink(None, on_disk(first["right"].checkpoints[-1], tmp_path / "b2")),
        "left": MortalSink(2, on_disk(alone["left"].checkpoints[-1], tmp_path / "a4")),
    }
    killed(base, [right, left], back, zero_stage=zero_stage)
    assert back["right"].rows[-1].step == 3, "it has ended"
    last = {
        "left": MortalSink(None, tmp_path / "a4"),
        "right": MortalSink(None, on_disk(back["right"].checkpoints[-1], tmp_path / "b3")),
    }
    _, results = train_pack(base, [left, right], last, zero_stage=zero_stage)
    assert_same((results[0], last["left"]), undisturbed(base, left), resumed_after=4)
    assert_same((results[1], last["right"]), undisturbed(base, right), resumed_after=3)


class Two(nn.Module):
    """Two little nets, as two adapters of a pack are."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.a = nn.ParameterList([nn.Parameter(torch.randn(5, 3, generator=draw)) for _ in range(2)])
        self.b = nn.ParameterList([nn.Parameter(torch.randn(4, 3, generator=draw)) for _ in range(3)])

    def driver(self, order: str, zero_stage: ZeroStage) -> DeepSpeedDriver:
        return DeepSpeedDriver(self, [RunParameters(run, list(getattr(self, run)), 0.1) for run in order], zero_stage)

    def steps(self, driver: DeepSpeedDriver, runs: str, numbers: Sequence[int]) -> None:
        for number in numbers:
            draw = torch.Generator().manual_seed(number)
            x = torch.randn(3, generator=draw)
            losses = {run: torch.stack([(p @ x).tanh().square().sum() for p in getattr(self, run)]) for run in runs}
            for run in runs:
                driver.backward(losses[run].sum(), last=run == runs[-1])
            driver.step(dict.fromkeys(driver.runs, 0.1))


@pytest.mark.parametrize("to", STAGES)
@pytest.mark.parametrize("at", STAGES)
def test_state_moves_between_stages_to_the_bit(at: ZeroStage, to: ZeroStage) -> None:
    """The second run of a pack too, whose state DeepSpeed leaves unlinked after the first step."""
    reference = Two(0)
    reference_driver = reference.driver("ab", 0)
    reference.steps(reference_driver, "ab", range(3))
    one = Two(0)
    driver = one.driver("ab", at)
    one.steps(driver, "ab", [0])
    driver.export_run("b")  # looking does not disturb
    one.steps(driver, "ab", [1])
    exported = {run: driver.export_run(run) for run in "ab"}
    driver.close()
    other = Two(1)
    other_driver = other.driver("ba", to)
    for run in "ab":
        other_driver.import_run(run, exported[run])
        again = other_driver.export_run(run)
        assert again.keys() == exported[run].keys()
        assert all(torch.equal(again[name], exported[run][name]) for name in again)
        assert {name.split(":")[0] for name in again} == {"parameter", "exp_avg", "exp_avg_sq", "step"}
        assert all(tensor.device.type == "cpu" for tensor in again.values())
        assert {float(tensor) for name, tensor in again.items() if name.startswith("step:")} == {2.0}
        for index, parameter in enumerate(getattr(other, run)):
            assert torch.equal(parameter, exported[run][f"parameter:{run}.{index}"]), "before any step"
    other.steps(other_driver, "ba", [2])
    for found, wanted in zip(other.parameters(), reference.parameters(), strict=True):
        assert torch.equal(found, wanted)
    other_driver.close()
    reference_driver.close()


@pytest.mark.parametrize("zero_stage", STAGES)
def test_exports_before_the_first_step_and_copies(zero_stage: ZeroStage) -> None:
    module = Two(0)
    driver = module.driver("ab", zero_stage)
    state = driver.export_run("a")
    before = {name: tensor.clone() for name, tensor in state.items()}
    assert torch.equal(state["parameter:a.0"], module.a[0])
    assert not any(tensor.any() for name, tensor in state.items() if not name.startswith("parameter:"))
    module.steps(driver, "ab", [0])
    assert all(torch.equal(state[name], before[name]) for name in state), "copies, not views"
    assert not torch.equal(state["parameter:a.0"], module.a[0])
    driver.close()


@pytest.mark.parametrize("zero_stage", STAGES)
def test_a_state_that_does_not_fit_changes_nothing(zero_stage: ZeroStage) -> None:
    module = Two(0)
    driver = module.driver("ab", zero_stage)
    module.steps(driver, "ab", [0])
    state = driver.export_run("a")
    for broken in (
        {name: tensor for name, tensor in state.items() if name != "exp_avg:a.1"},
        state | {"exp_avg:a.1": torch.ones(1, 3)},
        state | {"parameter:a.7": torch.ones(5, 3)},
        driver.export_run("b"),
    ):
        with pytest.raises(ValueError, match="does not fit the adapter of run a"):
            driver.import_run("a", {name: tensor + 1 for name, tensor in broken.items()})
    if zero_stage > 0:
        with pytest.raises(ValueError, match="different numbers of steps"):
            driver.import_run("a", state | {"step:a.1": torch.tensor(9.0)})
    after = driver.export_run("a")
    assert all(torch.equal(after[name], state[name]) for name in state)
    driver.close()


def rows_of(train_id: str, count: int) -> list[TrainingRow]:
    return [
        TrainingRow(
            train_id=train_id,
            step=step,
            epoch=step / 3,
            loss=0.1 + step,
            gradient_norm=1e-300,
            learning_rate=0.1 / step,
            num_tokens=7,
            num_loss_tokens=3,
            seconds=0.1,
        )
        for step in range(1, count + 1)
    ]


def edited(change: Callable[[Any], object]) -> Callable[[Path], None]:
    """A damage that loads checkpoint.json, changes what is in it, and writes it back."""

    def damage(folder: Path) -> None:
        path = folder / "checkpoint.json"
        metadata = json.loads(path.read_text())
        change(metadata)
        path.write_text(json.dumps(metadata))

    return damage


def torn(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


def missing(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "torn state": (torn("state.safetensors"), "not the one that"),
    "torn metadata": (torn("checkpoint.json"), "cannot be read"),
    "no state": (missing("state.safetensors"), "cannot be read"),
    "no metadata": (missing("checkpoint.json"), "cannot be read"),
    "another run": (edited(lambda data: data.update(train_id="other")), "it is of run other, not of run mine"),
    "another format": (edited(lambda data: data.update(format=2)), "not of format 1"),
    "not an object": (lambda folder: cast(None, (folder / "checkpoint.json").write_text("[]")), "not of format 1"),
    "no rows": (edited(lambda data: data.pop("rows")), "no rows"),
    "a row left out": (edited(lambda data: data["rows"].pop(0)), "row 1 .* is not step 1"),
    "a row of another run": (edited(lambda data: data["rows"][1].update(train_id="x")), "row 2 .* is not step 2"),
    "a number as text": (edited(lambda data: data["rows"][1].update(loss="0.1")), "row 2"),
    "an unknown column": (edited(lambda data: data["rows"][1].update(more=1)), "row 2"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_foreign_checkpoint_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoint"
    state = {"parameter:p": torch.randn(3, 2), "step:p": torch.tensor(2.0)}
    write_checkpoint(folder, "mine", rows_of("mine", 2), state)
    rows, read = read_checkpoint(folder, "mine")
    assert rows == rows_of("mine", 2)
    assert all(torch.equal(read[key], state[key]) for key in state)
    damage, reason = DAMAGES[name]
    damage(folder)
    with pytest.raises(CheckpointError, match=reason):
        read_checkpoint(folder, "mine")


def test_a_checkpoint_that_cannot_be_used_starts_the_training_over(base: LoadedBase, tmp_path: Path) -> None:
    """Torn, of another run, of an adapter of another shape, and of a longer run: a line in the log each, no crash."""
    wanted = undisturbed(base, full(max_steps=2))
    others: dict[str, RunSpec] = {"other": full("other"), "run0": full(lora=LoraSettings(rank=3)), "longer": full()}
    checkpoints = {}
    for name, other in others.items():
        sink = MortalSink(3 if name == "longer" else 1)
        killed(base, [other], {other.train_id: sink})
        checkpoints[name] = sink.checkpoints[-1]
    checkpoints["torn"] = {**checkpoints["longer"], "state.safetensors": b"half"}
    reasons = {
        "other": "it is of run other, not of run run0",
        "run0": "does not fit the adapter",
        "longer": "it is 3 steps on, and the run has 2",
        "torn": "not the one that",
    }
    for name, reason in reasons.items():
        sink = MortalSink(None, on_disk(checkpoints[name], tmp_path / name))
        _, (result,) = train_pack(base, [full(max_steps=2)], {"run0": sink})
        assert sink.lines[0].startswith("checkpoint ignored, the training starts over: ")
        assert reason in sink.lines[0]
        assert_same((result, sink), wanted)


def steps_of(sink: MemorySink) -> list[int]:
    """After which steps the sink's checkpoints were made."""
    return [len(json.loads(checkpoint["checkpoint.json"])["rows"]) for checkpoint in sink.checkpoints]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (CheckpointSettings(every_steps=2), [2, 4, 6]),
        (CheckpointSettings(every_steps=4), [4]),
        (CheckpointSettings(every_minutes=1e-9), [1, 2, 3, 4, 5, 6]),
        (CheckpointSettings(every_steps=4, every_minutes=1e3), [4]),
        (CheckpointSettings(every_minutes=1e3), []),
    ],
)
def test_checkpoints_are_made_when_due(
    base: LoadedBase, reference: tuple[RunResult, MemorySink], settings: CheckpointSettings, expected: list[int]
) -> None:
    sink = MemorySink()
    _, (result,) = train_pack(base, [full()], {"run0": sink}, checkpoints=settings)
    assert steps_of(sink) == expected
    assert_same((result, sink), reference)


def test_a_run_that_ends_before_its_pack_is_kept(base: LoadedBase) -> None:
    sinks = {"long": MemorySink(), "short": MemorySink()}
    specs = [full("long", max_steps=3), full("short", max_steps=1)]
    train_pack(base, specs, sinks, checkpoints=CheckpointSettings(every_minutes=1e3))
    assert {name: steps_of(sink) for name, sink in sinks.items()} == {"long": [], "short": [1]}


def test_minutes_are_minutes() -> None:
    settings = CheckpointSettings(every_minutes=0.5)
    assert [settings.due(1, seconds) for seconds in (0, 29.9, 30, 31)] == [False, False, True, True]
    assert not CheckpointSettings().due(1, 1e9)
