"""Weights & Biases: one run per training, grouped by sweep, online or in files for ``wandb sync``.

Ray Tune's own ``WandbLoggerCallback`` is not used. It hands the API key to an actor by its runtime environment, which
Ray writes into its log files; it starts two processes per trial; and its steps are reports, not optimizer steps.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from engine.trackers.base import (
    ID_NAMES,
    Place,
    Step,
    TrackedRun,
    Tracker,
    TrackerConfig,
    package_faults,
    setting,
)

KEY = "WANDB_API_KEY"
SERVER = "WANDB_BASE_URL"
MODES = ("online", "offline", "disabled")
PROJECT = "shiftgrad"
INIT_TIMEOUT_S = 45.0
FINISH_TIMEOUT_S = 60.0
INTERRUPTED = 255  # exit status of a run that was stopped, as W&B itself has it for Ctrl-C
_SECRET = re.compile(r"key|token|password|secret", re.IGNORECASE)


class WandbConfig(TrackerConfig):
    """A Weights & Biases project. The API key comes from the environment alone: WANDB_API_KEY."""

    project: str | None = Field(default=None, min_length=1)
    """The project. null: WANDB_PROJECT of the environment, or else shiftgrad."""
    entity: str | None = Field(default=None, min_length=1)
    """The user or team that it belongs to. null: WANDB_ENTITY of the environment, or else the owner of the key."""
    mode: Literal["online", "offline"] | None = None
    """``offline`` writes files into the sweep's folder, for ``wandb sync``. null: WANDB_MODE of the environment, or
    else ``online``."""

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, value: Any) -> Any:
        return refuse_secrets(value, KEY)

    def resolved_mode(self, environment: Mapping[str, str]) -> str:
        return self.mode or environment.get("WANDB_MODE") or "online"

    def is_on(self) -> bool:
        return self.resolved_mode(os.environ) != "disabled"

    def faults(self, environment: Mapping[str, str]) -> Iterable[tuple[str, str]]:
        yield from package_faults(["wandb"], "shiftgrad[wandb]")
        mode = self.resolved_mode(environment)
        if mode not in MODES:
            yield "mode", f"WANDB_MODE of the environment is {mode!r}; allowed: {', '.join(MODES)}"
        if mode == "online" and not environment.get(KEY):
            yield "", f"no {KEY} in the environment; set it, or say mode: offline"

    def destination(self, place: Place) -> str:
        mode = self.resolved_mode(os.environ)
        server = setting(None, SERVER, "the W&B cloud") if mode == "online" else "files"
        project = setting(self.project, "WANDB_PROJECT", PROJECT)
        return f"{server} {setting(self.entity, 'WANDB_ENTITY', '')}/{project} {place.sweep}"

    def still_has(self, place: Place, run: TrackedRun) -> bool:
        return self.resolved_mode(os.environ) == "online" or any(offline_folders(place, run))

    def make(self, place: Place) -> Tracker:
        return WandbTracker(self, place)


def refuse_secrets(value: Any, instead: str) -> Any:
    """A validator of plain data: a key that looks like a secret's is refused without showing what stands there."""
    for name in value if isinstance(value, dict) else ():
        if _SECRET.search(str(name)):
            raise ValueError(f"{name!r} has no place in a file that is kept with the results; set {instead} instead")
    return value


def offline_folders(place: Place, run: TrackedRun) -> Iterator[Path]:
    """What W&B has written of the run in its offline mode."""
    return (place.folder / "wandb").glob(f"offline-run-*-{wandb_id(place, run)}")


def wandb_id(place: Place, run: TrackedRun) -> str:
    """The run's id at W&B: the same in every invocation, another in every sweep."""
    return f"{place.sweep}-{run.id}"


class WandbTracker:
    """Any number of W&B runs at once, in this process. A W&B run's id is ``<sweep>-<train_id>``."""

    def __init__(self, config: WandbConfig, place: Place) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # it would write into the progress display
        import wandb

        self.wandb: Any = wandb
        self.config = config
        self.place = place
        self.mode = config.resolved_mode(os.environ)
        self.open: dict[str, Any] = {}
        self.has_failed = False

    def begin(self, run: TrackedRun) -> int:
        if self.mode == "offline":
            for old in list(offline_folders(self.place, run)):
                shutil.rmtree(old)  # nothing can be added to it, and the new one gets every step
        try:
            opened = self._init(run)
        except Exception:
            self.has_failed = True
            raise
        self.open[run.id] = opened
        return max(0, opened.starting_step - 1) if opened.resumed else 0

    def _init(self, run: TrackedRun) -> Any:
        own_server = {"base_url": os.environ[SERVER]} if os.environ.get(SERVER) else {}
        return self.wandb.init(
            project=setting(self.config.project, "WANDB_PROJECT", PROJECT),
            entity=self.config.entity,
            id=wandb_id(self.place, run),
            name=run.label,
            group=self.place.sweep,
            job_type=run.kind,
            config={**run.config, ID_NAMES[run.kind]: run.id},
            mode=self.mode,
            dir=str(self.place.folder),
            resume="allow",
            allow_val_change=True,
            reinit="create_new",
            settings=self.wandb.Settings(
                **own_server,  # else what the variable was when W&B was first used in this process
                silent=True,
                console="off",  # what the driver prints is about all runs
                disable_git=True,
                disable_code=True,
                x_disable_stats=True,  # they would be the driver's, not the trial's
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
                init_timeout=INIT_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
                finish_timeout_raises=True,
            ),
        )

    def log(self, run: TrackedRun, steps: Sequence[Step]) -> None:
        for step in steps:
            self.open[run.id].log({**step.figures, "_timestamp": step.time_s}, step=step.number)

    def finish(self, run: TrackedRun, metrics: Mapping[str, float], last_step: int) -> None:
        del last_step
        opened = self.open[run.id]
        earlier: dict[str, Any] = {"failure": None} if opened.resumed else {}
        opened.summary.update({**earlier, **metrics})
        self.open.pop(run.id).finish()

    def fail(self, run: TrackedRun, reason: str) -> None:
        self.open[run.id].summary.update({"failure": reason})
        self.open.pop(run.id).finish(exit_code=1)

    def close(self) -> None:
        while self.open:
            self.open.popitem()[1].finish(exit_code=INTERRUPTED)
        if self.has_failed and self.wandb.run is None:
            # W&B keeps the id of a run that it could not begin, and would refuse to begin it in this process again.
            # What runs in the same notebook by the user's own wandb.init would end too, so it is left alone then.
            self.wandb.teardown(exit_code=INTERRUPTED)
