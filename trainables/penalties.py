"""Penalties: terms of a run's loss that are read off the residual stream or off its gradient.

Legend: n rows of a run in a micro-batch, t tokens, d hidden size.

A penalty is ``strength`` times the mean of a value per token, over the chosen tokens of the WHOLE optimizer step and
over its layers, so that it depends neither on how the step is cut nor on how many layers are listed:

    strength / (tokens of the step * layers) * sum over layers and tokens of value

It adds to the run's loss. A penalty of the gradient is of second order: its value is a function of g = dL/dh, L the
SUM of next-token losses, and what a parameter sees of it is the derivative of a derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from trainables.residual_stream import ReadValue


@dataclass(frozen=True, eq=False)
class Penalty:
    """One penalty of one run in one micro-batch.

    per_token: (layer, h or g [n, t, d] of this run's rows) -> [n, t], the value of every token; differentiable.
    token_mask: [n, t] bool, the tokens that count.
    of_gradient: whether ``per_token`` gets g instead of h.
    """

    name: str
    layers: tuple[int, ...]
    strength: float
    token_mask: torch.Tensor
    per_token: Callable[[int, torch.Tensor], torch.Tensor]
    of_gradient: bool = False


class ReadPenalties:
    """The penalties of one micro-batch while its forward pass runs: what they need is read by ``readers``.

    ``num_tokens``: how many tokens each of them counts in the whole optimizer step. ``rows``: this run's, on the CPU.
    """

    def __init__(self, penalties: Sequence[Penalty], num_tokens: Sequence[int], rows: torch.Tensor) -> None:
        self.penalties = penalties
        self.num_tokens = num_tokens
        self.rows = rows
        self._hidden: dict[int, torch.Tensor] = {}

    @property
    def readers(self) -> list[ReadValue]:
        layers = sorted({layer for penalty in self.penalties for layer in penalty.layers})
        return [ReadValue(layer, self._hidden.__setitem__) for layer in layers]

    def terms(self, summed_loss: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scalar by the penalty's name, after the forward pass; ``summed_loss`` is this micro-batch's L."""
        of_gradient = sorted({layer for one in self.penalties if one.of_gradient for layer in one.layers})
        gradients: dict[int, torch.Tensor] = {}
        if of_gradient:
            read = [self._hidden[layer] for layer in of_gradient]
            found = torch.autograd.grad(summed_loss, read, create_graph=True)
            gradients = dict(zip(of_gradient, found, strict=True))
        terms: dict[str, torch.Tensor] = {}
        for penalty, count in zip(self.penalties, self.num_tokens, strict=True):
            mask_nt = penalty.token_mask.to(summed_loss.device)
            factor = penalty.strength / (count * len(penalty.layers))
            for layer in penalty.layers:
                values_btd = gradients[layer] if penalty.of_gradient else self._hidden[layer]
                # all rows of a training are its own as a rule: nothing is copied then
                own_ntd = values_btd if self.rows.numel() == values_btd.shape[0] else values_btd[self.rows]
                value_nt = penalty.per_token(layer, own_ntd)
                term = factor * value_nt.masked_fill(~mask_nt, 0.0).sum()
                terms[penalty.name] = terms[penalty.name] + term if penalty.name in terms else term
        return terms
