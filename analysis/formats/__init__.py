"""Other projects' files. To add a format, write its file and list its class in ``FORMATS``.

``open_file`` makes things of ours of a file, and says what it found out about it. A sweep that names such a file where
it takes a trait, a vector or chat data uses ``any_trait``, ``one_vector`` and ``foreign_chat``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from analysis.chat_rows import Row
from analysis.formats import persona_vector, repeng_gguf
from analysis.formats.axis_activations import AxisActivations
from analysis.formats.axis_capping import AxisCapping
from analysis.formats.axis_responses import AxisResponses
from analysis.formats.axis_role import AxisRole
from analysis.formats.axis_vector import AxisVector
from analysis.formats.bare_tensor import BareTensor
from analysis.formats.base import (
    HEADING,
    Foreign,
    Format,
    Hints,
    Imported,
    ImportedScore,
    Made,
    MadeAnswers,
    MadeChat,
    MadeSweep,
    MadeTrait,
    MadeVector,
    keys_of,
    unused_hints,
)
from analysis.formats.chat_jsonl import ChatJsonl
from analysis.formats.em_questions import EmQuestions
from analysis.formats.inoculation_results import InoculationResults
from analysis.formats.persona_training import PersonaTraining
from analysis.formats.persona_trait import PersonaTrait
from analysis.formats.persona_vector import PersonaVector
from analysis.formats.repeng_gguf import RepengGguf
from analysis.formats.steering_vectors import SteeringVectors
from analysis.formats.tables_csv import ScoresCsv
from analysis.traits import Trait, read_trait
from analysis.vectors.vector import Vector
from trainables.errors import ConfigError, Fault

__all__ = [
    "FORMATS",
    "WRITERS",
    "Foreign",
    "Format",
    "Hints",
    "Imported",
    "ImportedScore",
    "Made",
    "MadeAnswers",
    "MadeChat",
    "MadeSweep",
    "MadeTrait",
    "MadeVector",
    "any_trait",
    "foreign_chat",
    "one_vector",
    "open_file",
]

FORMATS: tuple[Format, ...] = (
    PersonaTrait(),
    AxisRole(),
    EmQuestions(),
    PersonaVector(),
    AxisVector(),
    AxisActivations(),
    AxisCapping(),
    SteeringVectors(),
    BareTensor(),
    RepengGguf(),
    ChatJsonl(),
    AxisResponses(),
    ScoresCsv(),
    InoculationResults(),
    PersonaTraining(),
)

WRITERS: Mapping[str, Callable[[Vector], bytes]] = {
    ".pt": persona_vector.to_bytes,
    ".gguf": repeng_gguf.to_bytes,
    ".safetensors": Vector.to_bytes,
}
"""How a vector is written for others, by the ending of the file."""


def open_file(path: Path, hints: Hints | None = None) -> Imported:
    """What the file comes to. Raises ConfigError with every fault of it: it is no known format or could be several, a
    hint has no say about it, its content cannot be meant."""
    hints = hints or Hints()
    file = Foreign(path)
    form = _format(file, hints)
    faults = [
        file.fault(f"{Hints.flag(name)} says nothing about {form.what}; leave it out")
        for name in unused_hints(form, hints)
    ]
    try:
        imported = form.read(file, hints)
    except ConfigError as error:
        raise ConfigError([*faults, *error.faults], HEADING) from error
    if faults:
        raise ConfigError(faults, HEADING)
    return imported


def any_trait(path: Path) -> Trait:
    """The trait in a file of ours or of another project; of several (questions with several judges' prompts) the one
    that is called as the file. Raises ConfigError with every fault of the file."""
    file = Foreign(path)
    if file.suffix != ".json" and not EmQuestions().recognises(file, Hints()):
        return read_trait(path)
    trait: Trait = _one(path, Hints(), MadeTrait, "traits").trait
    return trait


def one_vector(path: Path, hints: Hints | None = None) -> Vector:
    """The vector in a foreign file, for direct use. Raises ConfigError if it holds none or several."""
    vector: Vector = _one(path, hints or Hints(), MadeVector, "vectors").vector
    return vector


def foreign_chat(path: Path) -> tuple[Row, ...] | None:
    """The conversations of a foreign file, for direct use; None where it is in our own format or none that is known.
    Raises ConfigError if it cannot be meant, or holds several sets of them."""
    file = Foreign(path)
    if not AxisResponses().recognises(file, Hints()):
        return None
    rows: tuple[Row, ...] = _one(path, Hints(), MadeChat, "sets of conversations").rows
    return rows


def _one(path: Path, hints: Hints, kind: type[Any], what: str) -> Any:
    imported = open_file(path, hints)
    made = [one for one in imported.made if isinstance(one, kind)]
    made = [one for one in made if one.name == path.stem] or made
    if len(made) != 1:
        names = ", ".join(one.name for one in made)
        message = (
            f"holds {len(made)} {what} ({names}); import it and name the one you mean"
            if made
            else f"holds no {what} that a sweep can name"
        )
        raise ConfigError([Fault(str(path), message)], HEADING)
    return made[0]


def _format(file: Foreign, hints: Hints) -> Format:
    if hints.format is not None:
        form = next((one for one in FORMATS if one.name == hints.format), None)
        if form is None:
            raise file.refuse(f"no format {hints.format!r}; there are {', '.join(one.name for one in FORMATS)}")
        return form
    found = [form for form in FORMATS if form.recognises(file, hints)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(form.name for form in found)
        raise file.refuse(f"could be {names}; say which with {Hints.flag('format')}")
    held = _held(file)
    alike = [form.what for form in FORMATS if file.suffix and f"({file.suffix}" in form.what]
    known = "; ".join(alike or [form.what for form in FORMATS])
    raise file.refuse(f"is none of the files that are read{held}; these are: {known}")


def _held(file: Foreign) -> str:
    """What an unknown file holds, for the message."""
    contents: dict[str, Callable[[], object]] = {
        ".json": lambda: file.json,
        ".yaml": lambda: file.yaml,
        ".yml": lambda: file.yaml,
        ".pt": lambda: file.tensors,
        ".jsonl": lambda: file.first_line,
        ".csv": lambda: dict.fromkeys(file.header),
    }
    content = contents.get(file.suffix)
    return "" if content is None else f" ({keys_of(content())})"
