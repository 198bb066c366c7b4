"""What a tracker is told, and what it has to be able to do."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

from analysis.manifest import Manifest, RunEntry, Scalar
from trainables.config import Config
from trainables.rows import TrainingRow

_NOT_IN_NAMES = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f]')
_MAX_NAME_BYTES = 200  # a folder's name has at most 255 on most file systems
LAST_STEP_OF = "train/loss"  # in every step's figures: what a tracker looks at to know how far a curve goes

ID_NAMES = {"run": "train_id", "base": "base_id", "edited": "edit_id"}
"""What the id of a row of this kind is called."""


@dataclass(frozen=True)
class TrackedRun:
    """One training of the sweep, one of its bases or of its edited models, as it appears in a tracker.

    ``entries`` are the rows of the sweep that share it: they differ in their evaluation, and ``config`` is what they
    have in common.
    """

    id: str  # the train_id, or the base's or the edit's id
    label: str
    kind: Literal["run", "base", "edited"]
    config: Mapping[str, Scalar]
    entries: tuple[RunEntry, ...]


@dataclass(frozen=True)
class Step:
    """Figures of one optimizer step, counted from 1. ``time_s``: when it ended, in seconds since 1970 (UTC)."""

    number: int
    time_s: float
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Place:
    """Where a tracker works: the sweep's folder in the store, what the sweep is called, and all of its runs."""

    folder: Path
    sweep: str
    runs: tuple[TrackedRun, ...]

    @cached_property
    def folder_names(self) -> dict[str, str]:
        """Folder name by run id: the run's label as far as a file system can have it, no two equal."""
        names: dict[str, str] = {}
        taken: set[str] = set()
        for run in self.runs:
            name = _NOT_IN_NAMES.sub("_", run.label).encode()[:_MAX_NAME_BYTES].decode(errors="ignore")
            name = name.strip(" .") or "_"
            if name.lower() in taken:
                name = f"{name} {run.id}"
            taken.add(name.lower())
            names[run.id] = name
        return names


class Tracker(Protocol):
    """One kind of tracker at work. All calls come from one thread; whatever is raised is reported, never passed on."""

    def begin(self, run: TrackedRun) -> int:
        """Make the run ready for steps, and return the last step that it already has there (0: none).

        Where an earlier invocation's copy cannot be gone on with, it is replaced: all steps are given again.
        """

    def log(self, run: TrackedRun, steps: Sequence[Step]) -> None:
        """Add steps, in order and without a gap after those that are there. The run has begun."""

    def finish(self, run: TrackedRun, metrics: Mapping[str, float], last_step: int) -> None:
        """The run is done: add its final metrics at ``last_step`` and close it."""

    def fail(self, run: TrackedRun, reason: str) -> None:
        """The run failed: mark it and close it. A later invocation may begin it again."""

    def close(self) -> None:
        """Let go of everything. Runs that have begun and not ended were interrupted."""


class TrackerConfig(Config):
    """The section of one tracker in a sweep file."""

    def is_on(self) -> bool:
        """Whether it is to be used at all; the environment may say no."""
        return True

    def faults(self, environment: Mapping[str, str]) -> Iterable[tuple[str, str]]:
        """(field or "", message) of what it lacks: a package, a key in the environment."""
        raise NotImplementedError

    def destination(self, place: Place) -> str:
        """Where its copy of the sweep is, without secrets. Imports nothing, like the two below."""
        raise NotImplementedError

    def still_has(self, place: Place, run: TrackedRun) -> bool:
        """False if what it had of the run is known to be gone, such as files that somebody removed."""
        del place, run
        return True

    def is_tidy(self, place: Place) -> bool:
        """False if it shows runs that the sweep no longer has, and can stop doing so."""
        del place
        return True

    def make(self, place: Place) -> Tracker:
        """The tracker at work. Imports its package."""
        raise NotImplementedError


def package_faults(modules: Sequence[str], what: str) -> Iterable[tuple[str, str]]:
    """A fault for the first of ``modules`` that is not installed; ``what`` brings it. None is imported."""
    for module in modules:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:  # no origin: a mere folder of that name where Python was started
            yield "", f"the package {module} is not installed; install it with: pip install '{what}'"
            return


def setting(given: str | None, variable: str, default: str) -> str:
    """What the file says, else the environment, else the default."""
    return given or os.environ.get(variable) or default


def tracked_runs(manifest: Manifest) -> dict[str, TrackedRun]:
    """The trainings and bases of a sweep by id, in its order."""
    grouped: dict[str, list[RunEntry]] = {}
    for entry in manifest.runs:
        assert entry.kind != "imported", "a sweep that is run has no imported rows"
        grouped.setdefault(entry.run_id, []).append(entry)
    runs = {}
    for run_id, entries in grouped.items():
        first, *others = entries
        config = {
            name: value
            for name, value in first.config.items()
            if all(name in other.config and other.config[name] == value for other in others)
        }
        assert first.kind != "imported", "see above"
        runs[run_id] = TrackedRun(run_id, first.label, first.kind, config, tuple(entries))
    return runs


def steps_of(rows: Sequence[TrainingRow], end_s: float) -> list[Step]:
    """Rows of one run as steps. The last of them ended at ``end_s``; each took the seconds that its row says."""
    steps: list[Step] = []
    for row in reversed(rows):
        figures = {
            LAST_STEP_OF: row.loss,
            "train/gradient_norm": row.gradient_norm,
            "train/learning_rate": row.learning_rate,
            "train/tokens_per_s": row.num_tokens / max(row.seconds, 1e-9),
            "train/epoch": row.epoch,
        }
        steps.append(Step(row.step, end_s, figures))
        end_s -= row.seconds
    return steps[::-1]
