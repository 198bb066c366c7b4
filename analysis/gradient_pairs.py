"""The gradients of one sample under two conditions against each other, token by token: signatures and differences.

Legend: k conditions beside the reference, m measured tokens of a sample, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from analysis.measured_rows import SimilarityRow
from trainables.base_model import LoadedBase
from trainables.defenses import Message

PairReader = Callable[[Sequence[Item], int, torch.Tensor], None]


def similarity_rows(
    base: LoadedBase,
    model: Any,
    rows: Sequence[Sequence[Message]],
    reference: Condition,
    conditions: Sequence[Condition],
    layers: Sequence[int],
    *,
    measure_id: str,
    max_length: int,
    positions: Positions = "shared",
    row_numbers: Sequence[int] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> Iterator[SimilarityRow]:
    """Per row, condition and layer the mean over tokens of cos(g(condition), g(reference)) (app. E.6 of arXiv
    2604.16423: the reference is the prompted gradient, the conditions are steered with the prompt's
    difference vectors).

    Rows come in the order (row, condition, layer) once everything is measured. Only tokens with a gradient under both
    conditions have a cosine; they are counted.
    """
    found: dict[tuple[int, str, int], tuple[int, float | None]] = {}

    def read(items: Sequence[Item], layer: int, gradients_kmd: torch.Tensor) -> None:
        norms_km = torch.linalg.vector_norm(gradients_kmd, dim=2)
        products_km = torch.einsum("kmd,md->km", gradients_kmd[1:], gradients_kmd[0])
        used = (norms_km[1:] > 0) & (norms_km[0] > 0)
        cosines = (products_km.double() / (norms_km[1:].double() * norms_km[0].double())).cpu()
        for item, values, on in zip(items[1:], cosines, used.cpu(), strict=True):
            count = int(on.sum())
            found[item.row, item.condition.name, layer] = (count, float(values[on].mean()) if count else None)

    groups = aligned_items(
        base, rows, [reference, *conditions], max_length=max_length, positions=positions, row_numbers=row_numbers
    )
    _read_pairs(base, model, groups, layers, read, batch_tokens, progress)
    for group in groups:
        for item in group[1:]:
            for layer in layers:
                num_tokens, cosine = found[item.row, item.condition.name, layer]
                yield SimilarityRow(
                    measure_id=measure_id,
                    row=item.row,
                    reference=reference.name,
                    condition=item.condition.name,
                    layer=layer,
                    num_tokens=num_tokens,
                    cosine=cosine,
                )


def gradient_differences(
    base: LoadedBase,
    model: Any,
    rows: Sequence[Sequence[Message]],
    condition: Condition,
    reference: Condition,
    layers: Sequence[int],
    *,
    max_length: int,
    positions: Positions = "response",
    row_numbers: Sequence[int] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> Iterator[tuple[list[int], dict[int, torch.Tensor]]]:
    """Equation 9 of arXiv 2604.16423: d = mean_t g_t(condition) - mean_t g_t(reference), the mean over all measured
    tokens; batch by batch as (row numbers, layer -> [rows, d] float64 on the CPU), longest rows first."""
    groups = aligned_items(
        base, rows, [reference, condition], max_length=max_length, positions=positions, row_numbers=row_numbers
    )
    done = 0
    for batch in batches(groups, batch_tokens):
        differences: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}

        def read(
            items: Sequence[Item],
            layer: int,
            gradients_kmd: torch.Tensor,
            differences: dict[int, list[torch.Tensor]] = differences,
        ) -> None:
            del items
            means_kd = gradients_kmd.double().mean(1)
            differences[layer].append((means_kd[1] - means_kd[0]).cpu())

        _read_batch(base, model, batch, 2, layers, read)
        done += len(batch) // 2
        yield [item.row for item in batch[::2]], {layer: torch.stack(found) for layer, found in differences.items()}
        if progress is not None:
            progress(done, len(groups))


def _read_pairs(
    base: LoadedBase,
    model: Any,
    groups: Sequence[Sequence[Item]],
    layers: Sequence[int],
    reader: PairReader,
    batch_tokens: int,
    progress: Progress | None,
) -> None:
    """``reader(items, layer, gradients [1 + k, m, d])`` for every sample, its reference first, in as many parts as fit
    into a batch; a part has the reference again."""
    total, done = sum(len(group) - 1 for group in groups), 0
    by_size: dict[int, list[list[Item]]] = {}
    for group in groups:
        longest = max(item.length for item in group)
        room = max(1, batch_tokens // longest - 1)
        for start in range(1, len(group), room):
            part = [group[0], *group[start : start + room]]
            by_size.setdefault(len(part), []).append(part)
    for size, parts in by_size.items():
        for batch in batches(parts, batch_tokens):
            _read_batch(base, model, batch, size, layers, reader)
            done += len(batch) // size * (size - 1)
            if progress is not None:
                progress(done, total)


def _read_batch(
    base: LoadedBase, model: Any, batch: Sequence[Item], size: int, layers: Sequence[int], reader: PairReader
) -> None:
    """``size`` consecutive items of the batch are one sample; they measure the same tokens."""

    def read(measured: Measured, layer: int, gradients_nd: torch.Tensor) -> None:
        start = 0
        for first in range(0, len(batch), size):
            count = measured.counts[first]
            part = gradients_nd[start : start + size * count]
            reader(batch[first : first + size], layer, part.view(size, count, -1))
            start += size * count

    read_gradients(base, model, batch, layers, read)
