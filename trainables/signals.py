"""What a training shows of itself on request, step by step, beside its loss: the rows of table ``signals``.

Legend: b rows, t tokens, d hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field

from trainables.config import AddedLater, Config, NamesVector, VectorNames, names_in, referenced
from trainables.defenses.base import RunRows
from trainables.residual_stream import Reader, ReadGradient, ReadValue
from trainables.rows import SignalRow
from trainables.workers import Workers

_PROJECTION, _COSINE = "activation_projection", "gradient_cosine"


class WatchConfig(Config):
    """Directions that are watched while a run trains, at response tokens of every step. It changes no number of the
    training, but it is part of the run's identity, because the table ``signals`` comes out of it."""

    vectors: VectorNames
    """Names of the sweep's ``vectors``; lengths have no say."""
    layers: tuple[int, ...] = Field(min_length=1)
    """Where: layer l is the output of decoder block l - 1."""
    centers: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], NamesVector(), AddedLater()] = ()
    """Names of vectors that are places, such as those of kind ``mean``: how far the step's mean response activation has
    drifted from each, as a cosine distance."""

    def vector_names(self) -> tuple[str, ...]:
        """All vectors that are named."""
        named = (name for value in referenced(self, NamesVector).values() for name in names_in(value))
        return tuple(dict.fromkeys(named))


class Watch:
    """The watched figures of one optimizer step of one run, summed over its micro-batches.

    ``vectors``: name -> [num_layers + 1, d]. At every layer and for every vector v, over response tokens: the mean
    cosine of g = dL/dh with v, as it arrives (before an edit of that layer), over tokens with a gradient that is not
    zero, and the mean of <h, v / |v|>, after what a defense adds there. For every center c the drift 1 - cos(m, c), m
    the mean of h over all response tokens of the step.
    """

    def __init__(
        self, vectors: Mapping[str, torch.Tensor], layers: Sequence[int], centers: Mapping[str, torch.Tensor] = {}
    ) -> None:
        self.names = list(vectors)
        self.layers = layers
        self._units = {
            layer: torch.nn.functional.normalize(torch.stack([vectors[name][layer] for name in self.names]), dim=1)
            for layer in layers
        }
        self._sums: dict[tuple[str, int], list[float]] = {}
        self._counts: dict[tuple[str, int], int] = {}
        self._centers = centers
        self._means: dict[int, torch.Tensor] = {}  # sums of h while a step goes on

    def readers(self, batch: RunRows) -> list[Reader]:
        """What reads the figures of a micro-batch."""
        if not bool(batch.response_mask.any()):
            return []

        def chosen(tensor_btd: torch.Tensor) -> torch.Tensor:
            own = tensor_btd.detach()[batch.rows.to(tensor_btd.device)]
            return own[batch.response_mask.to(own.device)].float()

        def value(layer: int, hidden_btd: torch.Tensor) -> None:
            hidden_md = chosen(hidden_btd)
            self._add(_PROJECTION, layer, hidden_md)
            if self._centers:
                self._means[layer] = self._means.get(layer, 0) + hidden_md.double().sum(0).cpu()

        def gradient(layer: int, gradient_btd: torch.Tensor) -> None:
            gradient_md = chosen(gradient_btd)
            length_m = gradient_md.norm(dim=1)
            seen = length_m > 0
            self._add(_COSINE, layer, gradient_md[seen] / length_m[seen, None])

        readers: list[Reader] = [ReadValue(layer, value) for layer in self.layers]
        return [*readers, *(ReadGradient(layer, gradient) for layer in self.layers)]

    def _add(self, signal: str, layer: int, values_md: torch.Tensor) -> None:
        sums = (values_md @ self._units[layer].to(values_md).T).double().sum(0).tolist()
        known = self._sums.get((signal, layer), [0.0] * len(sums))
        self._sums[signal, layer] = [a + b for a, b in zip(known, sums, strict=True)]
        self._counts[signal, layer] = self._counts.get((signal, layer), 0) + values_md.shape[0]

    def join(self, workers: Workers) -> None:
        """Add up what the workers have read, each in its own micro-batches of the step."""
        keys = [(signal, layer) for signal in (_PROJECTION, _COSINE) for layer in self.layers]
        centered = self.layers if self._centers else ()
        size = len(next(iter(self._centers.values()))[0]) if self._centers else 0
        found: list[float] = []
        for key in keys:
            found += [*self._sums.get(key, [0.0] * len(self.names)), float(self._counts.get(key, 0))]
        for layer in centered:
            found += self._means.get(layer, torch.zeros(size)).tolist()
        joined = iter(workers.added(found))
        for key in keys:
            self._sums[key] = [next(joined) for _ in self.names]
            self._counts[key] = round(next(joined))
        for layer in centered:
            mean_d = torch.tensor([next(joined) for _ in range(size)], dtype=torch.float64)
            if self._counts[_PROJECTION, layer]:
                self._means[layer] = mean_d

    def rows(self, train_id: str, step: int) -> list[SignalRow]:
        """The means of the step, and none where there was no token; the sums are begun anew."""
        rows = [
            SignalRow(train_id=train_id, step=step, signal=signal, name=name, layer=layer, value=total / count)
            for (signal, layer), totals in self._sums.items()
            if (count := self._counts[signal, layer]) > 0
            for name, total in zip(self.names, totals, strict=True)
        ]
        rows += [
            SignalRow(
                train_id=train_id, step=step, signal="drift", name=name, layer=layer, value=_distance(mean_d, c_d)
            )
            for layer, mean_d in self._means.items()
            for name, c_d in ((name, center[layer].double()) for name, center in self._centers.items())
        ]
        self._sums, self._counts, self._means = {}, {}, {}
        return rows


def _distance(a_d: torch.Tensor, b_d: torch.Tensor) -> float:
    """1 - cos(a, b)."""
    return 1 - float(torch.nn.functional.cosine_similarity(a_d, b_d.to(a_d), dim=0))
