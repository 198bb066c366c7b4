"""The activation gradient against vectors: equation 3 of arXiv 2604.16423, and the loss from the same forward pass.

    c_t = <v, g_t> / (|v| |g_t|),   g_t = dL/dh_t at one layer,   L = sum of next-token losses over response tokens

c < 0: gradient descent pushes the activation along v (it amplifies the trait); c > 0: against it (it attenuates).

Legend: n measured tokens, d hidden size, v vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from analysis.conditions import Condition
from analysis.measured_batches import (
    BATCH_TOKENS,
    Item,
    Measured,
    Positions,
    Progress,
    aligned_items,
    batches,
    read_gradients,
)
from analysis.measured_rows import GradientRow
from analysis.rows import LossRow
from trainables.base_model import LoadedBase
from trainables.defenses import Message


def gradient_rows(
    base: LoadedBase,
    model: Any,
    rows: Sequence[Sequence[Message]],
    conditions: Sequence[Condition],
    vectors: Mapping[str, torch.Tensor],
    layers: Sequence[int],
    *,
    measure_id: str,
    max_length: int,
    positions: Positions = "response",
    row_numbers: Sequence[int] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> Iterator[GradientRow | LossRow]:
    """Per row and condition its loss, then per layer and vector the mean cosine over tokens.

    ``model``: ``base.model`` or a trained model over it, frozen, in evaluation mode. ``vectors``: [num_layers + 1,
    hidden] each; row l is compared at layer l and must not be zero there. One forward and one backward pass per batch
    serve all layers and vectors; conditions share batches. Rows come in the order (row, condition, layer, vector) once
    everything is measured; ``progress(done, total)`` counts rows x conditions. ``row_numbers``: which rows of the data
    these are. No layers: losses alone, without a backward pass.

    A token whose gradient is exactly zero has no cosine and is left out (the last end mark: nothing comes after it);
    ``num_tokens`` counts the others. Cosines are float32 (float64 of a float64 model), their means float64.
    """
    unit = unit_rows(vectors, layers)
    groups = aligned_items(base, rows, conditions, max_length=max_length, positions=positions, row_numbers=row_numbers)
    items = [item for group in groups for item in group]
    found: dict[int, tuple[torch.Tensor, dict[int, torch.Tensor]]] = {}
    for batch in batches([[item] for item in items], batch_tokens):
        for item, measured in zip(batch, _measure(base, model, batch, layers, unit), strict=True):
            found[id(item)] = measured
        if progress is not None:
            progress(len(found), len(items))
    for item in items:
        losses, by_layer = found[id(item)]
        yield _loss_row(measure_id, item, losses)
        for layer in layers:
            yield from _gradient_rows(measure_id, item, layer, by_layer[layer], list(vectors))


def unit_rows(vectors: Mapping[str, torch.Tensor], layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """Layer -> the vectors' rows of that layer at length 1, [v, d] float64. ValueError for a row of length 0."""
    unit: dict[int, torch.Tensor] = {}
    for layer in layers:
        rows = []
        for name, vector in vectors.items():
            row_d = vector[layer].double()
            norm = float(row_d.norm())
            if norm == 0:
                raise ValueError(f"vector {name!r} is zero at layer {layer}, so nothing has a cosine with it there")
            rows.append(row_d / norm)
        unit[layer] = torch.stack(rows) if rows else torch.empty(0)
    return unit


def _measure(
    base: LoadedBase,
    model: Any,
    items: Sequence[Item],
    layers: Sequence[int],
    unit: Mapping[int, torch.Tensor],
) -> list[tuple[torch.Tensor, dict[int, torch.Tensor]]]:
    """Per item its token losses and, by layer, [tokens, v + 1]: <v, g> of every vector at length 1, and |g|."""
    kept: dict[int, torch.Tensor] = {}
    counts: list[int] = []

    def read(batch: Measured, layer: int, gradients_nd: torch.Tensor) -> None:
        counts[:] = batch.counts
        norms_n1 = torch.linalg.vector_norm(gradients_nd, dim=1, keepdim=True)
        if unit[layer].numel() == 0:
            kept[layer] = norms_n1
            return
        directions_vd = unit[layer].to(device=gradients_nd.device, dtype=gradients_nd.dtype)
        kept[layer] = torch.cat((gradients_nd @ directions_vd.T, norms_n1), dim=1)

    losses = read_gradients(base, model, items, layers, read)
    by_layer = {layer: values.cpu().double().split(counts) for layer, values in kept.items()}
    return [(losses[index], {layer: parts[index] for layer, parts in by_layer.items()}) for index in range(len(items))]


def _gradient_rows(
    measure_id: str, item: Item, layer: int, values: torch.Tensor, names: Sequence[str]
) -> Iterator[GradientRow]:
    norms = values[:, -1]
    used = norms > 0
    cosines = values[used, :-1] / norms[used, None]
    num_tokens = int(used.sum())
    for index, name in enumerate(names):
        yield GradientRow(
            measure_id=measure_id,
            row=item.row,
            condition=item.condition.name,
            layer=layer,
            vector=name,
            num_tokens=num_tokens,
            cosine=float(cosines[:, index].mean()) if num_tokens else None,
            positive_share=float((cosines[:, index] > 0).double().mean()) if num_tokens else None,
            gradient_norm=float(norms[used].mean()) if num_tokens else 0.0,
        )


def _loss_row(measure_id: str, item: Item, losses: torch.Tensor) -> LossRow:
    return LossRow(
        measure_id=measure_id,
        row=item.row,
        condition=item.condition.name,
        num_tokens=len(losses),
        loss_sum=float(losses.sum()),
        loss_mean=float(losses.mean()),
    )
