"""MLflow: an experiment per sweep and a run per training, on a server or in a database on disk.

Ray Tune's own ``MLflowLoggerCallback`` is not used. It makes a new run for every trial, so a resumed sweep would have
each run twice; it sends every figure in a request of its own; and its steps are reports, not optimizer steps.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from engine.trackers.base import (
    ID_NAMES,
    LAST_STEP_OF,
    Place,
    Step,
    TrackedRun,
    Tracker,
    TrackerConfig,
    package_faults,
    setting,
)
from engine.trackers.wandb import refuse_secrets

TOKEN, USER, PASSWORD, URI = (
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_URI",
)
DATABASE = "mlflow.db"
FAILURE = "failure"  # tag
_MAX_BATCH = 900  # MLflow takes 1000 metrics, 100 params and 100 tags at once
_MAX_PARAMS = 100
_MAX_VALUE_CHARACTERS = 5000
_ITEM = TypeVar("_ITEM")


class MlflowConfig(TrackerConfig):
    """An MLflow tracking server or database. Credentials come from the environment alone: MLFLOW_TRACKING_TOKEN, or
    MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""

    tracking_uri: str | None = Field(default=None, min_length=1)
    """``https://...`` for a server, ``sqlite:///path`` for a database on disk. null: MLFLOW_TRACKING_URI of the
    environment, or else ``mlflow.db`` in the store."""
    experiment: str | None = Field(default=None, min_length=1)
    """The experiment that the runs go to. null: the sweep's name."""
    open_server: bool = False
    """The server asks for no credentials. Without this, a server on another machine needs them in the environment."""

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, value: Any) -> Any:
        return refuse_secrets(value, f"{TOKEN}, or {USER} and {PASSWORD},")

    @field_validator("tracking_uri")
    @classmethod
    def _usable(cls, uri: str | None) -> str | None:
        if uri is not None and urlsplit(uri).password is not None:
            raise ValueError(f"has a password in it, and this file is kept with the results; set {URI} instead")
        if uri is not None and (urlsplit(uri).scheme in ("", "file")):
            raise ValueError(f"MLflow no longer keeps runs in a folder; say sqlite:///path/to/mlflow.db; got {uri!r}")
        return uri

    def faults(self, environment: Mapping[str, str]) -> Iterable[tuple[str, str]]:
        uri = self.tracking_uri or environment.get(URI) or "sqlite:"
        parts = urlsplit(uri)
        if parts.scheme in ("http", "https"):
            yield from package_faults(["mlflow"], "shiftgrad[mlflow]")
            here = parts.hostname in ("localhost", "127.0.0.1", "::1")
            known = environment.get(TOKEN) or (environment.get(USER) and environment.get(PASSWORD)) or parts.password
            if not known and not here and not self.open_server:
                yield (
                    "",
                    f"no {TOKEN} in the environment, nor {USER} and {PASSWORD}; set them, or say open_server: true "
                    "if the server asks for none",
                )
        else:
            yield from package_faults(["mlflow", "sqlalchemy", "alembic"], "shiftgrad[mlflow]")

    def uri(self, place: Place) -> str:
        return setting(self.tracking_uri, URI, f"sqlite:///{place.folder.parent.parent / DATABASE}")

    def destination(self, place: Place) -> str:
        uri = re.sub(r"//[^/@]*@", "//", self.uri(place))
        return f"{uri.replace(str(place.folder.parent.parent), '')} {self.experiment or place.sweep}"

    def still_has(self, place: Place, run: TrackedRun) -> bool:
        del run
        uri = self.uri(place)
        return not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).exists()

    def make(self, place: Place) -> Tracker:
        return MlflowTracker(self.uri(place), self.experiment or place.sweep, place.sweep)


class MlflowTracker:
    """Finds the runs of a sweep again by their tags, so that nothing is there twice.

    A parameter cannot be changed in MLflow. Where a setting that is not part of a run's identity has changed since
    (its evaluation, the name of a vector), the tag ``changed.<setting>`` has the new value.
    """

    def __init__(self, uri: str, experiment: str, sweep: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")  # 30 s; its default of 7 are four minutes
        from mlflow import entities
        from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic"):  # they tell of every table that they make
            logging.getLogger(name).setLevel(logging.WARNING)
        self.entities = entities
        self.client = MlflowClient(tracking_uri=uri)
        self.sweep = sweep
        self.run_ids: dict[str, str] = {}
        known = self.client.get_experiment_by_name(experiment)
        self.experiment = known.experiment_id if known is not None else self.client.create_experiment(experiment)

    def begin(self, run: TrackedRun) -> int:
        tags = {"sweep": self.sweep, "kind": run.kind, ID_NAMES[run.kind]: run.id}
        wanted = " and ".join(f"tags.{name} = '{value}'" for name, value in tags.items())
        found = self.client.search_runs([self.experiment], filter_string=wanted, max_results=1)
        if found:
            (there,) = found
            run_id = there.info.run_id
            self.client.update_run(run_id, status="RUNNING", name=run.label)
            if FAILURE in there.data.tags:
                self.client.delete_tag(run_id, FAILURE)
            self._params(run_id, run, there.data.params)
            history = self.client.get_metric_history(run_id, LAST_STEP_OF)
            last = max((metric.step for metric in history), default=0)
        else:
            run_id = self.client.create_run(self.experiment, tags=tags, run_name=run.label).info.run_id
            self._params(run_id, run, {})
            last = 0
        self.run_ids[run.id] = run_id
        return last

    def log(self, run: TrackedRun, steps: Sequence[Step]) -> None:
        metrics = [
            self.entities.Metric(name, value, round(step.time_s * 1000), step.number)
            for step in steps
            for name, value in step.figures.items()
        ]
        # Whole steps only: what is there up to a step is complete, whenever the sending stops.
        width = len(steps[0].figures)
        for part in _parts(metrics, _MAX_BATCH // width * width):
            self.client.log_batch(self.run_ids[run.id], metrics=part)

    def finish(self, run: TrackedRun, metrics: Mapping[str, float], last_step: int) -> None:
        run_id = self.run_ids[run.id]
        there = self.client.get_run(run_id).data.metrics
        now = round(time.time() * 1000)
        named = {_name(name): value for name, value in metrics.items()}
        new = [
            self.entities.Metric(name, value, now, last_step)
            for name, value in named.items()
            if there.get(name) != value
        ]
        for part in _parts(new, _MAX_BATCH):
            self.client.log_batch(run_id, metrics=part)
        self._end(run, "FINISHED")

    def fail(self, run: TrackedRun, reason: str) -> None:
        self.client.set_tag(self.run_ids[run.id], FAILURE, reason[:_MAX_VALUE_CHARACTERS])
        self._end(run, "FAILED")

    def close(self) -> None:
        while self.run_ids:
            self.client.set_terminated(self.run_ids.popitem()[1], status="KILLED")

    def _end(self, run: TrackedRun, status: str) -> None:
        self.client.set_terminated(self.run_ids.pop(run.id), status=status)

    def _params(self, run_id: str, run: TrackedRun, there: Mapping[str, str]) -> None:
        wanted = {_name(name): str(value)[:_MAX_VALUE_CHARACTERS] for name, value in run.config.items()}
        new = [self.entities.Param(name, value) for name, value in wanted.items() if name not in there]
        for part in _parts(new, _MAX_PARAMS):
            self.client.log_batch(run_id, params=part)
        for name, value in wanted.items():
            if name in there and there[name] != value:
                self.client.set_tag(run_id, f"changed.{name}", value)


def _name(text: str) -> str:
    """``text`` in the characters that MLflow allows in the name of a metric or parameter."""
    return re.sub(r"[^\w\-. :/]", "_", text)


def _parts(items: Sequence[_ITEM], size: int) -> Iterator[Sequence[_ITEM]]:
    return (items[start : start + size] for start in range(0, len(items), size))
