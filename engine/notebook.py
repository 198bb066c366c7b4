"""Live progress in a notebook: one output of the cell, updated in place, that stays as a short account of the sweep.

rich's own live display needs ipywidgets in a notebook, and shows nothing where a notebook is executed without a
browser; IPython's display with an id is there in every notebook and is saved with it.
"""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from engine.progress import Pace, duration, figures_text

UPDATE_INTERVAL_S = 0.25
NUM_ENDED = 8  # jobs that went well: the last of them; all others stay
_CELL = "padding: 0 1em 0 0; text-align: left; border: none; background: none"


class Display(Protocol):
    """An output of a cell that can be replaced: IPython's DisplayHandle."""

    def update(self, obj: dict[str, str], *, raw: bool) -> None: ...


def show_output(content: dict[str, str]) -> Display:
    """Add an output to the running cell; ``content`` by MIME type."""
    from IPython.display import display  # there in every notebook, and not needed elsewhere

    handle: Display = display(content, raw=True, display_id=True)
    return handle


@dataclass
class _Job:
    """A job that runs: where it is, as ``figures`` last said."""

    label: str
    phase: str = "starting"
    done: int = 0
    total: int = 0
    figures: str = ""


class NotebookProgress:
    """A ProgressView for the cell that is running: the sweep, a line per running job, and how the others ended."""

    def __init__(self, show: Callable[[dict[str, str]], Display] = show_output) -> None:
        self.show = show
        self.pace = Pace()
        self.begun = time.monotonic()
        self.num_jobs = 0
        self.running: dict[str, _Job] = {}
        self.ended: list[tuple[str, bool]] = []  # what to say of it, whether it went well
        self.said: list[tuple[str, bool]] = []  # about what is no job
        self.stopped = False
        self._output: Display | None = None
        self._last = 0.0

    def start(self, num_jobs: int) -> None:
        self.num_jobs = num_jobs
        self._output = self.show(self._content())

    def job_started(self, job_id: str, label: str) -> None:
        self.pace.forget(job_id)
        self.running[job_id] = _Job(label)
        self._update()

    def job_figures(self, job_id: str, label: str, figures: Mapping[str, Any]) -> None:
        if "phase" not in figures or "units_done" not in figures or job_id not in self.running:
            return
        job = self.running[job_id] = _Job(
            label, str(figures["phase"]), int(figures["units_done"]), int(figures["units_total"])
        )
        job.figures = figures_text(figures, self.pace.seconds_left(job_id, job.phase, job.done, job.total))
        if time.monotonic() - self._last >= UPDATE_INTERVAL_S:
            self._update()

    def job_ended(self, job_id: str, label: str, outcome: str, *, ok: bool = True) -> None:
        self.running.pop(job_id, None)
        stamp = duration(time.monotonic() - self.begun)
        self.ended.append((f"[{stamp:>7}] {label}: {outcome}", ok))
        self._update()

    def say(self, text: str, *, ok: bool = True) -> None:
        stamp = duration(time.monotonic() - self.begun)
        self.said.append((f"[{stamp:>7}] {text}", ok))
        self._update()

    def stop(self) -> None:
        self.stopped = True
        self._update()

    def _update(self) -> None:
        self._last = time.monotonic()
        if self._output is not None:
            self._output.update(self._content(), raw=True)

    def _content(self) -> dict[str, str]:
        good = [line for line, went_well in self.ended if went_well]
        bad = [line for line, went_well in self.ended if not went_well]
        heading = f"{len(self.ended)} of {self.num_jobs} jobs ended"
        heading += f", {len(bad)} of them failed or skipped" if bad else ""
        heading += f" ({duration(time.monotonic() - self.begun)})"
        good += [line for line, went_well in self.said if went_well]
        bad += [line for line, went_well in self.said if not went_well]
        running = list(self.running.values())
        if self.stopped and running:
            heading += f"; stopped while {len(running)} ran"
        hidden = len(good) - NUM_ENDED
        lines = [f"{hidden} earlier ones: done"] if hidden > 0 else []
        lines += good[-NUM_ENDED:]
        text = [heading, *(" ".join(_words(job)) for job in running), *bad, *lines]
        page = [f"<div><progress value='{len(self.ended)}' max='{max(self.num_jobs, 1)}'></progress> {heading}</div>"]
        page.append(_table(running))
        page += [f"<pre style='margin: 0; color: #b00020; white-space: pre-wrap'>{_joined(bad)}</pre>"] if bad else []
        page += [f"<pre style='margin: 0; white-space: pre-wrap'>{_joined(lines)}</pre>"] if lines else []
        return {"text/plain": "\n".join(text), "text/html": "".join(page)}


def _words(job: _Job) -> list[str]:
    """``none: train``, ``6/18``, figures."""
    return [f"{job.label}: {job.phase}", f"{job.done}/{job.total}" if job.total else "", job.figures]


def _table(jobs: list[_Job]) -> str:
    rows = []
    for job in jobs:
        name, count, figures = (html.escape(text) for text in _words(job))
        value = f"value='{job.done}' max='{job.total}'" if job.total else ""
        cells = (name, f"<progress style='width: 8em' {value}></progress>" if value else "", count, figures)
        rows.append("<tr>" + "".join(f"<td style='{_CELL}'>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table style='border: none'>{''.join(rows)}</table>" if rows else ""


def _joined(lines: list[str]) -> str:
    return html.escape("\n".join(lines))
