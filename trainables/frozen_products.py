"""Products with a frozen weight matrix, by the faster of the two libraries that PyTorch carries on a CPU.

Legend: m positions, i inputs, o outputs.

On a CPU in float32 ``torch.mm`` and ``F.linear`` call MKL, which on processors of other makers than its own does not
use its fastest kernels: on an AMD EPYC with AVX-512 oneDNN, which PyTorch carries too, does the products of a
135M model 1.1 to 1.2 times as fast (docs/benchmarks.md). These products are most of a training step. Both libraries
sum in float32, in different orders: results agree to rounding and not to the bit, so which one is used depends on the
machine, the dtype and the weight's size alone, never on a measurement.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F

MIN_NUMEL = 2**15  # of the weight: below it a call costs more than it saves
_TOLERANCE = 1e-5  # of the probe, relative to the largest entry: float32 rounds at 6e-8


def linear(x_mi: torch.Tensor, weight_oi: torch.Tensor, bias_o: torch.Tensor | None) -> torch.Tensor:
    """x W^T + bias, [m, o], without a graph: for use in autograd functions."""
    if _by_onednn(x_mi, weight_oi):
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_mi, weight_oi, bias_o, "none", [], "")
        return product
    return F.linear(x_mi, weight_oi, bias_o)


def back(gradient_mo: torch.Tensor, weight_oi: torch.Tensor) -> torch.Tensor:
    """dL/dx = (dL/dy) W, [m, i], without a graph."""
    if _by_onednn(gradient_mo, weight_oi):
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(gradient_mo, weight_oi.t(), None, "none", [], "")
        return product
    return torch.mm(gradient_mo, weight_oi)


def _by_onednn(one_m: torch.Tensor, weight_oi: torch.Tensor) -> bool:
    return (
        one_m.dtype == weight_oi.dtype == torch.float32
        and one_m.device.type == weight_oi.device.type == "cpu"
        and weight_oi.numel() >= MIN_NUMEL
        and one_m.shape[0] > 0
        and is_faster()
    )


@functools.cache
def is_faster() -> bool:
    """Whether oneDNN is there, is right, and this processor is one on which MKL leaves something to gain.

    PyTorch's operator is made for its own compiler and may change: it is used only if it agrees with ``F.linear``.
    """
    if not torch.backends.mkldnn.is_available() or not _is_amd():
        return False
    x_mi, weight_oi = torch.linspace(-1, 1, 3 * 8).view(3, 8), torch.linspace(-2, 1, 5 * 8).view(5, 8).sin()
    try:
        found_mo = torch.ops.mkldnn._linear_pointwise(x_mi, weight_oi, None, "none", [], "")
        found_mi = torch.ops.mkldnn._linear_pointwise(found_mo, weight_oi.t(), None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):  # another PyTorch
        return False
    wanted_mo = F.linear(x_mi, weight_oi)
    return _agree(found_mo, wanted_mo) and _agree(found_mi, wanted_mo @ weight_oi)


def _agree(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= _TOLERANCE * wanted.abs().max())


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux: nothing has been measured there
        return False
