"""Predictions beside what runs then showed: which candidate defenses were foreseen to work, and how well that held."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.manifest import DEGENERATION, Manifest, MeasureEntry, RunEntry
from analysis.predictions import Held, held

if TYPE_CHECKING:
    from analysis.results import Results

_SCORES = ("score", "undefended_score", "outcome", "outcome_error", "outcome_low", "outcome_high")
OUTCOMES = ("trained", "undefended", "metric", *_SCORES, "defended")
"""``trained``: the run; ``undefended``: the run that it is compared with; ``score``: its mean of the metric;
``outcome``: that of the undefended run minus that of the run, so positive means that less of the trait was learnt;
``defended``: its 95 % interval lies above 0."""


def foretold(results: Results) -> pd.DataFrame:
    """One row per prediction, with the run that had the candidate as its defense, on the same data, from the same base.

    Columns are those of ``predictions`` with ``data`` (what the measurement read) and ``OUTCOMES``, which are empty
    where there is no such run, or no undefended one to compare it with. With several runs (seeds) there are several
    rows.
    """
    predictions = results.table("predictions")
    entries = {
        (entry.name, entry.run_id): entry
        for entry in results.manifest.measurements
        if "predictions" in entry.merged_tables
    }
    summary = {str(row["run"]): row for row in results.summary().to_dict("records")} if len(predictions) else {}
    rows: list[dict[str, Any]] = []
    for prediction in predictions.to_dict("records"):
        entry = entries[prediction["measurement"], prediction["run_id"]]
        row = {str(key): value for key, value in prediction.items()}
        row |= {"data": data_name(entry), "trait": row["vector"], **dict.fromkeys(OUTCOMES)}
        found = runs_of(results.manifest, entry, str(row["condition"]))
        rows += [row | _outcome(run, entry, summary) for run in found] or [row]
    names = [*predictions.columns, "data", "trait", *OUTCOMES]
    frame = pd.DataFrame(rows, columns=names)
    return frame.astype(dict.fromkeys(_SCORES, "float64"))


def data_name(entry: MeasureEntry) -> str:
    """What a measurement read, as the sweep file names it."""
    named = entry.config.get("data")
    return named if isinstance(named, str) else json.dumps(named)


def measurement_of(name: object, model: object) -> str:
    """What a measurement of one model is called where several are listed: its name alone if it is of the base."""
    return str(name) if model == "base" else f"{name} of {model}"


def ranking(frame: pd.DataFrame, layer: int | None = None) -> pd.DataFrame:
    """The candidates of every measurement, the greatest shift first: one row per model that was read (``run``),
    candidate and run that had it.

    ``layer``: shifts as read there; None: their mean over all layers that were read, beside the least and the greatest,
    so that no layer is chosen by what it shows.
    """
    chosen = frame if layer is None else frame[frame["layer"] == layer]
    keys = ["measurement", "run", "data", "trait", "condition", "trained"]
    grouped = chosen.assign(trained=chosen["trained"].fillna("")).groupby(keys, sort=False)
    rows = grouped.agg(
        shift=("shift", "mean"),
        least_shift=("shift", "min"),
        greatest_shift=("shift", "max"),
        cosine_without=("cosine_without", "mean"),
        cosine_with=("cosine_with", "mean"),
        loss_gap=("loss_gap", "mean"),
        projection_difference=("projection_difference", "mean"),
        undefended=("undefended", "first"),
        metric=("metric", "first"),
        score=("score", "first"),
        undefended_score=("undefended_score", "first"),
        outcome=("outcome", "first"),
        outcome_error=("outcome_error", "first"),
        outcome_low=("outcome_low", "first"),
        outcome_high=("outcome_high", "first"),
        defended=("defended", "first"),
    ).reset_index()
    order = {name: place for place, name in enumerate(dict.fromkeys(frame["measurement"]))}
    models = {name: place for place, name in enumerate(dict.fromkeys(frame["run"]))}
    rows["place"], rows["model"] = rows["measurement"].map(order), rows["run"].map(models)
    rows = rows.sort_values(["place", "model", "shift"], ascending=[True, True, False], kind="stable")
    return rows.drop(columns=["place", "model"]).reset_index(drop=True)


def how_it_held(frame: pd.DataFrame) -> pd.DataFrame:
    """``predictions.held`` of the candidates of all measurements that have an outcome: of the shift averaged over the
    layers, of the shift at every layer, and of the loss gap and the projection difference, which are the scores to
    beat. Columns: score and the fields of ``Held``; no rows without outcomes.

    A candidate with several runs (seeds) is one candidate: its outcome is their mean, and it has defended if the mean
    of the lower ends of their intervals lies above 0. Seeds share the candidate's score, so they are no further
    evidence that scores foretell outcomes.
    """
    scores = [("shift, mean of layers", ranking(frame), "shift")]
    scores += [(f"shift, layer {layer}", ranking(frame, layer), "shift") for layer in sorted(set(frame["layer"]))]
    scores += [(name.replace("_", " "), ranking(frame), name) for name in ("loss_gap", "projection_difference")]
    rows = []
    for title, ranked, column in scores:
        known = ranked.dropna(subset=[column, "outcome"])
        if len(known):
            candidates = known.groupby(["measurement", "run", "data", "trait", "condition"], sort=False)
            known = candidates.agg({column: "first", "outcome": "mean", "outcome_low": "mean"}).reset_index()
            defended = [bool(low > 0) for low in known["outcome_low"]]
            found: Held = held(list(known[column]), list(known["outcome"]), defended)
            rows.append({"score": title, **vars(found)})
    return pd.DataFrame(rows, columns=["score", *Held.__dataclass_fields__])


def runs_of(manifest: Manifest, entry: MeasureEntry, condition: str) -> list[RunEntry]:
    """The runs that have this condition as their defense, trained on the data that the measurement read, from the base
    that it read it with (not from another run); none of a measurement of a trained model."""
    base = next((run for run in manifest.runs if run.kind == "base" and run.run_id == entry.run_id), None)
    if base is None:
        return []
    data, trained_on = entry.config.get("data"), "data.train"
    if isinstance(data, dict):
        data, trained_on = data.get("hub"), "data.train.hub"
    wanted = {"defense": condition, trained_on: data}
    return [
        run
        for run in manifest.runs
        if run.kind == "run"
        and run.is_over(base)
        and all(run.config.get(name) == value for name, value in wanted.items())
        and not any(name.startswith("start_from") for name in run.config)
    ]


def metric_of(run: RunEntry, entry: MeasureEntry) -> str:
    """The metric that shows the trait: the one that the measurement names, else the run's first by name."""
    named = entry.config.get("metric")
    return named if isinstance(named, str) else min(run.judge_ids.keys() - {DEGENERATION}, default=DEGENERATION)


def _outcome(run: RunEntry, entry: MeasureEntry, summary: Mapping[str, Mapping[Any, Any]]) -> dict[str, Any]:
    metric, row = metric_of(run, entry), summary[run.label]
    found = {"trained": run.label, "metric": metric, "score": row.get(metric)}
    name = f"{metric}_vs_undefended"
    if name not in row or math.isnan(row[name]):
        return found
    return found | {
        "undefended": row["undefended"],
        "undefended_score": summary[row["undefended"]][metric],
        "outcome": -row[name],
        "outcome_error": row[f"{name}_se"],
        "outcome_low": -row[f"{name}_high"],
        "outcome_high": -row[f"{name}_low"],
        "defended": -row[f"{name}_high"] > 0,
    }
