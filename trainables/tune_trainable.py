"""The Ray Tune trainable: what one trial is. The only file of trainables/ that imports ray.

A trial does one job (trains its pack, samples from it, measures) and reports how far it is. What the job is and where
its results go is the work that engine/ hands in; Tune places the trial, and starts it again when its process dies.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from ray import tune

from trainables.errors import ShiftgradError
from trainables.rows import TrainingRow

REPORT_INTERVAL_S = 0.5


class Report(Protocol):
    """Called by the work with figures for whoever watches; the trial decides which of them are sent. A figure ``job``
    says which of the jobs of a pack they are about.

    ``rows`` are never lost: those that were not sent go with the next figures that are. No figure may be called
    ``done``: Tune ends a trial whose result has that key with a true value.
    """

    def __call__(
        self, *, last: bool = False, rows: Sequence[TrainingRow] = (), **figures: float | str | int
    ) -> None: ...


class Work(Protocol):
    """What engine/ hands to every trial; it must pickle."""

    @property
    def threads(self) -> int:
        """CPU threads of a trial."""

    def run(self, job_id: str, report: Report, note: str = "") -> None:
        """Do the job and write its results. A job that is done already returns at once. ``note``: why a run is not
        trained in the pack that was meant."""

    def train_pack(self, job_ids: Sequence[str], note: str, report: Report) -> Mapping[str, float | str | int]:
        """Train the runs of several jobs in one process; what is returned goes with the last report."""


def tune_trainable(config: Mapping[str, Any], work: Work) -> None:
    """One trial: do the job that ``config["job"]`` names, or train the runs of ``config["pack"]``.

    An error of ours (a diverged training, data that cannot be used) would come again at every attempt: it is
    reported as ``status: failed`` and the trial ends. Anything else is raised, and Tune may try again in a new process.
    """
    job_id, pack, note = str(config["job"]), config.get("pack"), str(config.get("note", ""))
    torch.set_num_threads(work.threads)
    sent: dict[object, float] = {}  # by job: those of a pack report side by side
    unsent: list[dict[str, Any]] = []

    def report(*, last: bool = False, rows: Sequence[TrainingRow] = (), **figures: float | str | int) -> None:
        unsent.extend(dataclasses.asdict(row) for row in rows)
        now = time.monotonic()
        about = figures.get("job", job_id)
        if last or now - sent.get(about, 0.0) >= REPORT_INTERVAL_S:
            sent[about] = now
            send("running", figures)

    def send(status: str, figures: Mapping[str, float | str | int]) -> None:
        tune.report({"job": job_id, "status": status, "rows": list(unsent), **figures})
        unsent.clear()

    last_figures: Mapping[str, float | str | int] = {}
    try:
        if pack is None:
            work.run(job_id, report, note)
        else:
            last_figures = work.train_pack([str(one) for one in pack], note, report)
    except ShiftgradError as error:
        message = "".join(traceback.format_exception_only(error)).strip()
        message = message.removeprefix(f"{type(error).__module__}.")
        send("failed", {"reason": message})
    else:
        send("done", last_figures)
