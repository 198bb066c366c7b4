"""Moving weights along a direction, in place, and back to the very bits they had."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def edited(
    parameters: Mapping[str, nn.Parameter], changes: Iterable[tuple[str, torch.Tensor]], alpha: float
) -> Iterator[None]:
    """While this is open, theta + alpha V stands in the model; ``changes`` are V by name of the parameter.

    The sum is made in float64 and rounded to the parameter's dtype once. A parameter is pointed at new memory and back
    at the old, which is never written to: afterwards, also after an error, every bit is what it was. Costs one copy of
    the parameters that change. All models that share the parameters are moved with them.
    """
    before: dict[str, torch.Tensor] = {}
    try:
        with torch.no_grad():
            for name, values in changes:
                assert name not in before, f"{name} is changed twice"
                parameter = parameters[name]
                before[name] = parameter.data
                step = values.to(parameter.device, torch.float64) * alpha
                parameter.data = (parameter.data + step).to(parameter.dtype)  # new memory: the step is float64
        yield
    finally:
        for name, data in before.items():
            parameters[name].data = data
