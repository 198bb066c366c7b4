"""``file``: a vector that the user brings, of ours or of another project."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from pydantic import Field

from analysis.vectors.base import Making, VectorKind
from analysis.vectors.vector import Vector, read_vector_header
from trainables.base_model import ResolvedBase
from trainables.config import AddedLater, AnyFile, Path
from trainables.errors import ConfigError, Fault
from trainables.shapes import ModelShape, VectorShape

OURS = ".safetensors"


class FileVector(VectorKind):
    """A vector that lies in a file."""

    file: AnyFile
    """A safetensors file with one float32 tensor ``vector`` [num_layers + 1, hidden] and ``final_row`` in its metadata,
    as the store has them; or a vector of another project: ``.pt`` of persona_vectors, assistant-axis or
    steering-vectors, ``.gguf`` of repeng. It is known by what is read, not by how it lies there."""
    rows: Annotated[Literal["embedding", "blocks"] | None, AddedLater()] = None
    """Of a ``.pt`` with one tensor: ``embedding``, row 0 is the embedding output and row l layer l (persona_vectors);
    ``blocks``, row i is the output of block i (assistant-axis). null: the file or its name says it."""
    num_layers: Annotated[int | None, Field(ge=1), AddedLater()] = None
    """Layers of the model, for files that hold some of its rows (``.gguf``, steering-vectors)."""
    final_row: Annotated[Literal["pre_norm", "post_norm"] | None, AddedLater()] = None
    """Where the last row of another project's vector was read: before or after the final norm. null: as that project
    does it."""

    def content(self, file: FilePath) -> bytes:
        """The vector as we write it, so that an imported file and the file that it was made of are one vector."""
        return file.read_bytes() if self._is_ours(file) else self._vector(file).to_bytes()

    def shape(
        self,
        base: ResolvedBase,
        model: ModelShape,
        vectors: Mapping[Path, VectorShape],
        files: Mapping[Path, FilePath],
    ) -> VectorShape:
        del vectors
        vector = self._vector(files["file",])
        num_layers, hidden_size = vector.values.shape[0] - 1, vector.values.shape[1]
        if (num_layers, hidden_size) != (model.num_layers, model.hidden_size):
            fault = (
                f"the vector has {num_layers} layers of hidden size {hidden_size}; "
                f"{base.model} has {model.num_layers} layers of hidden size {model.hidden_size}"
            )
        elif vector.model and (vector.model, vector.revision) != (base.model, base.revision):
            fault = (
                f"the vector was made for {vector.model} ({vector.revision}); "
                f"the run that uses it starts from {base.model} ({base.revision})"
            )
        else:
            empty = (~(vector.values != 0).any(dim=1)).nonzero().flatten().tolist()
            return VectorShape(num_layers, hidden_size, vector.final_row, tuple(empty))
        raise ConfigError([Fault("file", fault)])

    def identity(self, base: ResolvedBase, name: str) -> dict[str, Any]:
        del base, name
        return {"content": self.file}  # what is read, in which the other fields have had their say

    def make(self, making: Making) -> Vector:
        return Vector.read(making.file(self.file))

    def _is_ours(self, file: FilePath) -> bool:
        """Raises ConfigError for a file of ours that is none, or that says itself what the user says of it."""
        if file.suffix != OURS:
            return False
        read_vector_header(file)
        said = [name for name in ("rows", "num_layers", "final_row") if getattr(self, name) is not None]
        if said:
            message = f"{' and '.join(said)} would do nothing: a safetensors file of ours says it itself; leave out"
            raise ConfigError([Fault(str(file), message)])
        return True

    def _vector(self, file: FilePath) -> Vector:
        if self._is_ours(file):
            return Vector.read(file)
        from analysis.formats import Hints, one_vector  # knows vectors itself

        return one_vector(file, Hints(rows=self.rows, num_layers=self.num_layers, final_row=self.final_row))
