"""What reading another project's file is: who recognises it, what the user has to say about it, and what comes out.

A format is one class in one file. ``recognises`` looks at a file, ``read`` makes things of ours of it and says in
``convention`` which conventions it found: whoever imports sees them and can object.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import yaml

from analysis.traits import Trait
from analysis.vectors.vector import Vector
from trainables.errors import ConfigError, Fault
from trainables.rows import GenerationRow
from trainables.shapes import FinalRow

HEADING = "nothing was read"
MAX_FAULTS = 10

Rows: TypeAlias = Literal["embedding", "blocks"]
"""``embedding``: row 0 is the embedding output and row l layer l; ``blocks``: row i is the output of block i."""


@dataclass(frozen=True)
class Hints:
    """What a user says about a file that it does not say itself. None: nothing is said.

    Every format lists which of them it asks about; one that has no say is a fault, not ignored.
    """

    format: str | None = None  # name of a Format, where a file could be several
    rows: Rows | None = None
    num_layers: int | None = None
    final_row: FinalRow | None = None
    questions: Path | None = None  # JSONL file with a question per line
    trait: str | None = None  # of the evaluation
    plain_answers: str | None = None  # of the evaluation
    min_probability_mass: float | None = None  # of the 0-100 rule

    @staticmethod
    def flag(name: str) -> str:
        """How the command line calls a hint."""
        return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class MadeTrait:
    name: str
    trait: Trait


@dataclass(frozen=True)
class MadeVector:
    name: str
    vector: Vector


@dataclass(frozen=True)
class MadeChat:
    """Conversations to train on or to make vectors of."""

    name: str
    rows: tuple[tuple[dict[str, str], ...], ...]


@dataclass(frozen=True)
class MadeSweep:
    """A sweep file as plain data; ``files`` are those that it names and that have to lie beside it."""

    name: str
    raw: dict[str, Any]


@dataclass(frozen=True)
class ImportedScore:
    """A score of another project's judge: its value, or a status that says why there is none."""

    question_id: str
    sample_index: int
    value: float | None
    status: str
    judge: str
    reply: str | None = None


@dataclass(frozen=True)
class MadeAnswers:
    """Answers and their scores by metric. ``answers`` have no sample id yet; a scale is that of its metric."""

    name: str
    answers: tuple[GenerationRow, ...]
    scores: Mapping[str, tuple[ImportedScore, ...]]
    scales: Mapping[str, tuple[float, float]]


Made: TypeAlias = MadeTrait | MadeVector | MadeChat | MadeSweep | MadeAnswers


@dataclass(frozen=True)
class Imported:
    """What a file came to. ``convention``: what was found out about it, a line each."""

    format: str
    made: tuple[Made, ...]
    convention: tuple[str, ...] = ()


class Format:
    """One kind of file. ``hints`` names the fields of Hints that it asks about."""

    name: ClassVar[str]
    what: ClassVar[str]
    hints: ClassVar[frozenset[str]] = frozenset()

    def recognises(self, file: Foreign, hints: Hints) -> bool:
        """Whether this is such a file, by its content. Raises ConfigError for one that cannot be read at all."""
        raise NotImplementedError

    def read(self, file: Foreign, hints: Hints) -> Imported:
        """What the file comes to. Raises ConfigError with every fault of it."""
        raise NotImplementedError


class Foreign:
    """A file of another project. Its content is read when it is asked for, once, whatever formats look at it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.stem
        self.suffix = path.suffix.lower()

    def fault(self, message: str, where: str = "") -> Fault:
        """A fault of this file; ``where``: a line or a key inside of it."""
        return Fault(f"{self.path}:{where}" if where.isdecimal() else f"{self.path}{where and ': '}{where}", message)

    def refuse(self, message: str) -> ConfigError:
        return ConfigError([self.fault(message)], HEADING)

    @cached_property
    def bytes(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise self.refuse(f"cannot be read: {error.strerror or error}") from error

    @cached_property
    def text(self) -> str:
        try:
            return self.bytes.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise self.refuse(f"not UTF-8 text: {error.reason} at byte {error.start}") from error

    @cached_property
    def json(self) -> Any:
        """The content of a .json file."""
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise self.refuse(f"not JSON: {error}") from error

    @cached_property
    def yaml(self) -> Any:
        """The content of a .yaml file."""
        try:
            return yaml.safe_load(self.text)
        except yaml.YAMLError as error:
            raise self.refuse(f"not YAML: {' '.join(str(error).split())}") from error

    @cached_property
    def first_line(self) -> Any:
        """The first row of a .jsonl file; None if there is none or it is not JSON."""
        line = next((line for line in self.text.split("\n") if line.strip()), "")
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            return None

    @cached_property
    def lines(self) -> list[tuple[int, Any]]:
        """(line number, row) of a .jsonl file. Raises ConfigError with every line that is not JSON."""
        rows, faults = [], []
        for number, line in enumerate(self.text.split("\n"), start=1):
            if line.strip():
                try:
                    rows.append((number, json.loads(line)))
                except (ValueError, RecursionError) as error:
                    faults.append(self.fault(f"not JSON: {error}", str(number)))
        raise_faults(faults)
        return rows

    @cached_property
    def header(self) -> list[str]:
        """The column names of a .csv file."""
        return next(csv.reader(io.StringIO(self.text)), [])

    @cached_property
    def records(self) -> list[tuple[int, dict[str, str]]]:
        """(line on which it ends, row) of a .csv file. Raises ConfigError for rows with other numbers of fields."""
        reader = csv.reader(io.StringIO(self.text))
        rows, faults = [], []
        try:
            names = next(reader, [])
            for row in reader:
                if len(row) != len(names):
                    message = f"{len(row)} fields where the header has {len(names)}; was the file cut off?"
                    faults.append(self.fault(message, str(reader.line_num)))
                else:
                    rows.append((reader.line_num, dict(zip(names, row, strict=True))))
        except csv.Error as error:
            faults.append(self.fault(f"not CSV: {error}", str(reader.line_num)))
        raise_faults(faults)
        return rows

    @cached_property
    def tensors(self) -> Any:
        """The content of a .pt file: tensors and plain data, nothing else."""
        from analysis.formats.pickles import load_tensors

        return load_tensors(self)


def raise_faults(faults: Sequence[Fault]) -> None:
    """Raise ConfigError with them if there are any; of very many the first ones and their number."""
    if len(faults) > MAX_FAULTS:
        more = len(faults) - MAX_FAULTS
        key = faults[0].key.partition(":")[0]
        faults = [*faults[:MAX_FAULTS], Fault(key, f"and {more} more fault{'s' if more != 1 else ''}")]
    if faults:
        raise ConfigError(faults, HEADING)


def unused_hints(form: Format, hints: Hints) -> Iterable[str]:
    """Hints that were given and that this format has no use for."""
    for field in fields(Hints):
        if field.name not in ("format", *form.hints) and getattr(hints, field.name) is not None:
            yield field.name


def keys_of(value: object, shown: int = 12) -> str:
    """What a file holds, in a few words, for a message."""
    if isinstance(value, Mapping):
        names = [str(name) for name in value]
        return "keys " + ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
    return f"a {type(value).__name__}"
