"""Norms and rotary embeddings of a frozen model as single nodes of the autograd graph, for trainings.

transformers writes both as chains of elementwise operations. Each of them goes over all activations once in the
forward pass and two or three times in the backward pass, which on a CPU took an eighth of a training step. With frozen
weights only the gradient of the input is needed, and it has a short closed form:

    RMSNorm    y = w x r, r = (mean x^2 + eps)^(-1/2)      dL/dx = r (u - (x r) mean(u x r)), u = w dL/dy
    rotation   y = R x, R orthogonal up to a factor         dL/dx = R^T dL/dy

Names say little about what a module computes (Gemma's norm scales by 1 + w, GPT-NeoX turns a part of each head), so a
module is replaced only if the model's own version and ours agree on random numbers; else it stays as it is, and the
log of the training counts it. Models in bfloat16 stay as they are: there the order of rounding is part of the result.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_ROTATION = "apply_rotary_pos_emb"  # what transformers calls it in every modeling file
_TOLERANCE = 1e-5  # of the probe: float32 rounds at 6e-8, other formulas differ by far more
_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class NativeOps:
    """How many modules of a model are replaced, and how many there are."""

    norms: int
    all_norms: int
    rotations: int
    all_rotations: int

    def __str__(self) -> str:
        return f"{self.norms} of {self.all_norms} norms, {self.rotations} of {self.all_rotations} rotary embeddings"


@contextmanager
def native_ops(model: nn.Module) -> Iterator[NativeOps]:
    """Replace what can be replaced in ``model``, in this copy of its modules alone, until the context is left.

    Passes without gradients use the model's own operations in the context too.
    """
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    rotating = [module for module in model.modules() if _ROTATION in _names_used(type(module).forward)]
    replaced: list[nn.Module] = []
    try:
        replaced += [module for module in norms if _replace_norm(module)]
        num_norms = len(replaced)
        replaced += [module for module in rotating if _replace_rotation(module)]
        yield NativeOps(num_norms, len(norms), len(replaced) - num_norms, len(rotating))
    finally:
        for module in replaced:
            del module.forward  # the class's own is found again


# Norms


class _FrozenRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, scale_d: torch.Tensor, eps: float) -> torch.Tensor:
        root = inputs.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed = inputs * root
        ctx.save_for_backward(normed, root, scale_d)
        return normed * scale_d

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        normed, root, scale_d = ctx.saved_tensors
        scaled = upstream[0] * scale_d
        along = torch.linalg.vecdot(scaled, normed).unsqueeze(-1)
        return scaled.addcmul_(normed, along, value=-1 / normed.shape[-1]).mul_(root), None, None


def _replace_norm(module: Any) -> bool:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if not isinstance(eps, float) or not isinstance(weight, torch.Tensor) or weight.requires_grad:
        return False
    if weight.dtype not in _DTYPES or "forward" in vars(module):
        return False
    probe = torch.linspace(-3, 2, 4 * weight.numel(), dtype=weight.dtype, device=weight.device).view(4, -1)
    with torch.no_grad():
        own = module(probe)
        for one_plus in (False, True):  # Llama and most others; Gemma
            scale = _scale(module, one_plus)
            if own.dtype == probe.dtype and torch.allclose(
                own, _FrozenRmsNorm.apply(probe, scale, eps), rtol=_TOLERANCE, atol=_TOLERANCE
            ):
                module.forward = functools.partial(_norm, module, one_plus, eps)
                return True
    return False


def _norm(module: Any, one_plus: bool, eps: float, hidden_states: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        own: torch.Tensor = type(module).forward(module, hidden_states)
        return own
    normed: torch.Tensor = _FrozenRmsNorm.apply(hidden_states, _scale(module, one_plus), eps)
    return normed


def _scale(module: Any, one_plus: bool) -> torch.Tensor:
    weight: torch.Tensor = module.weight
    return 1 + weight if one_plus else weight


# Rotary embeddings


class _Rotation(torch.autograd.Function):
    """x cos + (-x2, x1) sin with x = (x1, x2) the first entries of the last dimension, as many as cos has; the rest of
    x stays. cos and sin get no gradient."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        half, width = cos.shape[-1] // 2, cos.shape[-1]
        turned = _times(inputs, cos)
        turned[..., :half].addcmul_(inputs[..., half:width], sin[..., :half], value=-1)
        turned[..., half:width].addcmul_(inputs[..., :half], sin[..., half:])
        return turned

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        (gradient,) = upstream
        half, width = cos.shape[-1] // 2, cos.shape[-1]
        turned = _times(gradient, cos)
        turned[..., :half].addcmul_(gradient[..., half:width], sin[..., half:])
        turned[..., half:width].addcmul_(gradient[..., :half], sin[..., :half], value=-1)
        return turned, None, None


def _times(inputs: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
    width = cos.shape[-1]
    if width == inputs.shape[-1]:
        return inputs * cos
    return torch.cat((inputs[..., :width] * cos, inputs[..., width:]), dim=-1)


def _rotate(own: Callable[..., Any], q: torch.Tensor, k: torch.Tensor, *rest: Any, **keywords: Any) -> Any:
    """Queries and keys rotated by ours; by the model's ``own`` function without gradients, or of mixed dtypes."""
    cos, sin, unsqueeze_dim = _bound(*rest, **keywords)
    if not torch.is_grad_enabled() or not cos.dtype == sin.dtype == q.dtype == k.dtype:
        return own(q, k, *rest, **keywords)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotation.apply(q, cos, sin), _Rotation.apply(k, cos, sin)


def _bound(cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1) -> tuple[torch.Tensor, torch.Tensor, int]:
    return cos, sin, unsqueeze_dim


def _replace_rotation(module: Any) -> bool:
    """Give the module its class's own forward function again, in which the rotation's name means ours.

    Neither the class nor the library's module is touched.
    """
    forward = type(module).forward
    parameter = next(module.parameters(), None)
    if parameter is None or parameter.dtype not in _DTYPES or "forward" in vars(module):
        return False
    own = forward.__globals__.get(_ROTATION)
    if not callable(own) or not _is_the_usual_rotation(own):
        return False
    ours = functools.partial(_rotate, own)
    copied = types.FunctionType(
        forward.__code__, {**forward.__globals__, _ROTATION: ours}, forward.__name__, forward.__defaults__,
        forward.__closure__,
    )  # fmt: skip
    copied.__kwdefaults__ = forward.__kwdefaults__
    module.forward = types.MethodType(copied, module)
    return True


@functools.cache
def _is_the_usual_rotation(own: Callable[..., Any]) -> bool:
    """Whether ``own`` is what ours is: of whole heads, and of a part of each wherever it can do that at all."""
    return _agrees(own, 8) is True and _agrees(own, 4) is not False


def _agrees(own: Callable[..., Any], width: int) -> bool | None:
    """Whether both give the same for heads of 8 of which ``width`` entries turn; None if ``own`` cannot do it."""
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 5, 8, generator=draw), torch.randn(2, 1, 5, 8, generator=draw)
    cos, sin = torch.randn(1, 5, width, generator=draw), torch.randn(1, 5, width, generator=draw)
    try:
        found = own(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError, IndexError):  # another signature, other shapes
        return None
    if not isinstance(found, tuple) or len(found) != 2:
        return False
    ours = [_Rotation.apply(one, cos[:, None], sin[:, None]) for one in (q, k)]
    return all(
        one.shape == other.shape and torch.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE)
        for one, other in zip(found, ours, strict=True)
    )


def _names_used(function: Any) -> tuple[str, ...]:
    return getattr(getattr(function, "__code__", None), "co_names", ())
