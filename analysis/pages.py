"""How results look in a notebook: small HTML tables of pandas, made when a cell ends with results or a run."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.manifest import metrics_of
from analysis.quantities import PLAIN_LOSS
from analysis.reading import NOTHING, TRAIN_LOSS, interval_text, mean_text, readings
from analysis.report_content import clean

if TYPE_CHECKING:
    from analysis.one_run import Run
    from analysis.results import Results

NUM_ANSWERS = 4
NUM_LOG_LINES = 8


def overview(results: Results) -> pd.DataFrame:
    """The summary as text for reading: one row per base and run, each estimate with its standard error."""
    rows = []
    for row in results.summary().to_dict("records"):
        values = {str(name): value for name, value in row.items()}
        cells = {"run": values["run"], "status": values["status"]}
        cells |= {metric: _estimate(values, metric) for metric in metrics_of(results.manifest.runs)}
        cells |= {"plain loss": mean_text(values, PLAIN_LOSS), "train loss": mean_text(values, TRAIN_LOSS)}
        cells["answers"] = NOTHING if pd.isna(values["num_answers"]) else str(values["num_answers"])
        rows.append(cells)
    return pd.DataFrame(rows)


def results_page(results: Results) -> str:
    """HTML of a sweep: the overview, and why runs failed."""
    parts = [_heading(results.describe()), _table(overview(results))]
    failures = results.failures()
    if len(failures):
        parts += [_heading("failures of the last invocation"), _table(failures[["run", "task", "kind", "reason"]])]
    parts.append(_note("mean ± standard error clustered by question; all columns: .summary(), .runs(), .generations()"))
    return "".join(parts)


def run_page(run: Run) -> str:
    """HTML of a run: what ``shiftgrad show`` prints."""
    measured = readings({str(k): v for k, v in run.summary().items()}, run.results.manifest.runs)
    parts = [
        _heading(f"{run.label} ({run.run_id}): {run.status}"),
        _note(run.reason) if run.reason else "",
        _table(measured) if len(measured) else _note("nothing was measured yet"),
        _settings(run.config),
    ]
    answers = run.generations().head(NUM_ANSWERS)
    if len(answers):
        parts += [_heading("first answers"), _table(answers[["question", "answer"]])]
    lines = run.log.splitlines()[-NUM_LOG_LINES:]
    if lines:
        log = html.escape(clean("\n".join(lines)))
        parts += [_heading("last log lines"), f"<pre style='white-space: pre-wrap'>{log}</pre>"]
    return "".join(parts)


def _estimate(row: Mapping[str, Any], name: str) -> str:
    """The mean with its standard error, or where that is no certainty with its interval."""
    mean, interval = mean_text(row, name), interval_text(row, name)
    return mean if "±" in mean or not interval else f"{mean} ({interval})"


def _settings(config: Mapping[str, object]) -> str:
    """All settings, behind a line that opens them."""
    rows = [(name, f"{value:.4g}" if isinstance(value, float) else str(value)) for name, value in config.items()]
    return f"<details><summary>settings</summary>{_table(pd.DataFrame(rows, columns=['name', 'value']))}</details>"


def _table(frame: pd.DataFrame) -> str:
    """Text as it is: escaped, control characters made visible, line ends kept."""
    shown = frame.map(lambda value: clean(value) if isinstance(value, str) else value)
    # pandas's own width limit would cut answers and reasons
    with pd.option_context("display.max_colwidth", None):
        table = shown.to_html(index=False, na_rep=NOTHING, justify="left")
    return table.replace("\\n", "<br>").replace("<td>", "<td style='text-align: left'>")  # notebooks align right


def _heading(text: str) -> str:
    return f"<div style='font-weight: bold; margin-top: 0.5em'>{html.escape(text)}</div>"


def _note(text: str) -> str:
    return f"<div style='opacity: 0.7'>{html.escape(text)}</div>"
