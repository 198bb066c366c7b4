"""What ONE gradient step on one sample does to that sample's activations, beside the gradient.

Appendix D of arXiv 2604.16423:

    dtheta = - eta dL/dtheta        dh_i = h_i(theta + dtheta) - h_i(theta) = - eta sum_j J_i J_j^T g_j + O(eta^2)

with J = dh/dtheta and g = dL/dh of the step. A defense may be present in the step; h is read without it before and
after. Descent makes the sum of <dh_i, g_i> over all tokens negative where the step had nothing present: it is
- eta |dL/dtheta|^2 over the parameters below the layer.

The direction of dh does not depend on eta to first order. So what is given is how much of the loss the step would take
away to first order, eta |dL/dtheta|^2 / L, which means the same for all models, adapters and lengths; the eta that
results is kept.

Legend: n measured tokens, d hidden size.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from analysis.conditions import Condition
from analysis.gradients import unit_rows
from analysis.measured_batches import Item, Measured, Positions, Progress, aligned_items, read_values
from analysis.measured_rows import ActivationChangeRow
from trainables.base_model import LoadedBase
from trainables.defenses import Message
from trainables.lora import LoraSettings, add_adapter
from trainables.loss import token_losses
from trainables.residual_stream import ReadGradient, residual_stream

Moved: TypeAlias = Literal["full", "lora"]
"""What the step moves: all parameters, or those of a LoRA adapter."""

DECREASE = 0.01  # of the loss: on a model of 135M |dh| is then some 1e-3 of |h|, far above rounding and still small


@dataclass(frozen=True)
class Change:
    """One step on one sample. By layer, of the measured tokens, [n, d] each."""

    before: Mapping[int, torch.Tensor]  # h, nothing present
    gradient: Mapping[int, torch.Tensor]  # dL/dh of the step
    change: Mapping[int, torch.Tensor]  # dh, nothing present
    step_norm: float
    learning_rate: float


class Stepper:
    """A copy of a model that makes one step at a time and stands where it stood after each.

    ``model`` itself is never written to. lora: its adapters' parameters are moved; one without adapters gets a fresh
    one (``lora``, ``seed``), whose B is 0, so that only B moves. Raises ValueError for a model in low precision: a
    small step would be lost in rounding.
    """

    def __init__(
        self, base: LoadedBase, model: Any, moved: Moved, *, lora: LoraSettings | None = None, seed: int = 0
    ) -> None:
        low = {str(parameter.dtype) for parameter in model.parameters()} - {"torch.float32", "torch.float64"}
        if low:
            raise ValueError(f"a small step needs a model in float32, not {', '.join(sorted(low))}")
        self.base = base
        self._model = model
        self._fingerprint = _fingerprint(model)
        self._full = moved == "full"
        if self._full:
            self._work = copy.deepcopy(model)
            self._moved = list(self._work.parameters())
            self._stood = list(model.parameters())
        else:
            shared = {id(p): p for name, p in model.named_parameters() if not _is_lora(name)}
            self._work = copy.deepcopy(model, shared)
            if not any(_is_lora(name) for name, _ in self._work.named_parameters()):
                self._work = add_adapter(self._work, "step", lora or LoraSettings(), seed).to(base.device).eval()
            self._moved = [parameter for name, parameter in self._work.named_parameters() if _is_lora(name)]
            self._stood = [parameter.detach().clone() for parameter in self._moved]

    def step(self, item: Item, plain: Item, layers: Sequence[int], decrease: float) -> Change:
        """A step on ``item`` that takes the share ``decrease`` of its loss away, to first order; read on ``plain``: the
        same sample with nothing present, the same tokens measured."""
        assert sum(item.measured) == sum(plain.measured)
        before = self._values(plain, layers)
        gradient: dict[int, torch.Tensor] = {}
        batch = Measured.of(self.base, [item])

        def read(layer: int, gradient_btd: torch.Tensor) -> None:
            gradient[layer] = batch.take(gradient_btd)

        for parameter in self._moved:
            parameter.requires_grad_(True)
        try:
            readers = [ReadGradient(layer, read) for layer in layers]
            with torch.enable_grad(), residual_stream(self._work, batch.interventions(), readers):
                losses_n = token_losses(
                    self._work,
                    batch.padded.input_ids_bt,
                    None,
                    batch.padded.loss_mask_bt,
                    plain_head=self.base.plain_head and not self._full,  # that one gives a head no gradient
                )
                losses_n.sum().backward()
            slopes = [parameter.grad for parameter in self._moved]
            norm = _norm([slope for slope in slopes if slope is not None])
            learning_rate = decrease * float(losses_n.detach().sum()) / norm**2 if norm > 0 else 0.0
            with torch.no_grad():
                for parameter, slope in zip(self._moved, slopes, strict=True):
                    if slope is not None:
                        parameter.sub_(slope, alpha=learning_rate)
                    parameter.grad = None
            after = self._values(plain, layers)
        finally:
            for parameter in self._moved:
                parameter.requires_grad_(False)
                parameter.grad = None
            with torch.no_grad():
                for parameter, stood in zip(self._moved, self._stood, strict=True):
                    parameter.copy_(stood)
        change = {layer: after[layer] - before[layer] for layer in layers}
        return Change(before, gradient, change, learning_rate * norm, learning_rate)

    def must_be_as_before(self) -> None:
        """Assert that the model and the copy are what they were, to the bit."""
        pairs = zip(self._moved, self._stood, strict=True)
        assert all(torch.equal(parameter, stood) for parameter, stood in pairs), "the copy has moved"
        assert _fingerprint(self._model) == self._fingerprint, "the model has been changed"

    def _values(self, plain: Item, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        values: dict[int, torch.Tensor] = {}

        def read(batch: Measured, layer: int, hidden_nd: torch.Tensor) -> None:
            del batch
            values[layer] = hidden_nd.clone()

        read_values(self.base, self._work, [plain], layers, read)
        return values


def activation_change_rows(
    base: LoadedBase,
    model: Any,
    rows: Sequence[Sequence[Message]],
    conditions: Sequence[Condition],
    vectors: Mapping[str, torch.Tensor],
    layers: Sequence[int],
    *,
    measure_id: str,
    max_length: int,
    moved: Moved = "full",
    decrease: float = DECREASE,
    lora: LoraSettings | None = None,
    seed: int = 0,
    positions: Positions = "response",
    row_numbers: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Iterator[ActivationChangeRow]:
    """Per row, condition of the step, layer and vector: cosines of dh and g with the vector, and with each other.

    ``conditions``: what is present in the step. ``decrease``: the share of the loss that a step takes away, to first
    order. Means are over measured tokens that have a gradient in the step and change after it. The model is the same
    to the bit afterwards, which is asserted. ``progress`` counts rows x conditions.
    """
    unit = unit_rows(vectors, layers)
    plain = Condition("\0plain")
    groups = aligned_items(
        base, rows, [plain, *conditions], max_length=max_length, positions=positions, row_numbers=row_numbers
    )
    stepper = Stepper(base, model, moved, lora=lora, seed=seed)
    done, total = 0, len(groups) * len(conditions)
    for group in groups:
        for item in group[1:]:
            found = stepper.step(item, group[0], layers, decrease)
            for layer in layers:
                yield from _rows(measure_id, item, moved, layer, found, list(vectors), unit[layer])
            done += 1
            if progress is not None:
                progress(done, total)
    stepper.must_be_as_before()


def _rows(
    measure_id: str, item: Item, moved: Moved, layer: int, found: Change, names: Sequence[str], unit_vd: torch.Tensor
) -> Iterator[ActivationChangeRow]:
    change_nd = found.change[layer].double().cpu()
    gradient_nd = found.gradient[layer].double().cpu()
    norms = torch.stack((change_nd.norm(dim=1), gradient_nd.norm(dim=1)))
    used = (norms > 0).all(0)
    change_nd, gradient_nd = change_nd[used] / norms[0, used, None], gradient_nd[used] / norms[1, used, None]
    relative = norms[0, used] / found.before[layer].double().cpu()[used].norm(dim=1)
    num_tokens = int(used.sum())

    def mean(values_n: torch.Tensor) -> float | None:
        return float(values_n.mean()) if num_tokens else None

    for name, direction_d in zip(names, unit_vd, strict=True):
        yield ActivationChangeRow(
            measure_id=measure_id,
            row=item.row,
            condition=item.condition.name,
            parameters=moved,
            layer=layer,
            vector=name,
            num_tokens=num_tokens,
            step_norm=found.step_norm,
            learning_rate=found.learning_rate,
            relative_change=mean(relative),
            change_cosine=mean(change_nd @ direction_d),
            gradient_cosine=mean(gradient_nd @ direction_d),
            change_gradient_cosine=mean((change_nd * gradient_nd).sum(1)),
        )


def _is_lora(name: str) -> bool:
    return "lora_A" in name or "lora_B" in name


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([tensor.detach().double().norm() for tensor in tensors]).norm()) if tensors else 0.0


def _fingerprint(model: nn.Module) -> str:
    """Of all bits of all parameters."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        bits: Any = parameter.detach().cpu().contiguous().view(torch.uint8).numpy()
        digest.update(bits)
    return digest.hexdigest()
