"""The columns of the summary, by run and by group: names, pandas types, and what goes into those that both have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.quantities import PLAIN_LOSS, Measured
from analysis.statistics import Estimate
from trainables.errors import StoreError

Column = tuple[str, str]
"""Name and pandas dtype."""


def of_runs(metrics: Sequence[str]) -> Iterator[Column]:
    """The columns of ``summary.summarize``, in order."""
    yield from (("run", "str"), ("kind", "str"), ("status", "str"))
    for name in (*metrics, PLAIN_LOSS):
        yield from _means(name)
        if name != PLAIN_LOSS:
            yield from _counts(name)
        yield from _differences(name)
    yield from (("train_loss", "float64"), ("num_answers", "Int64"))
    yield from (("undefended", "str"), ("undefended_problem", "str"))


def of_groups(fields: Iterable[str], metrics: Sequence[str]) -> Iterator[Column]:
    """The columns of ``groups.summarize_groups``, in order; the dtype of a field is that of its values."""
    yield from ((field, "") for field in fields)
    yield from (("kind", "str"), ("num_runs", "Int64"), ("num_runs_missing", "Int64"))
    yield from (("runs_missing_by_status", "object"), ("num_seeds", "Int64"), ("varies", "str"))
    for name in (*metrics, PLAIN_LOSS):
        yield from _means(name)
        yield from ((f"{name}_num_runs", "Int64"), (f"{name}_num_seeds", "Int64"))
        if name != PLAIN_LOSS:
            yield from _counts(name)
        yield from _differences(name)
        yield f"{name}_vs_undefended_num_runs", "Int64"
    yield from (("train_loss", "float64"), ("num_train_losses", "Int64"), ("num_answers", "Int64"))
    yield from (("undefended", "str"), ("undefended_problem", "str"))


def repeated_columns(metrics: Sequence[str]) -> list[str]:
    """Columns that a summary of these metrics would have twice: a metric cannot be called ``status`` or ``varies``."""
    names_of = [[name for name, _ in columns] for columns in (of_runs(metrics), of_groups((), metrics))]
    return sorted({name for names in names_of for name in names if names.count(name) > 1})


def frame(columns: Iterable[Column], rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A data frame with these columns. Raises StoreError if one of them is there twice."""
    listed = list(columns)
    names = [name for name, _ in listed]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise StoreError(
            f"the summary would have the column {', '.join(repeated)} twice; give the metric another name in the sweep"
        )
    return pd.DataFrame({name: _series([row[name] for row in rows], dtype) for name, dtype in listed})


def mean_values(name: str, estimate: Estimate) -> dict[str, Any]:
    """``<name>`` with ``_se``, ``_low``, ``_high``."""
    return {
        name: estimate.mean,
        f"{name}_se": estimate.standard_error,
        f"{name}_low": estimate.low,
        f"{name}_high": estimate.high,
    }


def difference_values(name: str, estimate: Estimate, is_paired: bool) -> dict[str, Any]:
    """``<name>_vs_undefended`` with ``_se``, ``_low``, ``_high``, and the number of questions that it rests on: <NA>
    without an undefended run."""
    column = f"{name}_vs_undefended"
    count = estimate.num_clusters if is_paired else None
    return mean_values(column, estimate) | {f"{column}_{_unit(name)}": count}


def count_values(found: Measured, rows: Sequence[int], metric: str) -> dict[str, Any]:
    """Answers with a value and without, and why, over these rows."""
    labels = [found.entries[row].label for row in rows if found.is_counted(found.entries[row], metric)]
    missing: dict[str, int] = {}
    for label in labels:
        for status, count in found.missing.get((label, metric), {}).items():
            missing[status] = missing.get(status, 0) + count
    num_scored = sum(found.num_scored.get((label, metric), 0) for label in labels)
    return {
        f"{metric}_num_scored": num_scored if labels else None,
        f"{metric}_num_missing": sum(missing.values()) if labels else None,
        f"{metric}_missing_by_status": missing,
    }


def _means(name: str) -> Iterator[Column]:
    yield from ((column, "float64") for column in (name, f"{name}_se", f"{name}_low", f"{name}_high"))


def _counts(metric: str) -> Iterator[Column]:
    yield from ((f"{metric}_num_scored", "Int64"), (f"{metric}_num_missing", "Int64"))
    yield f"{metric}_missing_by_status", "object"


def _differences(name: str) -> Iterator[Column]:
    yield from _means(f"{name}_vs_undefended")
    yield f"{name}_vs_undefended_{_unit(name)}", "Int64"


def _unit(name: str) -> str:
    """What a mean rests on: a loss has data rows in place of questions."""
    return "num_rows" if name == PLAIN_LOSS else "num_questions"


def _series(values: list[Any], dtype: str) -> pd.Series:
    if dtype:
        return pd.Series(values, dtype=dtype)
    given = [value for value in values if value is not None]
    if given and all(isinstance(value, int) and not isinstance(value, bool) for value in given):
        return pd.Series(values, dtype="Int64")  # with a gap it would become a float
    return pd.Series(values)
