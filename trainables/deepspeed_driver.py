"""The only file that talks to DeepSpeed: precision, ZeRO and the optimizer step of a pack.

One parameter group per run. DeepSpeed clips nothing (``gradient_clipping: 0``): clipping is per run and done here,
because at ZeRO stages 1 and 2 ``p.grad`` is None after the backward pass and the usual clipping would silently do
nothing. No ``bf16`` block is given: it would cast the adapters; a bf16 base keeps its fp32 adapters.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

ZeroStage = Literal[0, 1, 2]

if not torch.cuda.is_available():  # at import: transformers may import DeepSpeed first, which then warns about it
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


@dataclass(frozen=True)
class RunParameters:
    """What the optimizer needs to know of one run."""

    name: str
    parameters: Sequence[nn.Parameter]
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8


def _deepspeed() -> Any:
    """Import DeepSpeed quietly and so that nothing is ever compiled at run time on a CPU."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        import deepspeed.ops

        # init_distributed would build the shm_comm operator with a C++ compiler (90 s, and a lock file that hangs
        # every later start if the build is killed). Plain gloo does the same for one worker. A private table: where
        # a later DeepSpeed has no such table, it has no such build to switch off either.
        with contextlib.suppress(AttributeError):
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _ensure_process_group(deepspeed: Any) -> None:
    """A process group of one, without a port, unless a launcher (Ray Train) has made a larger one already."""
    if not torch.distributed.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed.init_distributed(
        dist_backend=torch.distributed.get_backend(),
        auto_mpi_discovery=False,
        dist_init_required=False,
        verbose=False,
    )


class DeepSpeedDriver:
    """Backward passes and AdamW steps for the runs of a pack.

    Order of calls for one optimizer step: ``backward`` for every micro-batch of every run, the very last one with
    ``last=True``; ``gradient_norm`` and ``clip`` per run; ``step`` with a learning rate for every run (0 for a run
    that has ended: its momentum would move it on).
    """

    def __init__(self, model: nn.Module, runs: Sequence[RunParameters], zero_stage: ZeroStage = 0) -> None:
        deepspeed = _deepspeed()
        _ensure_process_group(deepspeed)
        self.runs = {run.name: run for run in runs}
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": list(run.parameters),
                    "weight_decay": run.weight_decay,
                    "lr": 0.0,
                    "betas": run.betas,
                }
                | {"eps": run.epsilon, "run": run.name}
                for run in runs
            ]
        )
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,  # losses are divided by token counts before they come here
                "gradient_clipping": 0.0,
                "zero_optimization": {"stage": zero_stage},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 2**31,
            },
        )
        self.optimizer = optimizer
        self.zero_stage = zero_stage

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate the gradients of a scalar loss; ``last``: no further backward follows before the step."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def gradient_norm(self, run: str) -> float:
        """L2 norm over all parameters of the run, 0 where it has no gradient; inf or nan if it is not finite."""
        gradients = [gradient for _, gradient in self._gradients(run)]
        if not gradients:
            return 0.0
        return float(torch.nn.utils.get_total_norm(gradients))

    def clip(self, run: str, norm: float, max_norm: float) -> None:
        """Scale the run's gradients by max_norm / (norm + 1e-6) if that is below 1.

        In the arithmetic of ``torch.nn.utils.clip_grad_norm_``, so that both give the same gradients to the bit.
        """
        from deepspeed.utils import safe_set_full_grad

        for parameter, gradient in self._gradients(run):
            scale = max_norm / (torch.tensor(norm, dtype=gradient.dtype, device=gradient.device) + 1e-6)
            safe_set_full_grad(parameter, gradient * scale.clamp(max=1.0))

    def step(self, learning_rates: Mapping[str, float]) -> None:
        """One AdamW step for all runs; gradients are cleared."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rates[group["run"]]
        self.engine.step()

    def close(self) -> None:
        """Give back what DeepSpeed holds. The module keeps its parameters."""
        self.engine.destroy()

    def _gradients(self, run: str) -> list[tuple[nn.Parameter, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_grad

        pairs = [(parameter, safe_get_full_grad(parameter)) for parameter in self.runs[run].parameters]
        return [(parameter, gradient) for parameter, gradient in pairs if gradient is not None]
