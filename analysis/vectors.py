"""Vectors: directions in the residual stream, one row per layer, and how they are made.

Legend: b rows, t tokens, d hidden size. A vector is [num_layers + 1, hidden] float32; row l is in the space of layer
l (row 0: the embedding output; the last row: the output of the last block BEFORE the final norm).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from trainables.base_model import LoadedBase
from trainables.chat_data import ChatEncoder, Encoded, encode_all, pad
from trainables.defenses import Message
from trainables.errors import ConfigError, Fault
from trainables.model_parts import backbone, decoder_layers
from trainables.randomness import generator
from trainables.residual_stream import ReadValue, residual_stream
from trainables.shapes import FinalRow, VectorShape

TENSOR = "vector"
FINAL_ROWS: tuple[FinalRow, ...] = ("pre_norm", "post_norm", "absent")


@dataclass(frozen=True)
class Vector:
    """A named direction. ``model`` and ``revision`` say whose residual stream it lives in; "" where not known."""

    values: torch.Tensor  # [num_layers + 1, hidden] float32
    final_row: FinalRow
    model: str
    revision: str

    def to_bytes(self) -> bytes:
        """The vector as a safetensors file with its facts as metadata; the same vector gives the same bytes."""
        metadata = {"final_row": self.final_row, "model": self.model, "revision": self.revision}
        file = save({TENSOR: self.values.to(torch.float32).contiguous()}, metadata)
        size = int.from_bytes(file[:8], "little")
        # the library writes the metadata in another order every time
        header = json.dumps(json.loads(file[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)  # the format wants the numbers at a multiple of 8
        return len(header).to_bytes(8, "little") + header + file[8 + size :]

    @staticmethod
    def read(path: Path) -> Vector:
        """Read a vector file; ConfigError if it is not one of ours."""
        shape, model, revision = read_vector_header(path)
        with safe_open(path, framework="pt") as handle:
            return Vector(handle.get_tensor(TENSOR), shape.final_row, model, revision)


def read_vector_header(path: Path) -> tuple[VectorShape, str, str]:
    """(shape, model, revision) of a vector file without reading its numbers.

    Raises ConfigError if it is not a readable safetensors file with one float32 tensor called ``vector`` of two
    dimensions and metadata ``final_row``.
    """
    wanted = "a safetensors file with one float32 tensor 'vector' [num_layers + 1, hidden] and metadata final_row"
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            names = list(handle.keys())
            if names != [TENSOR]:
                raise ConfigError([Fault(str(path), f"holds tensors {names}; a vector is {wanted}")])
            piece = handle.get_slice(TENSOR)
            dimensions, dtype = piece.get_shape(), piece.get_dtype()
    except (SafetensorError, OSError) as error:
        raise ConfigError([Fault(str(path), f"cannot be read ({error}); a vector is {wanted}")]) from error
    final_row = next((known for known in FINAL_ROWS if known == metadata.get("final_row")), None)
    if len(dimensions) != 2 or dtype != "F32" or final_row is None:
        found = f"shape {dimensions}, dtype {dtype}, final_row {metadata.get('final_row')!r}"
        raise ConfigError([Fault(str(path), f"{found}; a vector is {wanted}: {', '.join(FINAL_ROWS)}")])
    shape = VectorShape(dimensions[0] - 1, dimensions[1], final_row)
    return shape, metadata.get("model", ""), metadata.get("revision", "")


def random_like(like: torch.Tensor, seed: int, name: str) -> torch.Tensor:
    """Gaussian directions from (seed, name, layer), each scaled to the norm of ``like``'s row; same shape, float32."""
    rows = []
    for layer, row in enumerate(like):
        noise = torch.randn(row.shape[0], generator=generator("random_like", seed, name, layer), dtype=torch.float64)
        rows.append(noise * (row.double().norm() / noise.norm()))
    return torch.stack(rows).float()


def difference(
    base: LoadedBase,
    positive: Sequence[Sequence[Message]],
    negative: Sequence[Sequence[Message]],
    *,
    max_length: int,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Equation 2 of arXiv 2604.16423: mean over on-trait rows of (mean over response tokens of h_l) minus the same
    over the other rows, for every layer; [num_layers + 1, hidden] float32.

    Each row weighs the same however long its response is. Sums are float64. ``progress(done, total)`` counts rows.
    """
    total = len(positive) + len(negative)
    parts, done = [], 0
    for rows in (positive, negative):
        offset = done

        def report(count: int, offset: int = offset) -> None:
            if progress is not None:
                progress(offset + count, total)

        parts.append(mean_response_activation(base, rows, max_length, batch_size, report))
        done += len(rows)
    return (parts[0] - parts[1]).float()


def mean_response_activation(
    base: LoadedBase,
    rows: Sequence[Sequence[Message]],
    max_length: int,
    batch_size: int,
    progress: Callable[[int], None],
) -> torch.Tensor:
    """Mean over rows of the mean over response tokens of h_l, every layer; [num_layers + 1, hidden] float64."""
    encoded, _ = encode_all(rows, ChatEncoder(base.tokenizer, max_length), False)
    ordered = sorted(encoded, key=lambda row: len(row.input_ids))  # alike lengths together: little padding
    num_layers = len(decoder_layers(base.model))
    sums: dict[int, torch.Tensor] = {}
    for start in range(0, len(ordered), batch_size):
        part = ordered[start : start + batch_size]
        for layer, mean_bd in _response_means(base, part, range(num_layers + 1)).items():
            sums[layer] = sums.get(layer, 0) + mean_bd.double().sum(0).cpu()
        progress(start + len(part))
    return torch.stack([sums[layer] for layer in range(num_layers + 1)]) / len(ordered)


@torch.no_grad()
def _response_means(base: LoadedBase, rows: Sequence[Encoded], layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """Per layer the mean over each row's response tokens of h, [b, d] float32 (float64 for a float64 model)."""
    batch = pad(rows, base.tokenizer.pad_token_id, 1, base.device)
    mask_bt1 = batch.response_mask_bt[:, :, None]
    means: dict[int, torch.Tensor] = {}

    def keep(layer: int, hidden_btd: torch.Tensor) -> None:
        wide = hidden_btd if hidden_btd.dtype == torch.float64 else hidden_btd.float()
        means[layer] = (wide * mask_bt1).sum(1) / mask_bt1.sum(1)

    with residual_stream(base.model, readers=[ReadValue(layer, keep) for layer in layers]):
        backbone(base.model)(input_ids=batch.input_ids_bt, attention_mask=batch.attention_mask_bt, use_cache=False)
    return means
