"""The summary over groups of runs: what a defense does, with the luck of the training seed in the error."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.manifest import RunEntry
from analysis.quantities import PLAIN_LOSS, Measured
from analysis.summary import estimate_all, undefended_problem
from analysis.summary_columns import count_values, difference_values, frame, mean_values, of_groups
from analysis.undefended import differing
from trainables.errors import ConfigError, Fault

SEED = "seed"


def summarize_groups(found: Measured, by: Sequence[str]) -> pd.DataFrame:
    """One row per set of runs that agree in the fields ``by``; bases first, else in the order of the sweep.

    A field that a run does not have (``defense.vector`` of ``none``) is ``<NA>``; ``defense`` is the label of the whole
    defense. The columns ``by``, ``kind``, then

    - ``num_runs``: runs of the group; ``num_runs_missing`` of them are not done, ``runs_missing_by_status`` says why,
      such as ``{"failed": 1}``. What a run that is not done has given counts all the same
    - ``num_seeds``: different training seeds among the runs that gave a value; ``<NA>`` for a base, which is not
      trained. With 1 the luck of the seed is in no error of the row: nothing is known about it
    - ``varies``: the fields beside ``seed`` that differ inside the group although ``by`` does not name them

    and for each metric, and for ``plain_loss`` with data rows in place of questions,

    - ``<metric>``: the mean over runs of the mean of each, every run weighing the same, with ``_num_runs`` and
      ``_num_seeds`` that gave a value
    - ``<metric>_se``: its standard error with BOTH the luck of the seed and that of the questions. The questions are
      the same in every run, so seeds and questions are crossed: V = V_seeds + V_questions - V_cells, two-way clustered
      with Satterthwaite's degrees of freedom (``crossed.spread`` has the formulas). Runs of one seed are one cluster,
      so a setting that varies inside the group is not taken for luck where every seed has all of its values
    - ``<metric>_low``, ``<metric>_high``: 95 % interval, bootstrap over seeds and questions (``bootstrap.intervals``)
    - ``<metric>_num_scored``, ``_num_missing``, ``_missing_by_status``: summed over the runs
    - ``<metric>_vs_undefended`` with ``_se``, ``_low``, ``_high``: every run minus ITS undefended run (same seed, same
      other settings), by question, then as above; ``_num_runs`` such pairs and ``_num_questions`` (for plain_loss
      ``_num_rows``) are what it rests on

    then ``train_loss`` (mean over runs, ``num_train_losses`` of them), ``num_answers``, ``undefended`` (labels of the
    undefended runs, without their seeds) and ``undefended_problem`` (why runs of the group are not paired).

    Raises ConfigError that lists the fields for one that no run has.
    """
    by = list(dict.fromkeys(by))
    _check(found.entries, by)
    groups = _grouped(found.entries, by)
    rows = _rows(found, groups)
    for row, group in zip(rows, groups, strict=True):
        row |= {field: found.entries[group[0]].config.get(field) for field in by}
        row["varies"] = ", ".join(_varies(found, group, by))
    return frame(of_groups(by, found.metrics), rows)


def over_seeds(found: Measured) -> pd.DataFrame:
    """``summarize_groups`` by every field but the seed: one row per set of runs that differ in their seed alone.

    In place of fields it has ``run``, the label that the runs share without their seed, and ``status``: that of the
    first run that is not done, else ``done``.
    """
    groups = seed_groups(found.entries)
    rows = _rows(found, [[found.row_of[entry.label] for entry in group] for group in groups.values()])
    for row, (name, group) in zip(rows, groups.items(), strict=True):
        statuses = [found.statuses[entry.label] for entry in group]
        row["run"], row["varies"] = name, ""
        row["status"] = next((status for status in statuses if status != "done"), "done")
    return frame([("run", "str"), ("status", "str"), *of_groups((), found.metrics)], rows)


def seed_groups(entries: Sequence[RunEntry]) -> dict[str, list[RunEntry]]:
    """Rows of the sweep that differ in their seed alone, bases first, under the label that they share without it (or
    all of their labels, if the user gave each its own)."""
    groups = [[entries[row] for row in group] for group in _grouped(entries, _all_but_seed(entries))]
    names = [" / ".join(dict.fromkeys(_without_seed(entry) for entry in group)) for group in groups]
    # two groups can only be called the same if the seed is not what tells their runs apart
    names = [
        name if names.count(name) == 1 else " / ".join(entry.label for entry in group)
        for name, group in zip(names, groups, strict=True)
    ]
    return dict(zip(names, groups, strict=True))


def has_several_seeds(entries: Sequence[RunEntry]) -> bool:
    """Whether some runs differ in their seed alone."""
    groups = seed_groups(entries).values()
    return any(len({repr(entry.config.get(SEED)) for entry in group}) > 1 for group in groups)


def fields_of(entries: Sequence[RunEntry]) -> list[str]:
    """The names that ``by`` may have: those in which runs differ first."""
    configs = [entry.config for entry in entries if entry.kind == "run"] or [entry.config for entry in entries]
    return list(dict.fromkeys([*differing(configs), *(name for config in configs for name in config)]))


def _check(entries: Sequence[RunEntry], by: Sequence[str]) -> None:
    known = fields_of(entries)
    unknown = [name for name in by if name not in known]
    if unknown:
        allowed = ", ".join(known) if known else "none, as the sweep has no runs"
        faults = []
        for name in unknown:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            faults.append(Fault("by", f"no run has a field {name!r}; {hint}allowed: {allowed}"))
        raise ConfigError(faults, heading="nothing was read")


def _all_but_seed(entries: Sequence[RunEntry]) -> list[str]:
    return [name for name in dict.fromkeys(name for entry in entries for name in entry.config) if name != SEED]


def _grouped(entries: Sequence[RunEntry], by: Sequence[str]) -> list[list[int]]:
    """Rows of the sweep that agree in kind and ``by``, bases first; inside a group by label, so that sums over runs
    do not depend on the order of the sweep."""
    groups: dict[Hashable, list[int]] = {}
    for row in sorted(range(len(entries)), key=lambda row: entries[row].kind != "base"):
        values = [entries[row].config.get(field) for field in by]
        groups.setdefault((entries[row].kind, tuple(repr(value) for value in values)), []).append(row)
    return [sorted(group, key=lambda row: entries[row].label) for group in groups.values()]


def _rows(found: Measured, groups: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """What the columns of a group hold, but for fields and ``varies``."""
    return [_row(found, group, estimates) for group, estimates in zip(groups, estimate_all(found, groups), strict=True)]


def _row(found: Measured, group: Sequence[int], estimates: dict[str, Any]) -> dict[str, Any]:
    entries = [found.entries[row] for row in group]
    statuses = pd.Series([found.statuses[entry.label] for entry in entries], dtype="str")
    missing = statuses[statuses != "done"].value_counts(sort=False)
    paired = [entry for entry in entries if found.partners[entry.label].label is not None]
    values: dict[str, Any] = {
        "kind": entries[0].kind,
        "num_runs": len(group),
        "num_runs_missing": int(missing.sum()),
        "runs_missing_by_status": {str(status): int(count) for status, count in missing.items()},
        "num_seeds": _num_seeds(found, group),
    }
    for name, (estimate, difference) in estimates.items():
        values |= mean_values(name, estimate)
        values[f"{name}_num_runs"] = estimate.num_runs
        values[f"{name}_num_seeds"] = estimate.num_seeds if entries[0].kind == "run" else None
        if name != PLAIN_LOSS:
            values |= count_values(found, group, name)
        values |= difference_values(name, difference, bool(paired))
        values[f"{name}_vs_undefended_num_runs"] = difference.num_runs if paired else None
    losses = np.array([found.train_losses[entry.label] for entry in entries])
    losses = losses[~np.isnan(losses)]
    values["train_loss"] = float(losses.mean()) if len(losses) else np.nan
    values["num_train_losses"] = len(losses)
    values["num_answers"] = sum(found.num_answers.get(entry.label, 0) for entry in entries) or None
    partners = dict.fromkeys(_partner_label(found, entry) for entry in paired)
    values["undefended"] = "; ".join(partners) if partners else None
    values["undefended_problem"] = _problem(found, group)
    return values


def _num_seeds(found: Measured, group: Sequence[int]) -> int | None:
    if found.entries[group[0]].kind == "base":
        return None
    gave = [row for row in group if any(one.weights_rg[row].any() for one in found.quantities.values())]
    return len({repr(found.entries[row].config.get(SEED)) for row in gave})


def _varies(found: Measured, group: Sequence[int], by: Sequence[str]) -> list[str]:
    return [name for name in differing([found.entries[row].config for row in group]) if name not in (*by, SEED)]


def _partner_label(found: Measured, entry: RunEntry) -> str:
    partner = found.entries[found.row_of[str(found.partners[entry.label].label)]]
    return _without_seed(partner)


def _problem(found: Measured, group: Sequence[int]) -> str | None:
    """Why runs of the group are not paired, with the number of runs where it is not all of them."""
    problems = [problem for row in group if (problem := undefended_problem(found, row)) is not None]
    if not problems:
        return None
    texts = []
    for problem in dict.fromkeys(problems):
        count = problems.count(problem)
        texts.append(problem if count == len(group) else f"{count} of {len(group)} runs: {problem}")
    return "; ".join(texts)


def _without_seed(entry: RunEntry) -> str:
    """A run's label without `` seed=3``, as labels of runs that differ in their seed end."""
    part = f"seed={entry.config.get(SEED)}"
    words = [word for word in entry.label.split(" ") if word != part]
    return " ".join(words) or entry.label
