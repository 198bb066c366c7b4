"""The summary: per run, each metric's mean with its error and its gaps, beside what shows that a model is broken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.crossed import Crossed
from analysis.quantities import PLAIN_LOSS, Measured
from analysis.statistics import Estimate, estimates
from analysis.summary_columns import count_values, difference_values, frame, mean_values, of_runs


def summarize(found: Measured) -> pd.DataFrame:
    """One row per entry, in the order given but bases first; a run of which nothing is there stays as a row of NaN.

    ``run``, ``kind``, ``status``, then for each metric

    - ``<metric>``: mean over the judgements that are ok; NaN without one
    - ``<metric>_se``: its standard error clustered by question (``statistics.clustered_mean``); the luck of the
      training seed is not in it: see ``groups.summarize_groups``
    - ``<metric>_low``, ``<metric>_high``: 95 % interval, bootstrap over questions (``bootstrap.intervals``)
    - ``<metric>_num_scored``, ``<metric>_num_missing``: answers with a value and without; ``<NA>`` before there are
      answers or if the metric is not asked of this run
    - ``<metric>_missing_by_status``: why without, such as ``{"refused": 2}``; ``not_judged``: no judgement exists
    - ``<metric>_vs_undefended`` with ``_se``, ``_low``, ``_high``: run minus its undefended run, paired by question
      (``statistics.difference``), over the ``<metric>_vs_undefended_num_questions`` that both have a value for

    then ``plain_loss`` (nats/token on held-out plain answers, every token weighing the same) with the same columns
    (its errors from data rows in place of questions, ``statistics.ratio``: ``_num_rows``, no counts of answers),
    ``train_loss`` (over the last epoch, nats/token), ``num_answers``, ``undefended`` (the label of the run it was
    paired with: the only undefended one of the sweep with the same other settings) and ``undefended_problem`` (why
    there is none, or that it is not done).
    """
    ordered = sorted(range(len(found.entries)), key=lambda row: found.entries[row].kind != "base")
    estimated = estimate_all(found, [[row] for row in ordered])
    rows = []
    for row, by_quantity in zip(ordered, estimated, strict=True):
        entry = found.entries[row]
        undefended = found.partners[entry.label].label
        values: dict[str, Any] = {"run": entry.label, "kind": entry.kind, "status": found.statuses[entry.label]}
        for name, (estimate, difference) in by_quantity.items():
            values |= mean_values(name, estimate)
            if name != PLAIN_LOSS:
                values |= count_values(found, [row], name)
            values |= difference_values(name, difference, undefended is not None)
        values["train_loss"] = found.train_losses[entry.label]
        values["num_answers"] = found.num_answers.get(entry.label)
        values["undefended"] = undefended
        values["undefended_problem"] = undefended_problem(found, row)
        rows.append(values)
    return frame(of_runs(found.metrics), rows)


def estimate_all(found: Measured, groups: Sequence[Sequence[int]]) -> list[dict[str, tuple[Estimate, Estimate]]]:
    """Per group of rows and quantity (value, difference to the undefended runs); NaN where nothing is there."""
    tables: list[Crossed] = []
    bounds = []
    for rows in groups:
        paired = [row for row in rows if found.partners[found.entries[row].label].label is not None]
        for quantity in found.quantities.values():
            asked = [row for row in rows if quantity.name == PLAIN_LOSS or _is_asked(found, row, quantity.name)]
            tables.append(quantity.values(asked, _seeds(found, asked)))
            bounds.append(quantity.bounds)
            both = [row for row in paired if row in asked]
            others = [found.row_of[str(found.partners[found.entries[row].label].label)] for row in both]
            tables.append(quantity.differences(both, others, _seeds(found, both)))
            bounds.append(quantity.difference_bounds)
    made = iter(estimates(tables, bounds))
    return [{name: (next(made), next(made)) for name in found.quantities} for _ in groups]


def undefended_problem(found: Measured, row: int) -> str | None:
    """Why a row has no difference to an undefended run, or None."""
    partner = found.partners[found.entries[row].label]
    if partner.label is not None and (status := found.statuses[partner.label]) != "done":
        return f"{partner.label} is {status}"
    return partner.problem


def _is_asked(found: Measured, row: int, metric: str) -> bool:
    return metric in found.entries[row].judge_ids


def _seeds(found: Measured, rows: Sequence[int]) -> list[object]:
    return [found.entries[row].config.get("seed") for row in rows]
