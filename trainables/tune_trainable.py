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
    """Called by the work with figures for whoever watches; the trial decides which of them are sent.

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

    def run(self, job_id: str, report: Report) -> None:
        """Do the job and write its results. A job that is done already returns at once."""


def tune_trainable(config: Mapping[str, Any], work: Work) -> None:
    """One trial: do the job that ``config["job"]`` names.

    An error of ours (a diverged training, data that cannot be used) would come again at every attempt: it is
    reported as ``status: failed`` and the trial ends. Anything else is raised, and Tune may try again in a new process.
    """
    job_id = str(config["job"])
    torch.set_num_threads(work.threads)
    sent = 0.0
    unsent: list[dict[str, Any]] = []

    def report(*, last: bool = False, rows: Sequence[TrainingRow] = (), **figures: float | str | int) -> None:
        nonlocal sent
        unsent.extend(dataclasses.asdict(row) for row in rows)
        now = time.monotonic()
        if last or now - sent >= REPORT_INTERVAL_S:
            sent = now
            send("running", figures)

    def send(status: str, figures: Mapping[str, float | str | int]) -> None:
        tune.report({"job": job_id, "status": status, "rows": list(unsent), **figures})
        unsent.clear()

    try:
        work.run(job_id, report)
    except ShiftgradError as error:
        message = "".join(traceback.format_exception_only(error)).strip()
        message = message.removeprefix(f"{type(error).__module__}.")
        send("failed", {"reason": message})
    else:
        send("done", {})
