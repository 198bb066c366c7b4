"""Live progress: a line per running job with a terminal, plain log lines without one, one output in a notebook."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

LINE_INTERVAL_S = 15.0
FIGURES = {"loss": "loss {:.3f}", "tokens_per_s": "{:.0f} tok/s"}


class ProgressView(Protocol):
    """What shows progress to a person. ``label`` names a job; jobs are told apart by their id.

    ``ok``: whether the job did what it was to do; ``outcome`` says more.
    """

    def start(self, num_jobs: int) -> None: ...

    def job_started(self, job_id: str, label: str) -> None: ...

    def job_figures(self, job_id: str, label: str, figures: Mapping[str, Any]) -> None: ...

    def job_ended(self, job_id: str, label: str, outcome: str, *, ok: bool = True) -> None: ...

    def say(self, text: str, *, ok: bool = True) -> None:
        """A line about something that is no job."""

    def stop(self) -> None: ...


def make_progress(console: Console) -> ProgressView:
    """Live lines where the console is a terminal, one updated output in a notebook, log lines elsewhere."""
    if console.is_jupyter:
        from engine.notebook import NotebookProgress  # which is made of what stands here

        return NotebookProgress()
    return LiveProgress(console) if console.is_terminal else LineProgress(console)


class Pace:
    """Time left in a phase, from the units done since this process first heard of it."""

    def __init__(self) -> None:
        self._begun: dict[tuple[str, str], tuple[float, int]] = {}

    def forget(self, job_id: str) -> None:
        """A job that starts, or starts again after its process died, has a pace of its own."""
        for known in [known for known in self._begun if known[0] == job_id]:
            del self._begun[known]

    def seconds_left(self, job_id: str, phase: str, done: int, total: int) -> float | None:
        now = time.monotonic()
        started, first = self._begun.setdefault((job_id, phase), (now, done))
        if done <= first:
            return None
        return (now - started) / (done - first) * (total - done)


def figures_text(figures: Mapping[str, Any], seconds_left: float | None) -> str:
    """The figures of a job that a person looks at, and the time left in its phase."""
    parts = [text.format(figures[name]) for name, text in FIGURES.items() if name in figures]
    if seconds_left is not None:
        parts.append(f"{duration(seconds_left)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """``45s``, ``1m40s``, ``30h01m``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class LineProgress:
    """One line when a job starts and ends, and every 15 s a line about each running one."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.pace = Pace()
        self.begun = time.monotonic()
        self.last: dict[str, float] = {}
        self.num_jobs = 0
        self.num_ended = 0

    def start(self, num_jobs: int) -> None:
        self.num_jobs = num_jobs

    def job_started(self, job_id: str, label: str) -> None:
        self.pace.forget(job_id)
        self.last[job_id] = time.monotonic()
        self._line(f"{label}: started")

    def job_figures(self, job_id: str, label: str, figures: Mapping[str, Any]) -> None:
        if "phase" not in figures or "units_done" not in figures:
            return
        phase, done, total = str(figures["phase"]), int(figures["units_done"]), int(figures["units_total"])
        left = self.pace.seconds_left(job_id, phase, done, total)
        now = time.monotonic()
        if now - self.last.get(job_id, 0.0) < LINE_INTERVAL_S:
            return
        self.last[job_id] = now
        text = figures_text(figures, left)
        self._line(f"{label}: {phase} {done}/{total}" + (f", {text}" if text else ""))

    def job_ended(self, job_id: str, label: str, outcome: str, *, ok: bool = True) -> None:
        self.last.pop(job_id, None)
        self.num_ended += 1
        self._line(f"{label}: {outcome} ({self.num_ended}/{self.num_jobs} jobs)", "" if ok else "red")

    def say(self, text: str, *, ok: bool = True) -> None:
        self._line(text, "" if ok else "red")

    def stop(self) -> None:
        """Nothing stays open."""

    def _line(self, text: str, style: str = "") -> None:
        stamp = duration(time.monotonic() - self.begun)
        self.console.print(Text(f"[{stamp:>7}] {text}", style), soft_wrap=True)


class LiveProgress:
    """A bar for the sweep and one for every running job."""

    def __init__(self, console: Console) -> None:
        # No markup: a label may hold brackets. Where the terminal is narrow the label gives way, not the figures.
        self.progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
            BarColumn(bar_width=10, table_column=Column(width=10)),
            MofNCompleteColumn(table_column=Column(no_wrap=True, justify="right")),
            TextColumn("{task.fields[figures]}", markup=False, style="dim", table_column=Column(no_wrap=True)),
            console=console,
            refresh_per_second=4,
            expand=True,
        )
        self.pace = Pace()
        self.begun = time.monotonic()
        self.bars: dict[str, TaskID] = {}
        self.sweep: TaskID | None = None

    def start(self, num_jobs: int) -> None:
        self.progress.start()
        self.sweep = self.progress.add_task("sweep", total=num_jobs, figures="jobs done")

    def job_started(self, job_id: str, label: str) -> None:
        self.pace.forget(job_id)
        if job_id not in self.bars:
            self.bars[job_id] = self.progress.add_task(f"{label}: starting", total=None, figures="")

    def job_figures(self, job_id: str, label: str, figures: Mapping[str, Any]) -> None:
        if "phase" not in figures or "units_done" not in figures or job_id not in self.bars:
            return
        phase, done, total = str(figures["phase"]), int(figures["units_done"]), int(figures["units_total"])
        left = self.pace.seconds_left(job_id, phase, done, total)
        self.progress.update(
            self.bars[job_id],
            description=f"{label}: {phase}",
            completed=done,
            total=total,
            figures=figures_text(figures, left),
        )

    def job_ended(self, job_id: str, label: str, outcome: str, *, ok: bool = True) -> None:
        bar = self.bars.pop(job_id, None)
        if bar is not None:
            self.progress.remove_task(bar)
        stamp = duration(time.monotonic() - self.begun)
        self.progress.console.print(Text(f"[{stamp:>7}] {label}: {outcome}", "" if ok else "red"))
        if self.sweep is not None:
            self.progress.advance(self.sweep)

    def say(self, text: str, *, ok: bool = True) -> None:
        stamp = duration(time.monotonic() - self.begun)
        self.progress.console.print(Text(f"[{stamp:>7}] {text}", "" if ok else "red"))

    def stop(self) -> None:
        self.progress.stop()
