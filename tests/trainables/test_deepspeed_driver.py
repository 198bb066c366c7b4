"""The optimizer driver against torch.optim.AdamW and torch's own clipping, run by run, at every ZeRO stage.

float32 on one thread, one worker: DeepSpeed does the same operations, so equality is asked to the bit.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import pytest
import torch
from torch import nn

from trainables.deepspeed_driver import DeepSpeedDriver, RunParameters, ZeroStage

STAGES = (0, 1, 2)
LIMITS = {"a": 0.05, "b": 1e9}


class TwoRuns(nn.Module):
    """Two independent little nets, as two adapters of a pack are, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.a = nn.ParameterList([nn.Parameter(torch.randn(5, 3, generator=draw)) for _ in range(2)])
        self.b = nn.ParameterList([nn.Parameter(torch.randn(4, 3, generator=draw)) for _ in range(3)])
        self.frozen = nn.Parameter(torch.randn(3, generator=draw), requires_grad=False)

    def loss(self, run: str, step: int) -> torch.Tensor:
        """Another one each step, so that gradients change."""
        draw = torch.Generator().manual_seed(step)
        parts = [(p @ (self.frozen * torch.randn(3, generator=draw))).tanh().square().sum() for p in getattr(self, run)]
        return torch.stack(parts).sum()


@dataclass
class Reference:
    """What plain PyTorch makes of one run."""

    module: TwoRuns
    optimizer: torch.optim.AdamW


@pytest.fixture
def references() -> dict[str, Reference]:
    made = {}
    for run, decay in (("a", 0.1), ("b", 0.0)):
        module = TwoRuns()
        made[run] = Reference(module, torch.optim.AdamW(getattr(module, run), lr=0.1, weight_decay=decay))
    return made


@pytest.fixture(params=STAGES)
def driven(request: pytest.FixtureRequest) -> Iterator[tuple[TwoRuns, DeepSpeedDriver]]:
    module = TwoRuns()
    runs = [RunParameters("a", list(module.a), 0.1), RunParameters("b", list(module.b), 0.0)]
    driver = DeepSpeedDriver(module, runs, cast(ZeroStage, request.param))
    yield module, driver
    driver.close()


def test_two_runs_are_stepped_as_if_each_were_alone(
    driven: tuple[TwoRuns, DeepSpeedDriver], references: dict[str, Reference]
) -> None:
    """Own decay, rate and clipping, with accumulation; run ``b`` ends after three steps and must then stand still."""
    module, driver = driven
    for step in range(6):
        active = ("a", "b") if step < 3 else ("a",)
        rates = {"a": 0.1 / (step + 1), "b": 0.03 if step < 3 else 0.0}
        for run in active:
            for half in (0, 1):
                loss = module.loss(run, 2 * step + half)
                driver.backward(loss, last=run == active[-1] and half == 1)
        norms = {run: driver.gradient_norm(run) for run in active}
        for run in active:
            driver.clip(run, norms[run], LIMITS[run])
        driver.step(rates)
        for run in active:
            reference = references[run]
            for half in (0, 1):
                reference.module.loss(run, 2 * step + half).backward()
            parameters = list(getattr(reference.module, run))
            assert norms[run] == float(torch.nn.utils.clip_grad_norm_(parameters, LIMITS[run]))
            reference.optimizer.param_groups[0]["lr"] = rates[run]
            reference.optimizer.step()
            reference.optimizer.zero_grad()
        for run in ("a", "b"):
            for ours, theirs in zip(getattr(module, run), getattr(references[run].module, run), strict=True):
                assert torch.equal(ours, theirs), (step, run)
        if step == 0:
            assert norms["a"] > LIMITS["a"], "clipping must act"
    assert torch.equal(module.frozen, TwoRuns().frozen)


def test_clipping_changes_the_gradient_that_the_step_uses(driven: tuple[TwoRuns, DeepSpeedDriver]) -> None:
    """At stages 1 and 2 ``p.grad`` is None, and clipping that writes to it silently does nothing."""
    module, driver = driven
    driver.backward(module.loss("a", 0) + module.loss("b", 0), last=True)
    before = {run: driver.gradient_norm(run) for run in ("a", "b")}
    driver.clip("a", before["a"], 0.01)
    assert driver.gradient_norm("a") == pytest.approx(0.01, rel=1e-4)  # torch adds 1e-6 to the norm it divides by
    assert driver.gradient_norm("b") == before["b"]
    driver.clip("b", before["b"], 2 * before["b"])
    assert driver.gradient_norm("b") == before["b"], "a norm below the limit stays"
    driver.step({"a": 0.1, "b": 0.1})


def test_gradients_are_cleared_by_the_step(driven: tuple[TwoRuns, DeepSpeedDriver]) -> None:
    module, driver = driven
    for _ in range(2):
        driver.backward(module.loss("a", 0), last=True)
        norm = driver.gradient_norm("a")
        driver.step({"a": 0.0, "b": 0.0})  # nothing moves: the same gradient again, not twice as much
    assert norm == pytest.approx(float(_norm_by_hand("a", 0)), rel=1e-6)
    assert all(
        torch.equal(ours, start) for ours, start in zip(module.parameters(), TwoRuns().parameters(), strict=True)
    )


def _norm_by_hand(run: str, step: int) -> torch.Tensor:
    module = TwoRuns()
    module.loss(run, step).backward()
    return torch.cat([p.grad.flatten() for p in getattr(module, run)]).norm()


def test_a_run_without_gradient_has_norm_zero(driven: tuple[TwoRuns, DeepSpeedDriver]) -> None:
    module, driver = driven
    driver.backward(module.loss("a", 0), last=True)
    assert driver.gradient_norm("b") == 0.0
    assert driver.gradient_norm("a") > 0.0


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_is_reported(driven: tuple[TwoRuns, DeepSpeedDriver], value: float) -> None:
    module, driver = driven
    driver.backward(module.loss("a", 0) * value, last=True)
    assert not torch.isfinite(torch.tensor(driver.gradient_norm("a")))


def test_no_compiler_is_needed() -> None:
    """In a process of its own with no compiler on PATH: nothing is built at run time on a CPU."""
    if torch.cuda.is_available():
        pytest.skip("about CPU machines")
    command = (
        "from tests.trainables.test_deepspeed_driver import *\n"
        "module = TwoRuns()\n"
        "driver = DeepSpeedDriver(module, [RunParameters('a', list(module.a), 0.1)], 0)\n"
        "driver.backward(module.loss('a', 0), last=True)\n"
        "driver.step({'a': 0.1})\n"
        "print('stepped')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("PATH", "CC", "CXX")}
    environment |= {"PATH": "/nonexistent", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.endswith("stepped\n"), done.stderr
