"""In place of Ray and trainings: what a sweep would have written is there at once.

Everything else of a command stays as it is: the file is read and checked, data is encoded and proved, the store, the
lease, the manifest, judging by rule, the tables, the report. Only the figures of the report are not drawn: that takes
more time than all the rest, and ``tests/analysis/test_figures.py`` draws them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import analysis.report
import engine.doctor
import engine.run
from engine.prepare import Prepared
from engine.ray_session import RaySession
from engine.store import Store
from engine.tasks import Job, JudgeTask
from tests.engine.finished import write_outputs


def _write_instead(
    prepared: Prepared, store: Store, jobs: Mapping[str, Job], unjudged: Mapping[str, JudgeTask], *_: Any
) -> None:
    del prepared
    write_outputs(store, jobs.values(), unjudged.values())


def _start_nothing(session: RaySession, threads: int) -> None:
    del session, threads


def _nothing_to_draw(*_: Any) -> None:
    return None


def no_training(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """From now on ``run`` starts no Ray and trains nothing. ``replace``: ``setattr``, or one that is undone."""
    replace(engine.run, "_work", _write_instead)
    replace(RaySession, "start", _start_nothing)
    replace(engine.doctor, "_ray", lambda: "a worker answered (torch 2)")
    for figure in ("outcomes", "training_curves"):
        replace(analysis.report, figure, _nothing_to_draw)
