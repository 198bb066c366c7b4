"""Finding and checking what a sweep file names, before anything starts: files, traits, chat data.

Names are looked up the same way everywhere: beside the sweep file first, then from the current directory, then in the
project itself, so that a sweep file works wherever it lies.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from analysis.chat_rows import Row, check_messages, kind_of
from trainables.chat_data import HubDataset
from trainables.errors import Fault

PROJECT_ROOT = Path(__file__).resolve().parent.parent
TRAIT_FILE = "trait.yaml"
MAX_ROW_FAULTS = 10


def file_places(text: str, sweep_dir: Path) -> list[Path]:
    """Where ``find_file`` looks, in order, each place once."""
    path = Path(text).expanduser()
    if path.is_absolute():
        return [path]
    roots = (sweep_dir.absolute(), Path.cwd(), PROJECT_ROOT)
    return list(dict.fromkeys(root / path for root in roots))


def find_file(text: str, sweep_dir: Path) -> Path | None:
    """The file that ``text`` names: absolute; beside the sweep file; from the current directory; in the project."""
    return next((place for place in file_places(text, sweep_dir) if text and place.is_file()), None)


def trait_places(name: str, sweep_dir: Path) -> list[Path]:
    """Where ``find_trait`` looks, in order: folders with a trait.yaml, or for a path also the file itself."""
    if _is_path(name):
        return file_places(name, sweep_dir)
    sweep_dir = sweep_dir.absolute()
    places = [
        sweep_dir / "traits" / name,
        sweep_dir.parent / "traits" / name,
        sweep_dir / "configs" / "traits" / name,
        Path.cwd() / "configs" / "traits" / name,
        PROJECT_ROOT / "configs" / "traits" / name,
    ]
    return list(dict.fromkeys(places))


def find_trait(name: str, sweep_dir: Path) -> Path | None:
    """The trait.yaml (or, by its path, the file of another name) of the trait ``name``, a name or a path."""
    for place in trait_places(name, sweep_dir) if name else []:
        if (place / TRAIT_FILE).is_file():
            return place / TRAIT_FILE
        if _is_path(name) and place.is_file():
            return place
    return None


def bank_places(name: str, sweep_dir: Path) -> list[Path]:
    """Where ``find_bank`` looks, in order: text files with a prompt per line."""
    if "/" in name or name.startswith(("~", ".")) or name.endswith(".txt"):
        return file_places(name, sweep_dir)
    sweep_dir = sweep_dir.absolute()
    roots = (sweep_dir, sweep_dir.parent, sweep_dir / "configs", Path.cwd() / "configs", PROJECT_ROOT / "configs")
    return list(dict.fromkeys(root / "prompts" / f"{name}.txt" for root in roots))


def find_bank(name: str, sweep_dir: Path) -> Path | None:
    """The file of the bank of prompts ``name``, a name or a path."""
    return next((place for place in bank_places(name, sweep_dir) if name and place.is_file()), None)


def _is_path(name: str) -> bool:
    return "/" in name or name.startswith(("~", ".")) or name.endswith((".yaml", ".yml", ".json"))


def places_looked(text: str, sweep_dir: Path, *, trait: bool = False) -> str:
    """Where ``find_file`` (``find_trait``) looked for ``text``, for the message that it is not there."""
    places = file_places(text, sweep_dir)
    if trait:
        found = trait_places(text, sweep_dir)
        places = [place if place.suffix in (".yaml", ".yml", ".json") else place / TRAIT_FILE for place in found]
    return ", ".join(str(place) for place in places)


def read_chat_rows(path: Path) -> tuple[list[Row], list[Fault]]:
    """The conversations of a JSONL file, ``{"messages": [{"role": ..., "content": ...}, ...]}`` per line.

    Blank lines and other keys of a row or message are ignored. A row is an optional system message, then user and
    assistant in turn, beginning with user and ending with assistant. Rows with a fault are left out; their faults have
    the key ``file:line`` (from 1), at most ten and then the count of the rest. An empty file is a fault.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        return [], [Fault(str(path), f"cannot be read: {error.strerror or error}")]
    rows: list[Row] = []
    faults: list[Fault] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row, reason = _parse_line(line)
        if reason is not None:
            faults.append(Fault(f"{path}:{number}", reason))
        else:
            rows.append(row)
    if not rows and not faults:
        faults = [Fault(str(path), "the file is empty; it needs at least one row")]
    return rows, _first_faults(faults, str(path))


def read_hub_rows(dataset: HubDataset) -> tuple[list[Row], bytes, list[Fault]]:
    """The conversations of a dataset that ``datasets.load_dataset`` opens, as canonical JSONL bytes too.

    The same rules as for ``read_chat_rows``. The bytes depend on the rows alone (not on the file format, the order of
    keys or other columns), so that their hash is the identity of the data.
    """
    import datasets  # slow to import, and most sweeps have no use for it

    key = f"{dataset.hub}:{dataset.split}"
    try:
        table = datasets.load_dataset(dataset.hub, dataset.name, split=dataset.split, revision=dataset.revision)
        columns = list(table.column_names)
        if dataset.messages not in columns:
            return [], b"", [Fault(key, f"no column {dataset.messages!r}; the columns are {', '.join(columns)}")]
        conversations: Sequence[Any] = table[dataset.messages]
        rows, faults = _check_conversations(conversations, key)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return [], b"", [Fault(key, f"the dataset cannot be loaded: {reason}")]
    return rows, canonical_jsonl(rows), faults


def canonical_jsonl(rows: Iterable[Row]) -> bytes:
    """One way to write the rows: their content hash does not depend on how they were stored before."""
    lines = (
        json.dumps({"messages": list(row)}, ensure_ascii=False, sort_keys=True, separators=(",", ":")) for row in rows
    )
    return "".join(f"{line}\n" for line in lines).encode()


def _check_conversations(conversations: Sequence[Any], key: str) -> tuple[list[Row], list[Fault]]:
    rows: list[Row] = []
    faults: list[Fault] = []
    for number, messages in enumerate(conversations):
        row, reason = check_messages(messages)
        if reason is not None:
            faults.append(Fault(f"{key}[{number}]", reason))
        else:
            rows.append(row)
    if not rows and not faults:
        faults = [Fault(key, "the dataset is empty; it needs at least one row")]
    return rows, _first_faults(faults, key)


def _parse_line(line: bytes) -> tuple[Row, str | None]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return (), f"not UTF-8 text: {error.reason} at byte {error.start} of the line"
    except json.JSONDecodeError as error:
        return (), f"not JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # numbers and nestings beyond what Python reads
        return (), f"not JSON: {error}"
    if not isinstance(value, dict):
        return (), f'a row is an object {{"messages": [...]}}; got {kind_of(value)}'
    if "messages" not in value:
        return (), f"no messages; the row has {', '.join(map(repr, value)) or 'no keys'}"
    return check_messages(value["messages"])


def _first_faults(faults: list[Fault], key: str) -> list[Fault]:
    rest = len(faults) - MAX_ROW_FAULTS
    if rest <= 0:
        return faults
    return [*faults[:MAX_ROW_FAULTS], Fault(key, f"and {rest} more faulty row{'s' if rest != 1 else ''}")]
