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
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

ZeroStage = Literal[0, 1, 2, 3]
_MOMENTS = ("exp_avg", "exp_avg_sq")
_KINDS = ("parameter", *_MOMENTS, "step")

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
        # every later start if the build is killed). Plain gloo does the same. A private table: where
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
        self._num_workers = torch.distributed.get_world_size()
        if zero_stage == 3 and len(runs) > 1:
            raise ValueError("a pack cannot be trained at ZeRO stage 3")
        self.runs = {run.name: run for run in runs}
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
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
                # one group of values per run at stage 3, however many there are
                "zero_optimization": {"stage": zero_stage} | ({"sub_group_size": 2**62} if zero_stage == 3 else {}),
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 2**31,
            },
        )
        self.optimizer = optimizer
        self.zero_stage = zero_stage
        self._is_open = False  # a backward pass was not the last one before a step, and none has been yet

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate the gradients of a scalar loss; ``last``: no further backward follows before the step.

        Of several workers each has the loss of its own rows, and the gradient is that of the sum of them.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        if self.zero_stage == 3:
            # what DeepSpeedEngine.forward does, through which no pass of ours goes: without it each backward pass of a
            # step takes the place of the one before
            self.engine.optimizer.clear_backward_seen_flag()
        # DeepSpeed takes the mean over workers
        self.engine.backward(loss if self._num_workers == 1 else loss * self._num_workers)
        self._is_open = not last

    def discard(self, run: str) -> None:
        """Make the run's gradients of this step zero, whatever they are: one that is not finite would reach the
        parameters at any learning rate, and at stages 1 and 2 keep all runs of the pack from stepping."""
        for parameter, gradient in self._gradients(run):
            self._set_gradient(parameter, torch.zeros_like(gradient))

    def finish_accumulation(self) -> None:
        """Say that no backward pass follows, where the one that should have been the last did not come about."""
        if self._is_open:
            run = next(iter(self.runs.values()))
            self.backward(torch.stack([(0.0 * parameter).sum() for parameter in run.parameters]).sum(), last=True)

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
        if self.zero_stage == 0:  # a pack has thousands of parameters: all of a run's in a few operations
            own = self.runs[run].parameters
            torch.nn.utils.clip_grads_with_norm_(own, max_norm, torch.tensor(norm, dtype=own[0].dtype))
            return
        for parameter, gradient in self._gradients(run):
            scale = max_norm / (torch.tensor(norm, dtype=gradient.dtype, device=gradient.device) + 1e-6)
            self._set_gradient(parameter, gradient * scale.clamp(max=1.0))

    def step(self, learning_rates: Mapping[str, float]) -> None:
        """One AdamW step for all runs; gradients are cleared."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rates[group["run"]]
        self.engine.step()

    def export_run(self, run: str) -> dict[str, torch.Tensor]:
        """Everything that a run has here between two steps, as copies on the CPU; every worker must call it.

        Keys are ``<kind>:<parameter's name in the model>`` with kinds parameter, exp_avg, exp_avg_sq (full tensors of
        the parameter's shape, whatever the ZeRO stage) and step (a float32 scalar: AdamW steps done).
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        stepped = self._stepped(run)
        state: dict[str, torch.Tensor] = {}
        for parameter, own in zip(self.runs[run].parameters, stepped, strict=True):
            name, moments = self._names[id(parameter)], self.optimizer.state[own]
            values = {"step": moments["step"].to(torch.float32)}
            if self.zero_stage == 0:
                values |= {"parameter": parameter.data} | {kind: moments[kind] for kind in _MOMENTS}
            else:
                values["parameter"] = safe_get_full_fp32_param(parameter)
                values |= {kind: safe_get_full_optimizer_state(parameter, kind) for kind in _MOMENTS}
            state |= {f"{kind}:{name}": values[kind].detach().to("cpu", copy=True).contiguous() for kind in _KINDS}
        return state

    def import_run(self, run: str, state: Mapping[str, torch.Tensor]) -> None:
        """Put a run where ``export_run`` found it, at any ZeRO stage and in any pack; between two steps only.

        Raises ValueError, with nothing changed, if ``state`` does not fit the run's parameters.
        """
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        self._check(run, state)
        stepped = self._stepped(run)
        for parameter, own in zip(self.runs[run].parameters, stepped, strict=True):
            name, moments = self._names[id(parameter)], self.optimizer.state[own]
            values = {kind: state[f"{kind}:{name}"].to(parameter.device) for kind in _KINDS}
            moments["step"].copy_(values["step"])
            # The parameter is written at every stage: from 1 on its full-precision copy reaches it with the next step.
            if self.zero_stage == 0:
                parameter.data.copy_(values["parameter"])
                for kind in _MOMENTS:
                    moments[kind].copy_(values[kind])
            elif self.zero_stage == 3:
                own_values = {kind: _own_part(parameter, values[kind]) for kind in ("parameter", *_MOMENTS)}
                parameter.ds_tensor.data.copy_(own_values["parameter"])  # type: ignore[attr-defined]
                safe_set_local_fp32_param(parameter, own_values["parameter"])
                for kind in _MOMENTS:
                    safe_set_local_optimizer_state(parameter, own_values[kind], kind)
            else:
                parameter.data.copy_(values["parameter"])
                safe_set_full_fp32_param(parameter, values["parameter"])
                for kind in _MOMENTS:
                    safe_set_full_optimizer_state(parameter, values[kind], kind)

    def gathered(self, run: str) -> AbstractContextManager[None]:
        """A context in which the run's parameters have their values at any stage; every worker must enter it."""
        import deepspeed

        if self.zero_stage < 3:
            return contextlib.nullcontext()
        context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(list(self.runs[run].parameters))
        return context

    def close(self) -> None:
        """Give back what DeepSpeed holds. The module keeps its parameters."""
        self.engine.destroy()

    def _stepped(self, run: str) -> list[torch.Tensor]:
        """For every parameter of the run the tensor that AdamW steps for it, with its state there and linked.

        That is the parameter at stage 0, and one flat partition for all of them at the others. At stages 1 and 2
        DeepSpeed links parameters to the state of their partition once, after the first step of the FIRST group, when
        the other groups have none yet; so it is done again here.
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        (group,) = [group for group in self.optimizer.param_groups if group["run"] == run]
        # at stage 3 a group has its tensor only while AdamW steps
        flat = group["params"] if self.zero_stage < 3 else self.engine.optimizer.fp32_partitioned_groups_flat
        for tensor in flat:
            if not self.optimizer.state[tensor]:  # what AdamW itself begins with
                zeros = {kind: torch.zeros_like(tensor, requires_grad=False) for kind in _MOMENTS}
                self.optimizer.state[tensor] = {"step": torch.tensor(0.0, dtype=torch.float32), **zeros}
        parameters = list(self.runs[run].parameters)
        if self.zero_stage == 0:
            return parameters  # type: ignore[return-value]
        (partition,) = flat
        if self.zero_stage < 3:
            lazy_init_hp_params_optimizer_state(parameters, partition, self.optimizer.state)
        return [partition] * len(parameters)

    def _check(self, run: str, state: Mapping[str, torch.Tensor]) -> None:
        """Raise ValueError unless ``state`` has exactly this run's tensors."""
        shapes: dict[str, torch.Size] = {}
        for parameter in self.runs[run].parameters:
            name = self._names[id(parameter)]
            full = getattr(parameter, "ds_shape", parameter.shape)  # at stage 3 a parameter itself is empty
            shapes |= {f"{kind}:{name}": torch.Size() if kind == "step" else full for kind in _KINDS}
        found = {name: tensor.shape for name, tensor in state.items()}
        if found != shapes:
            wrong = sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
            raise ValueError(
                f"the state does not fit the adapter of run {run}: {len(wrong)} tensors are missing, unknown or of "
                f"another shape, among them {wrong[0]}"
            )
        steps = {float(tensor) for name, tensor in state.items() if name.startswith("step:")}
        if self.zero_stage > 0 and len(steps) > 1:
            raise ValueError(
                f"parameters of run {run} have done different numbers of steps: only ZeRO stage 0 can go on"
            )

    def _gradients(self, run: str) -> list[tuple[nn.Parameter, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_grad

        pairs = [(parameter, safe_get_full_grad(parameter)) for parameter in self.runs[run].parameters]
        return [(parameter, gradient) for parameter, gradient in pairs if gradient is not None]

    def _set_gradient(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_full_grad, safe_set_local_grad

        if self.zero_stage == 3:
            safe_set_local_grad(parameter, _own_part(parameter, gradient))
        else:
            safe_set_full_grad(parameter, gradient)


def _own_part(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """What of the values of a parameter this worker holds at ZeRO stage 3: one of equal parts, the last filled up.

    DeepSpeed's own functions that take whole tensors fail where the parts do not come out even.
    """
    size = parameter.ds_tensor.numel()
    flat = torch.zeros(size * torch.distributed.get_world_size(), dtype=value.dtype, device=value.device)
    flat[: value.numel()] = value.flatten()
    return flat.narrow(0, size * torch.distributed.get_rank(), size)
