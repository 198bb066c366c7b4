"""What a report says, as plain values: formatted numbers, marks and chosen samples. No HTML and no files here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.figures import BASE_KIND, EDITED_KIND, Panel
from analysis.groups import seed_groups
from analysis.manifest import DEGENERATION, RunEntry, metrics_of
from analysis.quantities import PLAIN_LOSS, RATE, bounds_of
from analysis.rows import OK
from analysis.undefended import ITSELF

NUM_SAMPLE_QUESTIONS = 4
NO_VALUE = "—"

_SAME_BASE = ("base.model", "base.revision", "base.dtype")
_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}


@dataclass(frozen=True)
class Cell:
    """One estimate of the summary. ``warning`` says what to beware of; what there is not is empty."""

    title: str
    value: str
    interval: str
    standard_error: str
    difference: str
    difference_interval: str
    counts: str
    warning: str


@dataclass(frozen=True)
class SummaryRow:
    """A run, or a group of runs that differ in their seed alone; ``seeds`` says which, and is empty for a run.

    ``compared``: what its differences are to, or why it has none.
    """

    run: str
    is_base: bool
    status: str
    seeds: str
    compared: str
    cells: tuple[Cell, ...]
    train_loss: str
    num_answers: str


@dataclass(frozen=True)
class Verdict:
    """What one metric said of one answer; ``level``: ``shown``, ``absent``, ``broken`` or ``unknown``."""

    metric: str
    said: str
    level: str


@dataclass(frozen=True)
class Answer:
    run: str
    is_base: bool
    text: str
    is_cut: bool
    verdicts: tuple[Verdict, ...]

    @property
    def level(self) -> str:
        """The strongest of its verdicts."""
        levels = [verdict.level for verdict in self.verdicts]
        return next((level for level in ("broken", "shown", "unknown") if level in levels), "absent")


@dataclass(frozen=True)
class Sample:
    """One question with an answer of every run that was asked it; ``without``: runs that have none, and why."""

    question_id: str
    question: str
    system_prompt: str | None
    answers: tuple[Answer, ...]
    without: tuple[str, ...]


def clean(text: str) -> str:
    """Text of a model or a log as it can stand on a page: terminal colours go, control characters become visible."""
    return _TERMINAL_CODES.sub("", text.replace("\r\n", "\n")).translate(_CONTROLS)


def panels_of(entries: Sequence[RunEntry], scores: pd.DataFrame) -> list[Panel]:
    """What is shown per run: the metrics, the loss on plain answers, degeneration."""
    panels = []
    for metric in metrics_of(entries):
        values = scores.loc[(scores["metric"] == metric) & (scores["status"] == OK), "value"]
        rate = bounds_of(metric, entries, values) == RATE
        panels.append(Panel(metric, f"{metric} rate" if rate else metric, rate))
    loss = Panel(PLAIN_LOSS, "plain loss (nats/token)", False)
    place = next((index for index, panel in enumerate(panels) if panel.name == DEGENERATION), len(panels))
    return [*panels[:place], loss, *panels[place:]]


def kinds_of(entries: Sequence[RunEntry]) -> dict[str, str]:
    """The kind of defense of each run, such as ``pps`` or ``pps + inoculation``; a base is of the kind ``base``, an
    edited model of the kind ``edited``."""
    kinds = {"base": BASE_KIND, "edited": EDITED_KIND}
    return {entry.label: kinds.get(entry.kind) or _defense_kind(entry) for entry in entries}


def summary_rows(summary: pd.DataFrame, panels: Sequence[Panel], entries: Sequence[RunEntry]) -> list[SummaryRow]:
    """The summary by run for reading, in its order."""
    return _table_rows(summary, panels, {entry.label: entry for entry in entries})


def seed_rows(over_seeds: pd.DataFrame, panels: Sequence[Panel], entries: Sequence[RunEntry]) -> list[SummaryRow]:
    """The summary over seeds for reading, in its order."""
    return _table_rows(over_seeds, panels, _first_of_groups(entries))


def kinds_of_groups(entries: Sequence[RunEntry]) -> dict[str, str]:
    """The kind of defense of each group of runs that differ in their seed alone."""
    kinds = kinds_of(entries)
    return {label: kinds[entry.label] for label, entry in _first_of_groups(entries).items()}


def _first_of_groups(entries: Sequence[RunEntry]) -> dict[str, RunEntry]:
    return {label: group[0] for label, group in seed_groups(entries).items()}


def _table_rows(frame: pd.DataFrame, panels: Sequence[Panel], entry_of: Mapping[str, RunEntry]) -> list[SummaryRow]:
    by_label = {str(row["run"]): {str(k): v for k, v in row.items()} for row in frame.to_dict("records")}
    bases = [(label, entry) for label, entry in entry_of.items() if entry.kind == "base"]
    rows = []
    for label, row in by_label.items():
        entry = entry_of[label]
        base = None if entry.kind == "base" else _base_of(entry, bases)
        rows.append(
            SummaryRow(
                run=label,
                is_base=entry.kind == "base",
                status=row["status"],
                seeds=_seeds(row) if "num_runs" in row and entry.kind == "run" else "",
                compared=_compared(row),
                cells=tuple(_cell(panel, row, None if base is None else by_label[base]) for panel in panels),
                train_loss=number(row["train_loss"]),
                num_answers="0" if pd.isna(row["num_answers"]) else str(row["num_answers"]),
            )
        )
    return rows


def samples(
    entries: Sequence[RunEntry], generations: pd.DataFrame, scores: pd.DataFrame, statuses: Mapping[str, str]
) -> list[Sample]:
    """The first questions in the order of the sweep's answers, each with every run's first answer to it.

    Nothing is chosen by what the answers say. Bases come first.
    """
    ordered = sorted(entries, key=lambda entry: entry.kind != "base")
    order = {entry.label: position for position, entry in enumerate(ordered)}
    first = generations.assign(place=generations["run"].map(order)).sort_values("place", kind="stable")
    first = first.astype({"system_prompt": object})
    first["system_prompt"] = first["system_prompt"].where(first["system_prompt"].notna(), None)
    questions = dict.fromkeys(first[["question_id", "question", "system_prompt"]].itertuples(index=False, name=None))
    wanted = list(questions)[:NUM_SAMPLE_QUESTIONS]
    first = first[first["question_id"].isin([question_id for question_id, _, _ in wanted])]
    first = first[first["sample_index"] == first.groupby(["run", "question_id"])["sample_index"].transform("min")]
    judged = scores[scores["question_id"].isin(first["question_id"].unique())]
    verdict_rows: dict[tuple[Any, ...], Any] = {
        (row.run, row.question_id, row.sample_index, row.metric): (row.status, row.value)
        for row in judged.itertuples(index=False)
    }
    rows = {(row.run, row.question_id, row.question, row.system_prompt): row for row in first.itertuples(index=False)}
    made = []
    for question_id, question, system_prompt in wanted:
        answers, without = [], []
        for entry in ordered:
            row: Any = rows.get((entry.label, question_id, question, system_prompt))
            if row is None:
                why = "not asked this" if statuses[entry.label] == "done" else statuses[entry.label]
                without.append(f"{entry.label} ({why})")
                continue
            verdicts = [
                _verdict(metric, verdict_rows.get((entry.label, question_id, row.sample_index, metric)))
                for metric in metrics_of([entry])
            ]
            # degeneration is said where there is something to say
            kept = tuple(v for v in verdicts if v.metric != DEGENERATION or v.level != "absent")
            is_cut = row.finish_reason == "length"
            answers.append(Answer(entry.label, entry.kind == "base", clean(row.answer), is_cut, kept))
        prompt = None if system_prompt is None else clean(system_prompt)
        made.append(Sample(question_id, clean(question), prompt, tuple(answers), tuple(without)))
    return made


def agreement_texts(agreement: pd.DataFrame) -> list[dict[str, str]]:
    """The table of agreement for reading, in its order."""

    def text(row: Mapping[str, Any]) -> dict[str, str]:
        interval = "" if pd.isna(row["auc_low"]) else f"{row['auc_low']:.2f} to {row['auc_high']:.2f}"
        figures = {name: number(row[name], 2) for name in ("agreement", "kappa", "auc", "correlation")}
        shares = {name: number(row[name], 2) for name in ("share_one", "share_other")}
        missing = int(row["num_answers"]) - int(row["num_both"])
        counts = {"num_both": f"{int(row['num_both'])}", "missing": f"{missing} without a score" if missing else ""}
        names = {name: str(row[name]) for name in ("answers", "metric", "other")}
        return {**names, **figures, **shares, **counts, "interval": interval}

    return [text(row) for row in agreement.to_dict("records")]  # type: ignore[arg-type]


def number(value: Any, digits: int = 3) -> str:
    """A number for a table; a dash where there is none."""
    return NO_VALUE if value is None or pd.isna(value) else f"{value:.{digits}f}"


def _defense_kind(entry: RunEntry) -> str:
    kinds = [str(value) for name, value in entry.config.items() if re.fullmatch(r"defense\.(\d+\.)?kind", name)]
    if kinds:
        return " + ".join(kinds)
    # only its label is there, such as "pps bridge L20 x1.5 + inoculation bridge"
    parts = [part.split() for part in str(entry.config.get("defense") or entry.label).split(" + ")]
    return " + ".join(words[0] for words in parts if words)


def _base_of(entry: RunEntry, bases: Sequence[tuple[str, RunEntry]]) -> str | None:
    """The base that a run is compared with: the only one, or the one of the same model; None if that is not clear."""
    same = [label for label, base in bases if all(base.config.get(k) == entry.config.get(k) for k in _SAME_BASE)]
    found = [label for label, _ in bases] if len(bases) == 1 else same
    return found[0] if len(found) == 1 else None


def _seeds(row: Mapping[str, Any]) -> str:
    """How many runs and seeds a group rests on, and what is missing."""
    seeds, missing = row["num_seeds"], row["runs_missing_by_status"]
    text = "one seed: how seeds differ is unknown" if seeds == 1 else f"{seeds} seeds"
    reasons = ", ".join(f"{count} {status}" for status, count in sorted(missing.items()))
    return f"{text}; {reasons} of {row['num_runs']} runs" if reasons else text


def _compared(row: Mapping[str, Any]) -> str:
    undefended, problem = row["undefended"], row["undefended_problem"]
    said = "" if pd.isna(undefended) else f"Δ to {undefended}"
    if pd.isna(problem) or problem == ITSELF or row["kind"] == "base":
        return said
    return f"{said}; {problem}" if said else f"no Δ: {problem}"


def _cell(panel: Panel, row: Mapping[str, Any], base_row: Mapping[str, Any] | None) -> Cell:
    name, difference = panel.name, f"{panel.name}_vs_undefended"
    signed = "{:+.3f}" if name == PLAIN_LOSS else "{:+.2f}"
    warning = ""
    if name in (PLAIN_LOSS, DEGENERATION) and base_row is not None and _is_above(name, row, base_row):
        warning = "above the base"
    return Cell(
        title=panel.title,
        value=number(row[name]),
        interval=_interval_text(row[f"{name}_low"], row[f"{name}_high"], "{:.2f}"),
        standard_error="" if math.isnan(row[f"{name}_se"]) else f"SE {row[f'{name}_se']:.3f}",
        difference="" if math.isnan(row[difference]) else f"Δ {signed.format(row[difference])}".replace("-", "−"),
        difference_interval=_interval_text(row[f"{difference}_low"], row[f"{difference}_high"], signed),
        counts="" if name == PLAIN_LOSS else _counts(name, row),
        warning=warning,
    )


def _interval_text(low: float, high: float, form: str) -> str:
    return "" if math.isnan(low) else f"{form.format(low)} to {form.format(high)}".replace("-", "−")


def _is_above(name: str, row: Mapping[str, Any], base_row: Mapping[str, Any]) -> bool:
    """More than two standard errors of the difference (taken as independent) above the base."""
    excess = row[name] - base_row[name]
    return bool(excess > 0 and excess > 2 * math.hypot(row[f"{name}_se"], base_row[f"{name}_se"]))


def _counts(metric: str, row: Mapping[str, Any]) -> str:
    if pd.isna(row[f"{metric}_num_scored"]):
        return "not scored"
    missing = row[f"{metric}_missing_by_status"]
    reasons = ", ".join(f"{status.replace('_', ' ')} {count}" for status, count in sorted(missing.items()))
    text = f"{row[f'{metric}_num_scored']} scored, {row[f'{metric}_num_missing']} missing"
    return f"{text} ({reasons})" if reasons else text


def _verdict(metric: str, found: tuple[str, float] | None) -> Verdict:
    if found is None:
        return Verdict(metric, "not judged", "unknown")
    status, value = found
    if status != OK:
        return Verdict(metric, status.replace("_", " "), "unknown")
    is_shown = 0.5 <= value <= 1  # on another scale than 0 to 1 the value stands for itself
    level = ("broken" if metric == DEGENERATION else "shown") if is_shown else "absent"
    return Verdict(metric, {0.0: "no", 1.0: "yes"}.get(value, f"{value:.3g}"), level)
