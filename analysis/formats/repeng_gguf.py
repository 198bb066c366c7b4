"""Control vectors of repeng, as llama.cpp reads them: a GGUF file with a tensor ``direction.{block}`` per layer.

A block's number is our layer less one. ``controlvector.layer_count`` counts different things in different programs, so
the number of layers of the model is asked for. repeng reads the last block after the final norm. What we write
ourselves says both, under keys of our own that others ignore.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from analysis.formats.base import Foreign, Format, Hints, Imported, MadeVector, raise_faults
from analysis.formats.rows import describe, of_blocks
from analysis.formats.steering_vectors import block_faults, block_words
from analysis.vectors.vector import FINAL_ROWS, Vector
from trainables.errors import ConfigError, Fault

ARCHITECTURE = "controlvector"
NUM_LAYERS, FINAL_ROW = "shiftgrad.num_layers", "shiftgrad.final_row"
_DIRECTION = re.compile(r"direction\.(\d+)")


class RepengGguf(Format):
    name = "repeng-gguf"
    what = "a control vector of repeng or llama.cpp (.gguf: direction.{block})"
    hints = frozenset({"num_layers", "final_row"})

    def recognises(self, file: Foreign, hints: Hints) -> bool:
        del hints
        return file.suffix == ".gguf"

    def read(self, file: Foreign, hints: Hints) -> Imported:
        reader = _open(file)
        architecture = _text(reader, "general.architecture")
        if architecture != ARCHITECTURE:
            raise file.refuse(f"is a GGUF file of {architecture!r}, not a control vector")
        rows, faults = _rows(file, reader)
        said, final_row = _number(reader, NUM_LAYERS), _text(reader, FINAL_ROW)
        num_layers = hints.num_layers or said
        faults += block_faults(file, list(rows) or [0], Hints(num_layers=num_layers))
        if not rows and not faults:
            faults.append(file.fault("holds no direction"))
        raise_faults(faults)
        assert num_layers is not None
        known = next((one for one in FINAL_ROWS if one == final_row), None)
        vector = of_blocks(rows, num_layers, hints.final_row or known or "post_norm")
        hint = _text(reader, "controlvector.model_hint")
        lines = [
            *describe(vector, f"direction.i is block i, our layer i + 1; {block_words(list(rows))}"),
            f"made for {hint}" if hint else "does not say for which model it was made",
        ]
        if vector.final_row == "post_norm" and known is None and hints.final_row is None:
            lines.append("(as repeng reads it; if the last one was read before the final norm: --final-row pre_norm)")
        return Imported(self.name, (MadeVector(file.name, vector),), tuple(lines))


def to_bytes(vector: Vector) -> bytes:
    """The vector as repeng and llama.cpp load it: every layer with a row that is not zero. The embedding row has no
    place there."""
    from gguf import GGUFWriter

    values = vector.values.to(torch.float32)
    num_layers = values.shape[0] - 1
    blocks = [block for block in range(num_layers) if bool((values[block + 1] != 0).any())]
    if not blocks:
        raise ConfigError([Fault("vector", "all of its rows are zero; a control vector needs one that is not")])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vector.gguf"
        writer = GGUFWriter(str(path), ARCHITECTURE)
        writer.add_string("controlvector.model_hint", vector.model)
        writer.add_uint32("controlvector.layer_count", len(blocks))
        writer.add_uint32(NUM_LAYERS, num_layers)
        writer.add_string(FINAL_ROW, vector.final_row)
        for block in blocks:
            writer.add_tensor(f"direction.{block}", values[block + 1].numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def _open(file: Foreign) -> Any:
    from gguf import GGUFReader

    file.bytes  # noqa: B018 - says what is wrong where there is no such file
    try:
        return GGUFReader(str(file.path))
    except Exception as error:
        raise file.refuse(f"not a GGUF file: {' '.join(str(error).split()) or type(error).__name__}") from error


def _rows(file: Foreign, reader: Any) -> tuple[dict[int, torch.Tensor], list[Fault]]:
    rows: dict[int, torch.Tensor] = {}
    faults: list[Fault] = []
    for tensor in reader.tensors:
        match = _DIRECTION.fullmatch(tensor.name)
        values = np.array(tensor.data)
        if match is None:
            faults.append(file.fault("only tensors direction.{block} are read", tensor.name))
        elif values.ndim != 1 or values.dtype not in (np.float32, np.float16) or not np.isfinite(values).all():
            faults.append(file.fault("must be [hidden] of finite floats that are not quantized", tensor.name))
        else:
            rows[int(match[1])] = torch.from_numpy(values.astype(np.float32))
    if len({row.shape for row in rows.values()}) > 1:
        faults.append(file.fault("the directions have different sizes"))
    return rows, faults


def _field(reader: Any, name: str) -> Any:
    field = reader.fields.get(name)
    return None if field is None else field.contents()


def _text(reader: Any, name: str) -> str:
    value = _field(reader, name)
    return value if isinstance(value, str) else ""


def _number(reader: Any, name: str) -> int | None:
    value = _field(reader, name)
    return int(value) if isinstance(value, int | np.integer) else None
