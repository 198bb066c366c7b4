"""One row of the summary as text for reading: what was measured of a run, with its errors and gaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.manifest import RunEntry, metrics_of
from analysis.quantities import PLAIN_LOSS

NOTHING = "–"
NO_SPREAD = 1e-9  # a standard error below this is 0 but for rounding
TRAIN_LOSS = "train_loss"


def readings(row: Mapping[str, Any], entries: Sequence[RunEntry]) -> pd.DataFrame:
    """One row per metric of the sweep that was measured of the run, then the losses; every cell is text.

    Columns: ``measured``, ``mean`` (± standard error), ``95 % interval``, ``answers`` (that have a value, and gaps),
    and, where there is an undefended run to compare with, ``minus <its label>`` with the interval of the difference.
    """
    undefended = row["undefended"]
    rows = []
    for name in (*metrics_of(entries), PLAIN_LOSS, TRAIN_LOSS):
        if pd.isna(row[name]) and not _is_asked(row, name):
            continue
        cells = {"measured": name.replace("_", " ") if name in (PLAIN_LOSS, TRAIN_LOSS) else name}
        cells |= {
            "mean": mean_text(row, name),
            "95 % interval": interval_text(row, name),
            "answers": _answers(row, name),
        }
        if not pd.isna(undefended):
            cells[f"minus {undefended}"] = _difference(row, name)
        rows.append(cells)
    return pd.DataFrame(rows)


def digits_of(name: str) -> int:
    """Digits after the point that a quantity is shown with."""
    return 3 if name in (PLAIN_LOSS, TRAIN_LOSS) else 2


def mean_text(row: Mapping[str, Any], name: str) -> str:
    """``0.75 ± 0.14``; the error is left out where there is none, and where it is 0, which is no certainty: all
    questions have the same mean. The interval says what is known then."""
    mean, error, digits = row[name], row.get(f"{name}_se"), digits_of(name)
    if pd.isna(mean):
        return NOTHING
    return f"{mean:.{digits}f}" + ("" if pd.isna(error) or error < NO_SPREAD else f" ± {error:.{digits}f}")


def interval_text(row: Mapping[str, Any], name: str, sign: str = "") -> str:
    """``0.28 to 1.00``, or nothing where there is no interval; ``sign``: ``+`` shows it on both ends."""
    low, high, digits = row.get(f"{name}_low"), row.get(f"{name}_high"), digits_of(name.partition("_vs_")[0])
    return "" if pd.isna(low) or pd.isna(high) else f"{low:{sign}.{digits}f} to {high:{sign}.{digits}f}"


def _answers(row: Mapping[str, Any], name: str) -> str:
    scored, missing = row.get(f"{name}_num_scored"), row.get(f"{name}_num_missing")
    if pd.isna(scored):
        return ""
    if not missing:
        return str(scored)
    why = ", ".join(f"{count} {status}" for status, count in row[f"{name}_missing_by_status"].items())
    return f"{scored}, missing: {why}"


def _difference(row: Mapping[str, Any], name: str) -> str:
    difference = f"{name}_vs_undefended"
    mean = row.get(difference)
    if pd.isna(mean):
        return ""
    interval = interval_text(row, difference, "+")
    return f"{mean:+.{digits_of(name)}f}" + (f" ({interval})" if interval else "")


def _is_asked(row: Mapping[str, Any], name: str) -> bool:
    """Whether there are answers to judge: then a metric without a value is a gap to show, not nothing."""
    return not pd.isna(row.get(f"{name}_num_scored"))
