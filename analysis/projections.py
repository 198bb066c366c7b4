"""Activations of (trained) models along vectors, and how far data lies from a model's own answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from analysis.conditions import NOTHING, Condition
from analysis.gradients import unit_rows
from analysis.measured_batches import (
    BATCH_TOKENS,
    Measured,
    Positions,
    Progress,
    aligned_items,
    batches,
    read_values,
)
from analysis.measured_rows import ProjectionRow
from trainables.base_model import LoadedBase
from trainables.defenses import Message


def projection_rows(
    base: LoadedBase,
    model: Any,
    rows: Sequence[Sequence[Message]],
    vectors: Mapping[str, torch.Tensor],
    layers: Sequence[int],
    *,
    measure_id: str,
    max_length: int,
    conditions: Sequence[Condition] = (NOTHING,),
    positions: Positions = "response",
    row_numbers: Sequence[int] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> Iterator[ProjectionRow]:
    """Per row, condition, layer and vector the mean over measured tokens of <h, v^> (app. B of arXiv 2604.16423).

    The sign and size of a projection alone mean little before a norm; compare models on the same rows. Rows come in
    the order (row, condition, layer, vector) once everything is measured.
    """
    unit = unit_rows(vectors, layers)
    groups = aligned_items(base, rows, conditions, max_length=max_length, positions=positions, row_numbers=row_numbers)
    items = [item for group in groups for item in group]
    found: dict[tuple[int, int], torch.Tensor] = {}  # (id of the item, layer) -> [v + 1] means

    def read(batch: Measured, layer: int, hidden_nd: torch.Tensor) -> None:
        directions_vd = unit[layer].to(device=hidden_nd.device, dtype=hidden_nd.dtype)
        norms_n1 = torch.linalg.vector_norm(hidden_nd, dim=1, keepdim=True)
        values = torch.cat((hidden_nd @ directions_vd.T, norms_n1), dim=1).cpu().double()
        for item, part in zip(batch.items, values.split(batch.counts), strict=True):
            found[id(item), layer] = part.mean(0)

    done = 0
    for batch in batches([[item] for item in items], batch_tokens):
        read_values(base, model, batch, layers, read)
        done += len(batch)
        if progress is not None:
            progress(done, len(items))
    for item in items:
        for layer in layers:
            means = found[id(item), layer].tolist()
            for name, projection in zip(vectors, means, strict=False):
                yield ProjectionRow(
                    measure_id=measure_id,
                    row=item.row,
                    condition=item.condition.name,
                    layer=layer,
                    vector=name,
                    num_tokens=sum(item.measured),
                    projection=projection,
                    activation_norm=means[-1],
                )


def with_answers(rows: Sequence[Sequence[Message]], answers: Sequence[str]) -> list[list[Message]]:
    """The rows with the last assistant turn of each replaced: a model's own answers in place of the data's."""
    changed = []
    for messages, answer in zip(rows, answers, strict=True):
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        changed.append([*messages[:last], {"role": "assistant", "content": answer}])
    return changed


def projection_differences(data: pd.DataFrame, own: pd.DataFrame) -> pd.DataFrame:
    """Screening: per row, layer and vector <h, v^> of the data minus that of the model's own answer to the same prompt.

    Both are tables of ``projections`` under one condition; rows that are in one alone are left out. Columns: row,
    layer, vector, projection, own, difference.
    """
    keys = ["row", "layer", "vector"]
    merged = data[[*keys, "projection"]].merge(
        own[[*keys, "projection"]].rename(columns={"projection": "own"}), on=keys, validate="one_to_one"
    )
    return merged.assign(difference=merged["projection"] - merged["own"])
