"""``shiftgrad import``: things of ours made of other projects' files, on disk where a sweep file finds them.

In the folder ``out``: ``traits/<name>/trait.yaml``, ``vectors/<name>.safetensors``, ``data/<name>.jsonl``,
``<name>.yaml`` (a sweep), and for answers the store ``results`` with a sweep of imported rows, which ``analysis.load``
reads. Doing it again changes nothing; nothing else is overwritten.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from analysis.formats import (
    Hints,
    Imported,
    Made,
    MadeAnswers,
    MadeChat,
    MadeSweep,
    MadeTrait,
    MadeVector,
    open_file,
)
from analysis.manifest import Manifest, RunEntry, manifest_key, read_manifest, sweep_key
from analysis.rows import ScoreRow
from analysis.tables import to_parquet_bytes
from analysis.traits import FILE_NAME, Trait
from engine.atomic import write_new
from engine.config_faults import validate
from engine.inputs import canonical_jsonl
from engine.store import Store
from engine.sweep_models import Name
from engine.tasks import task_id
from trainables.config import Config
from trainables.errors import ConfigError, Fault

HEADING = "nothing was written"
RESULTS = "results"


class _Named(Config):
    name: Name


@dataclass(frozen=True)
class Written:
    """What came of one file: what it was taken for, and where the things made of it are."""

    path: Path
    imported: Imported
    places: tuple[Path, ...]


def import_files(
    paths: Sequence[Path], out: Path, hints: Hints | None = None, name: str | None = None
) -> list[Written]:
    """Read foreign files and write what they come to into ``out``. ``name``: of the sweep that answers become rows of;
    without it that of the first file.

    Raises ConfigError with the faults of all files before anything is written.
    """
    read: list[tuple[Path, Imported]] = []
    faults: list[Fault] = []
    for path in paths:
        try:
            read.append((path, open_file(path, hints)))
        except ConfigError as error:
            faults += error.faults
    sweep = name or (paths[0].stem if paths else "")
    answers = [made for _, imported in read for made in imported.made if isinstance(made, MadeAnswers)]
    if answers or name is not None:
        faults += validate(_Named, {"name": sweep}, lambda _: "--name")[1]
    files: dict[Path, bytes] = {}
    for path, imported in read:
        for made in imported.made:
            if isinstance(made, MadeAnswers):
                continue
            place = out / _place(made)
            content = _content(made)
            if files.setdefault(place, content) != content:
                faults.append(Fault(str(path), f"two files would become {place}; rename one"))
    faults += [fault for place, content in files.items() if (fault := _obstacle(place, content)) is not None]
    if answers and not faults:
        faults += [Fault("--out", message) for message in Store.faults(out / RESULTS)]
    rows = _rows(answers, out, sweep, faults)
    if faults:
        raise ConfigError(faults, HEADING)
    for place, content in files.items():
        _write(place, content)
    if answers:
        _publish(answers, rows, Store.open(out / RESULTS, create=True), sweep)
    folder = out / RESULTS / sweep_key(sweep, "")
    return [
        Written(
            path,
            imported,
            tuple(
                dict.fromkeys(folder if isinstance(made, MadeAnswers) else out / _place(made) for made in imported.made)
            ),
        )
        for path, imported in read
    ]


def trait_yaml(trait: Trait) -> str:
    """A trait as the text of a ``trait.yaml``."""
    return yaml.safe_dump(
        trait.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True, width=110
    )


def _place(made: Made) -> Path:
    """Where it goes, in the folder."""
    match made:
        case MadeTrait():
            return Path("traits") / made.name / FILE_NAME
        case MadeVector():
            return Path("vectors") / f"{made.name.replace(os.sep, '-')}.safetensors"
        case MadeChat():
            return Path("data") / f"{made.name.replace(os.sep, '-')}.jsonl"
        case MadeSweep():
            return Path(f"{made.name}.yaml")
        case MadeAnswers():
            raise AssertionError("answers go to a store")


def _content(made: Made) -> bytes:
    match made:
        case MadeTrait():
            return trait_yaml(made.trait).encode()
        case MadeVector():
            return made.vector.to_bytes()
        case MadeChat():
            return canonical_jsonl(made.rows)
        case MadeSweep():
            return yaml.safe_dump(made.raw, sort_keys=False, allow_unicode=True, width=110).encode()
        case MadeAnswers():
            raise AssertionError("answers go to a store")


def _obstacle(place: Path, content: bytes) -> Fault | None:
    if place.is_file() and place.read_bytes() == content:
        return None
    if os.path.lexists(place):
        return Fault(
            str(place), "is there already with another content and is not overwritten; remove it, or give --out"
        )
    return None


def _write(place: Path, content: bytes) -> None:
    if place.exists():
        return
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_new(place, content)
    except OSError as error:
        message = f"cannot be written: {error.strerror or error}"
        raise ConfigError([Fault(str(place), message)], "not everything was written") from error


def _rows(answers: Sequence[MadeAnswers], out: Path, sweep: str, faults: list[Fault]) -> tuple[RunEntry, ...]:
    """The rows of the sweep: those that are there from earlier imports, and one per set of answers."""
    manifest = out / RESULTS / manifest_key(sweep)
    known = read_manifest(manifest).runs if answers and manifest.is_file() else ()
    if any(entry.kind != "imported" for entry in known):
        faults.append(
            Fault("--name", f"{sweep!r} in {out / RESULTS} is a sweep that was run, not imported; give another")
        )
    rows = {entry.label: entry for entry in known}
    for made in answers:
        entry = _entry(made)
        if rows.setdefault(made.name, entry) != entry:
            message = f"the sweep {sweep!r} has other answers under this name; give --name, or rename the file"
            faults.append(Fault(made.name, message))
    return tuple(rows.values())


def _entry(made: MadeAnswers) -> RunEntry:
    content = hashlib.sha256(to_parquet_bytes("generations", made.answers)).hexdigest()
    sample_id = task_id({"kind": "import/answers", "content": content})
    judges: dict[str, str] = {}
    for metric, scores in made.scores.items():
        rows = [[score.question_id, score.sample_index, score.value, score.status, score.reply] for score in scores]
        digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
        judges[metric] = task_id({"kind": "import/scores", "sample": sample_id, "metric": metric, "content": digest})
    return RunEntry(
        label=made.name,
        kind="imported",
        run_id=task_id({"kind": "import", "answers": sample_id}),
        sample_id=sample_id,
        judge_ids=judges,
        plain_loss_id=None,
        config={"imported": made.name},
        scales=dict(made.scales),
    )


def _publish(answers: Sequence[MadeAnswers], rows: tuple[RunEntry, ...], store: Store, sweep: str) -> None:
    """Tables first, the manifest that names them last."""
    entries = {entry.label: entry for entry in rows}
    for made in answers:
        entry = entries[made.name]
        store.publish_table(
            "generations", entry.sample_id, [replace(answer, sample_id=entry.sample_id) for answer in made.answers]
        )
        for metric, scores in made.scores.items():
            judge_id = entry.judge_ids[metric]
            table = [
                ScoreRow(
                    judge_id=judge_id,
                    sample_id=entry.sample_id,
                    question_id=score.question_id,
                    sample_index=score.sample_index,
                    value=score.value,
                    status=score.status,
                    judge=score.judge,
                    reply=score.reply,
                )
                for score in scores
            ]
            store.publish_table("scores", judge_id, table)
    manifest: dict[str, Any] = Manifest(name=sweep, runs=rows, vectors={}).model_dump(mode="json")
    store.publish_json(manifest_key(sweep), manifest)
