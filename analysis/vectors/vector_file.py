"""``file``: a vector that the user brings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path as FilePath
from typing import Any

from analysis.vectors.base import Making, VectorKind
from analysis.vectors.vector import Vector, read_vector_header
from trainables.base_model import ResolvedBase
from trainables.config import AnyFile, Path
from trainables.errors import ConfigError, Fault
from trainables.shapes import ModelShape, VectorShape


class FileVector(VectorKind):
    """A vector that lies in a file."""

    file: AnyFile
    """A safetensors file with one float32 tensor ``vector`` [num_layers + 1, hidden] and ``final_row`` in its metadata,
    as the store has them."""

    def file_faults(self, files: Mapping[Path, FilePath]) -> Iterable[Fault]:
        try:
            read_vector_header(files["file",])
        except ConfigError as error:
            return [Fault("file", str(fault)) for fault in error.faults]
        return ()

    def shape(
        self,
        base: ResolvedBase,
        model: ModelShape,
        vectors: Mapping[Path, VectorShape],
        files: Mapping[Path, FilePath],
    ) -> VectorShape:
        del vectors
        shape, made_for, revision = read_vector_header(files["file",])
        if (shape.num_layers, shape.hidden_size) != (model.num_layers, model.hidden_size):
            fault = (
                f"the vector has {shape.num_layers} layers of hidden size {shape.hidden_size}; "
                f"{base.model} has {model.num_layers} layers of hidden size {model.hidden_size}"
            )
        elif made_for and (made_for, revision) != (base.model, base.revision):
            fault = (
                f"the vector was made for {made_for} ({revision}); "
                f"the run that uses it starts from {base.model} ({base.revision})"
            )
        else:
            return shape
        raise ConfigError([Fault("file", fault)])

    def identity(self, base: ResolvedBase, name: str) -> dict[str, Any]:
        del base, name
        return {"content": self.file}

    def make(self, making: Making) -> Vector:
        return Vector.read(making.file(self.file))
