"""The report of a sweep: one static page that works offline and can be mailed alone, figures as files beside it.

The bytes depend on the store's content alone: no clock, no path of the store, no random names.
"""

from __future__ import annotations

import base64
import json
import shlex
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from analysis.before_after import before_after_blocks
from analysis.figure_style import Drawn, Width
from analysis.figures import loss_limit, outcomes, steps_per_point, training_curves
from analysis.manifest import sweep_key
from analysis.report_content import (
    agreement_texts,
    clean,
    kinds_of,
    kinds_of_groups,
    number,
    panels_of,
    samples,
    seed_rows,
    summary_rows,
)
from analysis.report_measurements import measurement_sections, sweep_blocks
from analysis.report_trainings import kinds_of_trainings, once_each, signal_blocks
from analysis.report_weights import weight_sections
from analysis.results import Results
from trainables.errors import StoreError

INDEX = "index.html"
_TEMPLATE, _STYLE_SHEET = "report_template.html", "report_style.css"
_MAX_OPEN_RUNS = 8  # with more, only the first question's answers are unfolded
_WIDTHS: tuple[Width, ...] = ("page", "column")


def write_report(results: Results, folder: Path) -> Path:
    """Write ``index.html`` and the figures into ``folder`` (made if it is not there) and return the page's path.

    The figures, each as PNG and PDF: ``outcomes.*`` and ``training.*`` across a page, ``outcomes_column.*`` and
    ``training_column.*`` for one column; where runs differ in their seed alone, ``over_seeds.*`` too; where runs start
    from runs, ``before_after_*``; and those of the measurements. The page embeds the PNGs. A figure that has nothing to
    show is not written.
    Works on a sweep that is running, failed or has not begun. Raises StoreError if the folder is not empty, and what
    ``results`` raises for a store that cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise StoreError(f"{folder}: not empty; a report is written into an empty folder")
    entries = results.manifest.runs
    runs, scores, generations, training = results.runs(), results.scores(), results.generations(), results.training()
    training = once_each(training, entries)
    summary, panels, kinds = results.summary(), panels_of(entries, scores), kinds_of(entries)
    over_seeds = results.over_seeds() if results.has_several_seeds() else summary.iloc[:0]
    drawn = {
        (name, width): figure
        for width in _WIDTHS
        for name, figure in (
            ("outcomes", outcomes(summary, panels, kinds, width)),
            ("over_seeds", outcomes(over_seeds, panels, kinds_of_groups(entries), width)),
            ("training", training_curves(training, kinds_of_trainings(entries), width)),
        )
        if figure is not None
    }
    measurements = [*measurement_sections(results), *weight_sections(results)]
    together = sweep_blocks(results)
    before_after = before_after_blocks(entries, summary, panels)
    watched = list(signal_blocks(results.signals(), entries))
    blocks = [*before_after, *watched, *(block for section in measurements for block in section.blocks), *together]
    drawn |= {(block.name, width): figure for block in blocks for width, figure in block.drawn.items()}
    statuses = dict(zip(runs["run"], runs["status"], strict=True))
    page = (
        _environment()
        .get_template(_TEMPLATE)
        .render(
            name=results.manifest.name,
            style=resources.files("analysis").joinpath(_STYLE_SHEET).read_text(encoding="utf-8"),
            sweep_text=_sweep_text(results),
            bases=_bases(results),
            num_runs=sum(entry.kind == "run" for entry in entries),
            status_counts=runs.loc[runs["kind"] == "run", "status"].value_counts(sort=False).to_dict(),
            num_answers=len(generations),
            num_questions=generations["question_id"].nunique(),
            panel_titles=[panel.title for panel in panels],
            summary=summary_rows(summary, panels, entries),
            over_seeds=seed_rows(over_seeds, panels, entries),
            figures={name: _embedded(drawn, name) for name in ("outcomes", "over_seeds", "training")},
            before_after=before_after,
            watched=watched,
            measurements=measurements,
            together=together,
            measured_figures={block.name: _embedded(drawn, block.name) for block in blocks if block.drawn},
            steps_per_point=steps_per_point(training),
            loss_limit=loss_limit(training),
            agreement=agreement_texts(results.agreement()),
            extractions=results.extractions().to_dict("records"),
            samples=samples(entries, generations, scores, statuses),
            all_open=len(entries) <= _MAX_OPEN_RUNS,
            failures=_failures(results),
            runs=_run_facts(runs),
            vectors=results.manifest.vectors,
            provenance=_provenance(results),
        )
    )
    for (name, width), figure in drawn.items():
        stem = name if width == "page" else f"{name}_{width}"
        (folder / f"{stem}.png").write_bytes(figure.png)
        (folder / f"{stem}.pdf").write_bytes(figure.pdf)
    path = folder / INDEX
    path.write_text(page, encoding="utf-8", newline="\n")
    return path


def _environment() -> jinja2.Environment:
    """Everything that a template is given is escaped; a name that it does not get is an error."""
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: resources.files("analysis").joinpath(name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _embedded(drawn: dict[tuple[str, Width], Drawn], name: str) -> dict[str, Any] | None:
    """The figure's two widths as data addresses, with the pixels of each so that the page does not jump."""
    figures = {width: drawn[name, width].png for width in _WIDTHS if (name, width) in drawn}
    if not figures:
        return None
    return {
        width: {
            "address": "data:image/png;base64," + base64.b64encode(png).decode("ascii"),
            # width and height stand at bytes 16 to 24 of every PNG
            "width": int.from_bytes(png[16:20], "big"),
            "height": int.from_bytes(png[20:24], "big"),
        }
        for width, png in figures.items()
    }


def _sweep_text(results: Results) -> str | None:
    path = results.location / sweep_key(results.name, "sweep.yaml")
    return clean(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None


def _bases(results: Results) -> list[str]:
    """The models that runs start from, with revision and number format."""
    bases = [entry.config for entry in results.manifest.runs if entry.kind == "base"]
    return [
        ", ".join(str(config[key]) for key in ("base.model", "base.revision", "base.dtype") if config.get(key))
        for config in bases
    ]


def _failures(results: Results) -> list[dict[str, Any]]:
    """One entry per task that failed; what was skipped because of another failure stands after it, in short."""
    rows = results.failures()
    rows = rows.astype(object).where(rows.notna(), None)
    found = [{str(key): value for key, value in row.items()} for row in rows.to_dict("records")]
    for row in found:
        row["reason"], row["log_tail"] = clean(row["reason"]), clean(row["log_tail"] or "")
    return sorted(found, key=lambda row: row["kind"] == "skipped")


def _run_facts(runs: pd.DataFrame) -> list[dict[str, str]]:
    """Identity and cost of each row of the sweep."""
    facts = []
    for row in runs.to_dict("records"):
        times = [str(row[key]) for key in ("started_utc", "finished_utc") if not pd.isna(row[key])]
        facts.append(
            {
                "run": row["run"],
                "run_id": row["run_id"],
                "sample_id": row["sample_id"],
                "status": row["status"],
                "num_steps": number(row["num_steps"], 0),
                "num_tokens": number(row["num_tokens"], 0),
                "seconds": number(row["seconds_training"], 0),
                "started_utc": times[0] if times else number(None),
            }
        )
    return facts


def _provenance(results: Results) -> dict[str, Any]:
    """``command`` (or None), ``facts`` and ``versions`` of the last invocation, or the ``problem`` of reading them."""
    path = results.location / sweep_key(results.name, "provenance.json")
    found: dict[str, Any] = {"command": None, "facts": {}, "versions": {}, "problem": None}
    if not path.is_file():
        return found | {"problem": "There is no provenance.json in this sweep's folder."}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return found | {"problem": f"provenance.json cannot be read: {error}"}
    if not isinstance(content, dict):
        return found | {"problem": "provenance.json is not a mapping."}
    arguments, versions = content.pop("arguments", None), content.pop("versions", {})
    if isinstance(arguments, list) and arguments:
        found["command"] = clean("shiftgrad " + shlex.join(str(argument) for argument in arguments))
    if isinstance(versions, dict):
        found["versions"] = {str(name): str(version) for name, version in versions.items()}
    found["facts"] = {
        str(key).replace("_", " "): value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in content.items()
    }
    return found
