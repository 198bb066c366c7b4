"""Candidates on the data of several traits: what was foreseen of each, and what its runs showed.

Section 6 and figure 5 of arXiv 2604.16423: does a vector of one trait keep another one away? A column is a measurement
of the kind ``prediction`` (its data, and cosines along the vector of the trait that the data teaches).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.foretold import measurement_of, ranking
from analysis.steering_strength import with_coefficients
from analysis.undefended import NO_DEFENSE

if TYPE_CHECKING:
    from analysis.results import Results

COLUMNS = ("candidate", "measurement", "data", "trait", "shift", "metric", "score", "kept_away", "num_runs")


def cross_trait(frame: pd.DataFrame, layer: int | None = None) -> pd.DataFrame:
    """One row per candidate and measurement, ``none`` (the undefended runs) first; ``frame`` is that of
    ``foretold.foretold``.

    Columns ``COLUMNS``: ``shift`` at ``layer`` (None: mean over layers; of ``none`` 0, what shifts are counted from),
    ``score`` and ``kept_away`` as means over the ``num_runs`` runs that had the candidate as their defense. No rows
    unless a candidate was measured on two data sets.
    """
    ranked = ranking(frame, layer)
    if ranked.empty or ranked.groupby("condition")["data"].nunique().max() < 2:
        return pd.DataFrame(columns=list(COLUMNS))
    undefended: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    in_order = list(dict.fromkeys(frame["condition"]))
    for (measurement, model), part in ranked.groupby(["measurement", "run"], sort=False):
        column = measurement_of(measurement, model)
        where = {"measurement": column, "data": part["data"].iloc[0], "trait": part["trait"].iloc[0]}
        metric = next(iter(part["metric"].dropna()), None)
        plain = part.dropna(subset=["undefended"]).drop_duplicates("undefended")["undefended_score"]
        nothing = {"candidate": NO_DEFENSE, "shift": 0.0, "metric": metric, "score": plain.mean()}
        undefended.append(where | nothing | {"num_runs": len(plain)})
        for candidate in sorted(set(part["condition"]), key=in_order.index):
            runs = part[part["condition"] == candidate]
            found = {"shift": runs["shift"].iloc[0], "metric": metric, "score": runs["score"].mean()}
            found |= {"kept_away": runs["outcome"].mean(), "num_runs": int(runs["score"].notna().sum())}
            rows.append(where | {"candidate": candidate} | found)
    return pd.DataFrame(undefended + rows, columns=list(COLUMNS))


def cross_trait_gradients(results: Results) -> pd.DataFrame:
    """Gradients of all measurements of the kind ``prediction`` along the trait of their data, with ``series`` and
    ``coefficient`` of the steering; no rows unless they read two data sets."""
    entries = [entry for entry in results.manifest.measurements if "predictions" in entry.merged_tables]
    gradients = results.measured("gradients")
    if len({str(entry.config.get("data")) for entry in entries}) < 2:
        return gradients.iloc[:0]
    parts = []
    for entry in entries:
        own = gradients[(gradients["measurement"] == entry.name) & (gradients["run_id"] == entry.run_id)]
        along = with_coefficients(own[own["vector"] == entry.config["trait"]], entry)
        parts.append(along.assign(measurement=measurement_of(entry.name, entry.run)))
    return pd.concat(parts, ignore_index=True)
