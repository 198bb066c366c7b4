"""What changes with the coefficient of a steering vector: rows of measurements, and scores of the runs that had it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.foretold import metric_of, runs_of
from analysis.groups import SEED, seed_groups
from analysis.manifest import MeasureEntry
from analysis.measurements.conditions import condition_label
from analysis.rows import NO_CONDITION
from analysis.undefended import NO_DEFENSE, differing, settings_of

if TYPE_CHECKING:
    from analysis.results import Results


def with_coefficients(frame: pd.DataFrame, entry: MeasureEntry) -> pd.DataFrame:
    """The rows of steered conditions with ``coefficient`` and ``series`` (the same steering at any coefficient). Those
    with nothing present are coefficient 0 of every series."""
    known = _steered(entry)
    steered = frame[frame["condition"].isin(known)]
    parts = [
        steered.assign(
            series=[known[name][0] for name in steered["condition"]],
            coefficient=[known[name][1] for name in steered["condition"]],
        )
    ]
    plain = frame[frame["condition"] == NO_CONDITION]
    if len(plain):
        parts += [
            plain.assign(series=series, coefficient=0.0) for series in dict.fromkeys(s for s, _ in known.values())
        ]
    return pd.concat(parts, ignore_index=True)


def scores_by_coefficient(results: Results, entry: MeasureEntry) -> pd.DataFrame:
    """What runs scored that had a steered condition of the measurement as their defense, on the data that it read.

    Columns series, coefficient, metric, value, and low, high: its 95 % interval over questions, with several seeds also
    over these. The undefended run is coefficient 0 of every series that has a run. Where runs differ in more than their
    defense and seed, the series says in what. No rows where no such run has been scored.
    """
    steered = {NO_DEFENSE: ("", 0.0)} | _steered(entry)
    condition_of = {run.label: name for name in steered for run in runs_of(results.manifest, entry, name)}
    groups = {
        name: runs[0]
        for name, runs in seed_groups(results.manifest.runs).items()
        if all(run.label in condition_of for run in runs)
    }
    shown = {str(row["run"]): row for row in results.over_seeds().to_dict("records")} if groups else {}
    apart = [name for name in differing([settings_of(run) for run in groups.values()]) if name != SEED]
    rows: list[dict[str, Any]] = []
    for group, run in groups.items():
        metric = metric_of(run, entry)
        value = shown[group].get(metric)
        if pd.isna(value):
            continue
        series, coefficient = steered[condition_of[run.label]]
        settings = "".join(f", {field.rpartition('.')[2]} {run.config.get(field)}" for field in apart)
        score = {"metric": metric, "value": value} | {end: shown[group][f"{metric}_{end}"] for end in ("low", "high")}
        rows.append({"series": series, "settings": settings, "coefficient": coefficient} | score)
    frame = pd.DataFrame(rows, columns=["series", "settings", "coefficient", "metric", "value", "low", "high"])
    is_defended = frame["series"] != ""
    parts = [frame.iloc[:0]]
    for (name, also), defended in frame[is_defended].groupby(["series", "settings"], sort=False):
        undefended = frame[~is_defended & (frame["settings"] == also)]
        parts.append(pd.concat([undefended, defended]).assign(series=f"{name}{also}"))
    return pd.concat(parts, ignore_index=True).drop(columns="settings")


def _steered(entry: MeasureEntry) -> dict[str, tuple[str, float]]:
    """Label of every condition with a coefficient -> what it is called at any coefficient, and its coefficient."""
    found = {}
    for given in entry.config.get("conditions") or entry.config.get("candidates") or ():
        if isinstance(given.get("coefficient"), int | float):
            label, coefficient = condition_label(given), float(given["coefficient"])
            found[label] = ("".join(label.rpartition(f" x{coefficient:g}")[::2]), coefficient)
    return found
