"""What of a run belongs into a tracker, and which runs a tracker has already."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import threading
from collections.abc import Mapping
from numbers import Real
from typing import Any

from analysis.manifest import RunEntry, run_key, sweep_key
from analysis.results import Results
from analysis.tables import table_key
from engine.store import Store
from engine.trackers.base import TrackedRun
from trainables.rows import TrainingRow

LEDGER = "trackers.json"


def training_rows(store: Store, run_id: str) -> list[TrainingRow]:
    """The run's training table; no rows if there is none (yet)."""
    if not store.exists(table_key("training", run_id)):
        return []
    return [TrainingRow(**row) for row in store.read_table("training", run_id).to_pylist()]


def final_metrics(results: Results, run: TrackedRun) -> dict[str, float]:
    """Every number of the summary's row of this run: ``final/trait``; what is missing is left out.

    Numbers about another column, such as ``trait_se``, are in a group of their own: ``final_detail/trait_se``. Where
    several rows of the sweep share the training, each has its label in the name: ``final/<label>/trait``.
    """
    metrics: dict[str, float] = {}
    for entry in run.entries:
        alone = dataclasses.replace(results, manifest=results.manifest.model_copy(update={"runs": (entry,)}))
        row: Mapping[Any, Any] = alone.summary().iloc[0].to_dict()
        label = "" if len(run.entries) == 1 else f"{entry.label}/"
        for name, value in row.items():
            if isinstance(value, Real) and math.isfinite(value):
                is_detail = any(name.startswith(f"{other}_") for other in row)
                metrics[f"{'final_detail' if is_detail else 'final'}/{label}{name}"] = float(value)
    return metrics


def keys_of(entry: RunEntry) -> list[str]:
    """Keys of everything that the final metrics of a row of the sweep rest on."""
    trained = [run_key(entry.run_id)] if entry.kind == "run" else []
    losses = [table_key("losses", entry.plain_loss_id)] if entry.plain_loss_id is not None else []
    scores = [table_key("scores", judge_id) for judge_id in entry.judge_ids.values()]
    return [*trained, table_key("generations", entry.sample_id), *losses, *scores]


def is_evaluated(store: Store, run: TrackedRun) -> bool:
    """Whether the run is trained and has answered what it was asked; judgements may still be missing."""
    return all(
        store.exists(table_key("generations", entry.sample_id))
        and (entry.kind != "run" or store.exists(run_key(entry.run_id)))
        for entry in run.entries
    )


def is_complete(store: Store, run: TrackedRun) -> bool:
    """Whether everything is there that the run's final metrics rest on."""
    return all(store.exists(key) for entry in run.entries for key in keys_of(entry))


class Ledger:
    """Which runs a tracker has been given to the end, kept in the sweep's folder of the store.

    A run is there once: what was given is known by a digest of all that it is made of. The digest is made of ids and of
    what exists, so a sweep with nothing to do reads no table. Threads of several trackers may note at once.
    """

    def __init__(self, store: Store, sweep: str) -> None:
        self.store = store
        self.key = sweep_key(sweep, LEDGER)
        self._lock = threading.Lock()
        self._given: dict[str, Any] = store.read_json(self.key) if store.exists(self.key) else {}

    def digest(self, run: TrackedRun) -> str:
        """Changes when the run has something new to give: a score, another label, another evaluation."""
        there = [key for entry in run.entries for key in keys_of(entry) if self.store.exists(key)]
        entries = [entry.model_dump(mode="json") for entry in run.entries]
        text = json.dumps([run.label, run.kind, dict(run.config), entries, there], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def has(self, tracker: str, destination: str, run: TrackedRun) -> bool:
        """Whether the tracker was given the run as it is now."""
        given = self._given.get(tracker, {})
        return bool(given.get("destination") == destination and given["runs"].get(run.id) == self.digest(run))

    def note(self, tracker: str, destination: str, run: TrackedRun, digest: str) -> None:
        """The tracker was given the run when its digest was ``digest``."""
        with self._lock:
            given = self._given.get(tracker)
            if given is None or given["destination"] != destination:
                given = self._given[tracker] = {"destination": destination, "runs": {}}
            given["runs"][run.id] = digest
            self.store.publish_json(self.key, self._given)
