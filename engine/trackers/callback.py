"""The Tune callback that trackers live on.

Tune's three concrete logger callbacks (TensorBoard's, W&B's, MLflow's) know a trial and its reports: they write into
the trial's folder, which is thrown away, and count reports, one of which may tell of many optimizer steps. Here a
trial's report carries the steps that were done since the last one, and what a run is called comes from the sweep.
"""

from __future__ import annotations

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.logger import LoggerCallback

from engine.pack_work import told
from engine.scheduler import StaysInDriver, why_failed
from engine.trackers.feed import Feed
from trainables.rows import TrainingRow


class TrackerCallback(StaysInDriver, LoggerCallback):
    """Feeds the trackers of a sweep with what its trials report."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed

    def log_trial_result(self, iteration: int, trial: Trial, result: dict[str, Any]) -> None:
        del iteration, trial
        if result.get("rows"):
            self.feed.steps([TrainingRow(**row) for row in result["rows"]])
        member = told(result)
        if member is not None and member[1] is not None:
            self.feed.failed(member[0], member[1])

    def log_trial_end(self, trial: Trial, failed: bool = False) -> None:
        reason, pack = why_failed(trial, failed), trial.config.get("pack", ())
        if len(pack) > 1 or (pack and reason is None):
            return  # a pack only trains: each of its runs ends in a trial of its own, unless one alone has failed
        if reason is None:
            self.feed.done(trial.config["job"])
        else:
            self.feed.failed(trial.config["job"], reason)
