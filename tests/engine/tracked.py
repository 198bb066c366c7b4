"""Finished and half-finished sweeps for trackers, and what trackers were given read back with their own readers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.prepare import Prepared
from engine.store import Store
from engine.trackers.feed import Feed
from tests.engine.finished import write_finished
from trainables.rows import TrainingRow

NUM_STEPS = 5
FIGURES = ("loss", "gradient_norm", "learning_rate", "epoch")  # that a tracker has as the training table has them


def training_rows(run_id: str, num_steps: int = NUM_STEPS) -> list[TrainingRow]:
    """Rows in which no two figures are equal."""
    return [
        TrainingRow(
            train_id=run_id,
            step=step,
            epoch=step / 3,
            loss=2.5 / step,
            gradient_norm=1.1 + step / 7,
            learning_rate=0.01 / (step + 1),
            num_tokens=100 + step,
            num_loss_tokens=40,
            seconds=0.5,
        )
        for step in range(1, num_steps + 1)
    ]


@dataclass
class Tracked:
    """A sweep whose work is done in the store, to be given to its trackers."""

    prepared: Prepared
    store: Store
    said: list[str] = field(default_factory=list)

    def feed(self) -> Feed:
        """The trackers of one invocation."""
        name = self.prepared.sweep.name
        return Feed(self.prepared.sweep.trackers, self.prepared.manifest, self.store, name, self.said.append)

    @property
    def folder(self) -> Path:
        return self.store.root / "sweeps" / self.prepared.sweep.name

    @property
    def run_ids(self) -> dict[str, str]:
        """Id of every training by its label."""
        return {entry.label: entry.run_id for entry in self.prepared.manifest.runs if entry.kind == "run"}


def finished(prepared: Prepared, *, failed: str | None = None) -> Tracked:
    """Everything is done but what ``failed`` names; nothing is given to any tracker yet."""
    tracked = Tracked(prepared, write_finished(prepared, failed=failed))
    for label, run_id in tracked.run_ids.items():
        if label != failed:
            tracked.store.publish_table("training", run_id, training_rows(run_id))
    return tracked


def event_reader(sweep: Path) -> dict[str, EventAccumulator]:
    """TensorBoard's own reader of every run of the sweep's folder, by the name under which TensorBoard shows it."""
    readers = {}
    for folder in sorted((sweep / "tensorboard").iterdir()):
        readers[folder.name] = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        readers[folder.name].Reload()
    return readers


def event_curve(reader: EventAccumulator, tag: str) -> dict[int, float]:
    """Value by step; a step that is there twice is an error."""
    events = reader.Scalars(tag) if tag in reader.Tags()["scalars"] else []
    curve = {event.step: event.value for event in events}
    assert len(curve) == len(events), "a step was logged twice"
    return curve


def mlflow_runs(database: Path, experiment: str) -> dict[str, Run]:
    """Every run of an experiment by its name; two of one name are an error."""
    client = MlflowClient(tracking_uri=f"sqlite:///{database}")
    known = client.get_experiment_by_name(experiment)
    found = client.search_runs([known.experiment_id]) if known is not None else []
    runs = {run.info.run_name: run for run in found}
    assert len(runs) == len(found), "a run is there twice"
    return runs


def mlflow_curve(database: Path, run: Run, figure: str) -> dict[int, float]:
    """Value by step; a step that is there twice is an error."""
    history = MlflowClient(tracking_uri=f"sqlite:///{database}").get_metric_history(run.info.run_id, figure)
    curve = {metric.step: metric.value for metric in history}
    assert len(curve) == len(history), "a step was logged twice"
    return curve


def wanted_curve(rows: list[TrainingRow], figure: str, convert: Callable[[Any], float] = float) -> dict[int, float]:
    """What the training table says."""
    return {row.step: convert(getattr(row, figure)) for row in rows}
