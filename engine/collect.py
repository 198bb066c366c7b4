"""Finding what a store no longer needs: outputs that no sweep names, checkpoints of finished runs, left-overs of kills.

Nothing is removed by looking. A store is shared by its sweeps, so what counts is whether ANY manifest names a task;
while a sweep is being run nothing can be collected, because its manifest may be about to change.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from analysis.manifest import manifest_key, read_manifest, run_key
from analysis.remote import Remote
from engine.atomic import REPLACED, is_complete
from engine.lease import current_holder
from engine.location import TEMPORARY
from engine.store import Store
from trainables.errors import StoreError

LEFT_OVER_AFTER_S = 3600.0  # a temporary file of a living process is seconds old


@dataclass(frozen=True)
class Garbage:
    """Something that can go."""

    key: str
    reason: str
    num_bytes: int


def find_garbage(store: Store) -> list[Garbage]:
    """What can be removed, in order of key. Raises StoreError if a sweep is being run."""
    named = {name: set[str]() for name in ("runs", "vectors", "tables", "piles")}
    for sweep in store.names("sweeps"):
        holder = current_holder(store, sweep)
        if holder is not None:
            raise StoreError(f"sweep {sweep!r} is being run by {holder.describe()}; collect when nothing runs")
        if not store.exists(manifest_key(sweep)):
            continue
        manifest = read_manifest(store.location / manifest_key(sweep))
        named["vectors"] |= set(manifest.vectors.values())
        for asked in manifest.asked:
            named["tables"] |= {asked.sample_id, *asked.judge_ids.values()}
        for entry in manifest.runs:
            named["runs"].add(entry.run_id)
            named["tables"] |= {entry.run_id, entry.sample_id, *entry.judge_ids.values()}
            if entry.plain_loss_id is not None:
                named["tables"].add(entry.plain_loss_id)
        for pile in manifest.piles:
            named["piles"] |= set(pile.shard_ids)
            named["tables"] |= {pile.sample_id, *pile.judge_ids.values()}
        for measure in manifest.measurements:
            named["tables"] |= {*measure.shard_ids, *([measure.merge_id] if measure.merge_id else [])}
    found = []
    for name in store.names("measurements"):
        if name.removesuffix(".safetensors") not in named["tables"]:
            found.append(_garbage(store, f"measurements/{name}", "no sweep names it"))
    for name in store.names("piles"):
        if name.removesuffix(".safetensors") not in named["piles"]:
            found.append(_garbage(store, f"piles/{name}", "no sweep names it"))
    for name in store.names("vectors"):
        if name.removesuffix(".safetensors").removesuffix(".log") not in named["vectors"]:
            found.append(_garbage(store, f"vectors/{name}", "no sweep names it"))
    for run in store.names("runs"):
        if run not in named["runs"]:
            found.append(_garbage(store, f"runs/{run}", "no sweep names it"))
        elif store.exists(run_key(run)) and store.names(f"runs/{run}/checkpoint"):
            found.append(_garbage(store, f"runs/{run}/checkpoint", "the run is done"))
    for table in store.names("tables"):
        for name in store.names(f"tables/{table}"):
            if name.removesuffix(".parquet") not in named["tables"]:
                found.append(_garbage(store, f"tables/{table}/{name}", "no sweep names it"))
    return sorted(found, key=lambda garbage: garbage.key)


def find_left_overs(store: Store) -> list[Path]:
    """What processes that were killed left behind: temporary files, and old directories whose new ones are in place.

    Only what is older than an hour counts. In an object store there are no temporary files, and what a kill leaves of a
    directory goes when that directory is removed.
    """
    if isinstance(store.location, Remote):
        return []
    folder = store.root / TEMPORARY
    temporary = list(folder.iterdir()) if folder.is_dir() else []
    asides = [path for path in store.root.glob(f"*/*/*{REPLACED}") if is_complete(path.with_suffix(""))]
    now = time.time()
    return sorted(path for path in temporary + asides if now - path.lstat().st_mtime > LEFT_OVER_AFTER_S)


def _garbage(store: Store, key: str, reason: str) -> Garbage:
    return Garbage(key, reason, store.num_bytes(key))
