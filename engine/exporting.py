"""``shiftgrad export``: a vector of ours in another project's format."""

from __future__ import annotations

from pathlib import Path

from analysis.formats import WRITERS
from analysis.formats.rows import FINAL_ROW_WORDS
from analysis.results import load
from analysis.vectors import Vector
from engine.atomic import write_new
from trainables.errors import ConfigError, Fault

HEADING = "nothing was written"


def export_vector(source: Path, target: Path, name: str | None = None) -> list[str]:
    """Write the vector in the file ``source``, or ``name`` of the sweep in the folder ``source``, to ``target``, whose
    ending says the format. Returns what to know about it, a line each.

    Raises ConfigError: no such vector, an ending that nobody reads, a file that is there already.
    """
    faults = []
    writer = WRITERS.get(target.suffix)
    if writer is None:
        faults.append(Fault(str(target), f"no format ends with {target.suffix!r}; allowed: {', '.join(WRITERS)}"))
    if target.exists():
        faults.append(Fault(str(target), "is there already and is not overwritten"))
    vector: Vector | None = None
    try:
        vector = _vector(source, name)
    except ConfigError as error:
        faults += error.faults
    if faults or vector is None or writer is None:
        raise ConfigError(faults, HEADING)
    content = writer(vector)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_new(target, content)
    except OSError as error:
        raise ConfigError([Fault(str(target), f"cannot be written: {error.strerror or error}")], HEADING) from error
    layers, hidden = vector.values.shape[0] - 1, vector.values.shape[1]
    lines = [f"{layers} layers, hidden size {hidden}; {FINAL_ROW_WORDS[vector.final_row]}"]
    if target.suffix == ".pt":
        lines.append(f"one tensor [{layers + 1}, {hidden}], row 0 the embedding output, row l layer l")
        if vector.final_row == "pre_norm":
            lines.append(
                "persona_vectors' own vectors have the last row AFTER the final norm: say which when you share it"
            )
    if target.suffix == ".gguf":
        lines.append("direction.i is the output of block i, our layer i + 1; the embedding row has no place there")
    return lines


def _vector(source: Path, name: str | None) -> Vector:
    if source.is_dir():
        if name is None:
            known = ", ".join(load(source).manifest.vectors) or "none"
            raise ConfigError([Fault("--vector", f"which vector of the sweep? It has: {known}")], HEADING)
        return load(source).vector(name)
    if name is not None:
        raise ConfigError([Fault("--vector", f"{source} is one vector; a name is for a sweep's folder")], HEADING)
    return Vector.read(source)
