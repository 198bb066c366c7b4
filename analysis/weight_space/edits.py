"""Moving weights along a direction, in place, and back to the very bits they had."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


def move(
    parameters: Mapping[str, nn.Parameter], changes: Iterable[tuple[str, torch.Tensor]], alpha: float
) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Point every parameter that changes at new memory with theta + alpha V, and give it with the old one.

    The sum is made in float64 and rounded to the parameter's dtype once.
    """
    for name, values in changes:
        parameter = parameters[name]
        before = parameter.data
        step = values.to(parameter.device, torch.float64) * alpha
        parameter.data = (before + step).to(parameter.dtype)  # new memory: the step is float64
        yield parameter, before


@contextmanager
def edited(
    parameters: Mapping[str, nn.Parameter], changes: Iterable[tuple[str, torch.Tensor]], alpha: float
) -> Iterator[None]:
    """While this is open, theta + alpha V stands in the model; ``changes`` are V by name of the parameter.

    A parameter is pointed at new memory and back at the old, which is never written to: afterwards, also after an
    error, every bit is what it was. Costs one copy of the parameters that change. All models that share the parameters
    are moved with them.
    """
    before: list[tuple[nn.Parameter, torch.Tensor]] = []
    try:
        with torch.no_grad():
            for moved in move(parameters, changes, alpha):
                before.append(moved)
        yield
    finally:
        for parameter, data in reversed(before):
            parameter.data = data
