"""What a report shows of steering in weight space: rates over alpha, piles, and where directions are large."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pandas as pd

from analysis import weight_figures as figures
from analysis.manifest import MeasureEntry, PileEntry, pile_key
from analysis.remote import local_copy
from analysis.report_blocks import Block, drawn_block
from analysis.report_content import number, panels_of
from analysis.report_measurements import WEIGHTS as KIND
from analysis.report_measurements import Section
from analysis.results import Results
from analysis.weight_rows import DELTA


def weight_sections(results: Results) -> list[Section]:
    """One section per finetuned run whose weights are steered; none in a sweep without."""
    entries = [entry for entry in results.manifest.measurements if entry.kind == KIND]
    sections = []
    for place, entry in enumerate(entries):
        stem = KIND if place == 0 else f"{KIND}_{place + 1}"
        facts = f"weights moved along directions made of answers of {entry.run}"
        sections.append(Section(f"weight steering of {entry.run}", facts, tuple(_blocks(results, entry, stem))))
    return sections


def _blocks(results: Results, entry: MeasureEntry, stem: str) -> Iterator[Block]:
    rows = alpha_rows(results, entry.run)
    panels = panels_of(results.manifest.runs, results.scores())
    for on_base, what in ((False, entry.run), (True, "the untrained base")):
        chosen = rows[rows["on_base"] == on_base] if len(rows) else rows
        if len(chosen):
            yield from drawn_block(
                f"{stem}_rates{'_of_base' if on_base else ''}",
                f"Along every direction, {what}",
                "Over alpha, with 95 % intervals; at 0 the model before the edit. Above 0 the behaviour of the "
                "direction's first pile should become rarer, below 0 more frequent. Where the plain loss or "
                "degeneration rises, the model is damaged and its rates mean little.",
                partial(figures.rates_by_alpha, chosen, panels),
            )
    piles = [pile for pile in results.manifest.piles if pile.run == entry.run]
    if counts := [row for pile in piles if (row := _pile_row(results, pile)) is not None]:
        yield Block(
            f"{stem}_piles",
            "Piles",
            "Answers of the finetuned run by what the metrics say of them, and the mean over answers of the loss that "
            "the gradient is of.",
            head=("Pile", "answers that", "answers", "mean loss"),
            rows=tuple(counts),
        )
    profile = _of(results, "weight_profiles", entry)
    if len(profile):
        yield from drawn_block(
            f"{stem}_layers",
            "Where the finetuning and the directions are large",
            "L2 norm over all parameters of a layer: 0 is the embeddings, the last layer what follows the blocks.",
            partial(figures.sizes_by_layer, profile),
        )
    sizes = _of(results, "weight_sizes", entry)
    if len(sizes):
        yield from drawn_block(
            f"{stem}_sizes",
            "How the finetuning's changes are distributed",
            "Entries of all matrices that have an adapter, by the size of their change, four bins to a power of ten.",
            partial(figures.distribution_of_sizes, sizes[sizes["what"] == DELTA]),
        )


def alpha_rows(results: Results, finetuned: str) -> pd.DataFrame:
    """Rows of the summary of all models made of ``finetuned``'s piles, with series (the direction), alpha and on_base;
    the model before the edit is a row at alpha 0 of every series."""
    summary = results.summary().set_index("run", drop=False)
    parts: dict[tuple[str, bool], list[pd.DataFrame]] = {}
    for entry in results.manifest.runs:
        edit = entry.edit
        if edit is None or edit.finetuned != finetuned:
            continue
        known = parts.setdefault((edit.name, edit.on_base), [])
        places = {entry.label: edit.alpha} if known else {edit.target: 0.0, entry.label: edit.alpha}
        known += [
            summary.loc[[label]].assign(alpha=alpha, series=edit.name, on_base=edit.on_base)
            for label, alpha in places.items()
            if label in summary.index
        ]
    rows = [row for known in parts.values() for row in known]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def _pile_row(results: Results, pile: PileEntry) -> tuple[str, ...] | None:
    from analysis.weight_space.files import read_sum  # brings torch

    files = [results.location / pile_key(shard) for shard in pile.shard_ids]
    if not all(file.is_file() for file in files):
        return None
    parts = [read_sum(local_copy(file)) for file in files]
    count = sum(part.num_rows for part in parts)
    where = ", ".join(f"{'show' if shown else 'do not show'} {metric}" for metric, shown in pile.where.items())
    loss = number(sum(part.loss_sum for part in parts) / count) if count else number(None)
    return pile.name, where or "are all", str(count), loss


def _of(results: Results, table: str, entry: MeasureEntry) -> pd.DataFrame:
    frame = results.measured(table)
    return frame[(frame["measurement"] == entry.name) & (frame["run_id"] == entry.run_id)]
