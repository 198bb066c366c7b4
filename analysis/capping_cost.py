"""What capping costs beside a forward pass, in floating-point operations: a model of it, for sizes that are not here.

Per generated token a decoder of P parameters takes about 2 P operations (a multiplication and an addition each; the
attention over earlier tokens, which grows with their number, is left out, which makes the share of capping larger).
Capping a layer of hidden size d takes

    2 d    for the projection s = <h, a>
    2      for the two clamps
    2 d    for h + (s' - s) a, which an implementation may leave out for tokens that are inside (ours computes it)

The document counts the projection alone; both are here. An axis is d numbers per capped layer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """A decoder: parameters, layers, hidden size."""

    name: str
    num_parameters: float
    num_layers: int
    hidden_size: int


SIZES = (
    Size("125M", 125e6, 12, 768),
    Size("350M", 350e6, 24, 1024),
    Size("1.3B", 1.3e9, 24, 2048),
    Size("6.7B", 6.7e9, 32, 4096),
    Size("13B", 13e9, 40, 5120),
    Size("70B", 70e9, 80, 8192),
    Size("175B", 175e9, 96, 12288),
)
"""The sizes of the document's table 3, with the layers and hidden sizes of models of these names."""

DOCUMENT_PERCENT = (0.0074, 0.0070, 0.0038, 0.0020, 0.0016, 0.0009, 0.0007)
"""Overhead in that table, in percent, in the same order."""


@dataclass(frozen=True)
class Cost:
    """Capping every layer of one model, per token."""

    size: Size
    projection_percent: float  # projections alone, of the forward pass
    whole_percent: float  # with clamps and writing back
    axis_kilobytes: float  # float32 axes of all layers, 1024 bytes each


def cost_of(size: Size) -> Cost:
    """The shares of the forward pass, in percent, and the memory of the axes."""
    forward = 2 * size.num_parameters
    projection = size.num_layers * 2 * size.hidden_size
    whole = size.num_layers * (4 * size.hidden_size + 2)
    memory = size.num_layers * size.hidden_size * 4 / 1024
    return Cost(size, 100 * projection / forward, 100 * whole / forward, memory)


def cost_table() -> str:
    """The seven sizes beside the document's numbers, as lines of text."""
    lines = [f"{'size':<6}{'projection %':>14}{'document %':>12}{'whole cap %':>13}{'axes KB':>10}"]
    for size, document in zip(SIZES, DOCUMENT_PERCENT, strict=True):
        cost = cost_of(size)
        lines.append(
            f"{size.name:<6}{cost.projection_percent:>14.4f}{document:>12.4f}{cost.whole_percent:>13.4f}"
            f"{cost.axis_kilobytes:>10.0f}"
        )
    return "\n".join(lines)
