"""Copying a sweep out of a store into another one, so that its tables can be read where there is no network."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from analysis.manifest import (
    Manifest,
    adapter_key,
    failures_key,
    log_key,
    manifest_key,
    pile_key,
    read_manifest,
    sweep_key,
    vector_key,
)
from analysis.remote import DIRECTORY_MANIFEST
from analysis.row_tasks import measurement_keys, tasks_of
from analysis.tables import table_key
from engine.store import Store
from trainables.errors import StoreError

AT_ONCE = 8
"""Copies under way at a time: an object store answers slowly, and many at once."""


def fetch(source: Store, sweep: str, target: Store, *, adapters: bool = True) -> int:
    """Copy what reading the sweep needs: tables, records, logs, vectors, its report and, unless told not to, adapters.

    Inputs, judges' replies and checkpoints stay where they are: the sweep is run there. The manifest is copied last, so
    that a copy that was stopped is not taken for a sweep. Returns how many files and directories were copied; what
    never changes and is there already is not copied again. Raises StoreError if there is no such sweep.
    """
    if source.location == target.location:
        raise StoreError(f"{source.location}: is the store that the sweep would be copied to; give another one")
    if not source.exists(manifest_key(sweep)):
        raise StoreError(f"{source.location}: there is no sweep {sweep!r}")
    manifest = read_manifest(source.location / manifest_key(sweep))
    runs = dict.fromkeys(entry.run_id for entry in manifest.runs)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        copied = list(pool.map(lambda key: _copy(source, target, key), dict.fromkeys(_files(manifest, sweep))))
        copied += pool.map(lambda run: _copy_log(source, target, log_key(run)), runs)
        directories = [sweep_key(sweep, "report"), *([adapter_key(run) for run in runs] if adapters else [])]
        copied += pool.map(lambda key: _copy_directory(source, target, key), directories)
    return sum(copied) + _copy(source, target, manifest_key(sweep))


def _files(manifest: Manifest, sweep: str) -> Iterator[str]:
    yield from (sweep_key(sweep, name) for name in ("sweep.yaml", "provenance.json"))
    yield failures_key(sweep)
    yield from (vector_key(vector) for vector in manifest.vectors.values())
    for entry in manifest.runs:
        yield from (task.key for task in tasks_of(entry))
        yield from (table_key(table, entry.run_id) for table in ("training", "signals"))
    for asked in manifest.asked:
        yield table_key("generations", asked.sample_id)
        yield from (table_key("scores", judge_id) for judge_id in asked.judge_ids.values())
    for pile in manifest.piles:
        yield table_key("generations", pile.sample_id)
        yield from (table_key("scores", judge_id) for judge_id in pile.judge_ids.values())
        yield from (pile_key(shard) for shard in pile.shard_ids)
    for measure in manifest.measurements:
        for task_id, keys in measurement_keys(measure).items():
            yield from (key for key in keys if key.startswith("tables/") or task_id == measure.merge_id)


def _copy(source: Store, target: Store, key: str) -> bool:
    if (key.startswith(("vectors/", "piles/")) and target.exists(key)) or not source.exists(key):
        return False
    target.publish(key, source.read(key))
    return True


def _copy_log(source: Store, target: Store, key: str) -> bool:
    text = source.read_log(key)
    if text:
        target.remove(key)  # in an object store it would be joined to what is there
        target.append_line(key, text)
    return bool(text)


def _copy_directory(source: Store, target: Store, key: str) -> bool:
    if not source.is_complete(key) or (key.startswith("runs/") and target.is_complete(key)):
        return False
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "copy"  # without the manifest, which publishing makes
        shutil.copytree(source.path(key), folder, ignore=shutil.ignore_patterns(DIRECTORY_MANIFEST))
        target.publish(key, folder)
    return True
