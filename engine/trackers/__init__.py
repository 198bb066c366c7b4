"""Where runs can be watched and compared: TensorBoard, W&B, MLflow. To add one, write its file and list it here.

A tracker is a copy for the eye. The store is the truth: every curve and every score that a tracker gets is in the
store's tables, no result is read back from a tracker, and no identity knows of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator

from engine.trackers.base import Place, TrackedRun, Tracker, TrackerConfig
from engine.trackers.mlflow import MlflowConfig
from engine.trackers.tensorboard import TensorboardConfig
from engine.trackers.wandb import WandbConfig
from trainables.config import Config
from trainables.errors import Fault

__all__ = [
    "MlflowConfig",
    "Place",
    "TensorboardConfig",
    "TrackedRun",
    "Tracker",
    "TrackerConfig",
    "TrackersConfig",
    "TrackersSection",
    "WandbConfig",
    "tracker_faults",
]

OFF = "none"


class TrackersConfig(Config):
    """Where runs can be watched and compared. TensorBoard is on without being named; ``none`` in place of the section
    switches everything off. Nothing here is part of any identity."""

    tensorboard: TensorboardConfig | Literal["none"] = TensorboardConfig()
    """Event files in the sweep's folder, for ``tensorboard --logdir``. ``none``: not written."""
    wandb: WandbConfig | Literal["none"] = "none"
    """A Weights & Biases project."""
    mlflow: MlflowConfig | Literal["none"] = "none"
    """An MLflow tracking server or a database of one's own."""

    def active(self) -> dict[str, TrackerConfig]:
        """Those that are on, by name."""
        named = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: one for name, one in named.items() if isinstance(one, TrackerConfig) and one.is_on()}


NO_TRACKERS = TrackersConfig(tensorboard="none")


def _all_off(value: Any) -> Any:
    """``trackers: none`` and ``trackers: {}``: nothing, TensorBoard included."""
    return NO_TRACKERS.model_dump() if value in (OFF, {}) else value


TrackersSection: TypeAlias = Annotated[TrackersConfig, BeforeValidator(_all_off)]
"""The section as it may stand in a sweep file."""


def tracker_faults(config: TrackersConfig, environment: Mapping[str, str]) -> list[Fault]:
    """Why a tracker that is on could not work: its package is missing, or a key in the environment. Imports nothing,
    reaches no network."""
    return [
        Fault(f"trackers.{name}.{field}".rstrip("."), message)
        for name, tracker in config.active().items()
        for field, message in tracker.faults(environment)
    ]
