"""Directions in weight space: V = g(A) - g(B), the difference of two piles' mean gradients, and what is made of it.

Moving the weights along +V raises the loss on pile A more than on pile B, so it takes away what A has and B has not;
along -V it brings more of it. The steps from V to a direction, each left out unless it is asked for, in this order:

1. layers, modules   V is zero at all other parameters
2. sign              V keeps its entries above (below) zero alone
3. delta_sign        V keeps its entries alone where Delta is above (below) zero
4. weigh_by_delta    V <- (|Delta| / s) * V, entry by entry, s the given percentile of |Delta| over all adapted entries
5. project_on_delta  V <- U_k U_k^T V W_k W_k^T with the k leading singular vectors U, W of the matrix's Delta
6. rank              V <- its best approximation of this rank, matrix by matrix
7. keep_norm         V is scaled to the norm that it had before all this

Steps 3 to 5 leave nothing of a parameter without Delta. Numbers are made in float64 where they are summed or taken
apart, one parameter at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field

from analysis.weight_space.delta import AdapterDelta, LowRank, percentile_of_sizes
from analysis.weight_space.parameters import Place, is_chosen
from analysis.weight_space.pile_gradients import MeanGradient
from trainables.config import Config
from trainables.errors import DataError

Layer = Annotated[int, Field(ge=0)]


class DirectionConfig(Config):
    """The mean gradient over one pile minus that over another, and what is made of it."""

    of: str = Field(min_length=1)
    """The pile that has the behaviour: adding the direction takes it away."""
    minus: str = Field(min_length=1)
    """The pile that it is compared with."""
    layers: tuple[Layer, ...] | None = Field(default=None, min_length=1)
    """Keep the parameters of these layers alone: 0 the embeddings, 1 the first decoder block. null: all."""
    modules: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Keep the parameters of modules with these last names alone, such as ``[q_proj, down_proj]``. null: all."""
    sign: Literal["positive", "negative"] | None = None
    """Keep the entries of the difference that are above (below) zero alone. null: all."""
    delta_sign: Literal["positive", "negative"] | None = None
    """Keep the entries alone where the finetuning raised (lowered) the weight. null: all."""
    weigh_by_delta: float | None = Field(default=None, gt=0, le=100)
    """Weigh every entry by ``|Delta| / s``, what the finetuning changed there, with s this percentile of ``|Delta|``
    (97 in the published experiment). null: not."""
    project_on_delta: int | None = Field(default=None, ge=1)
    """Project every matrix onto the spaces of this many leading singular vectors of its Delta, on both sides. null:
    not."""
    rank: int | None = Field(default=None, ge=1)
    """Replace every matrix by its best approximation of this rank. null: not."""
    keep_norm: bool = False
    """Scale the direction to the norm of the plain difference over all parameters, so that one alpha means equally
    large steps for all of them."""

    @property
    def needs_delta(self) -> bool:
        """Whether it rests on what the finetuning changed."""
        return self.delta_sign is not None or self.weigh_by_delta is not None or self.project_on_delta is not None


@dataclass(eq=False)
class Direction:
    """A direction, made parameter by parameter each time it is gone through. Parameters that are zero are left out."""

    config: DirectionConfig
    of: MeanGradient
    minus: MeanGradient
    places: Mapping[str, Place]
    delta: AdapterDelta
    _scale: float | None = field(default=None, init=False)
    _size: float | None = field(default=None, init=False)

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, values of the parameter's shape), in the piles' dtype."""
        scale = self.scale()
        for name, values in self._unscaled():
            yield name, values if scale == 1.0 else values * scale

    def scale(self) -> float:
        """What ``keep_norm`` multiplies by; 1 without it. Raises DataError where nothing is left to be scaled."""
        if self._scale is None:
            self._scale = 1.0
            if self.config.keep_norm:
                plain = norm(values for _, values in self.plain())
                left = norm(values for _, values in self._unscaled())
                if left == 0 and plain > 0:
                    raise DataError(f"nothing is left of the direction {describe(self.config)}, so no norm can be kept")
                self._scale = plain / left if left > 0 else 1.0
        return self._scale

    def plain(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The difference of the piles' means before anything is made of it."""
        for name in self.of.names:
            yield name, self.of[name] - self.minus[name]

    def _unscaled(self) -> Iterator[tuple[str, torch.Tensor]]:
        config = self.config
        for name in self.of.names:
            if not is_chosen(self.places[name], config.layers, config.modules):
                continue
            if config.needs_delta and name not in self.delta:
                continue
            values = self._shaped(name, self.of[name] - self.minus[name])
            if torch.any(values):
                yield name, values

    def _shaped(self, name: str, values: torch.Tensor) -> torch.Tensor:
        config = self.config
        if config.sign is not None:
            values = values.clamp(min=0) if config.sign == "positive" else values.clamp(max=0)
        if config.delta_sign is not None or config.weigh_by_delta is not None:
            delta = self.delta[name].values().to(values.dtype)
            if config.delta_sign is not None:
                values = values * ((delta > 0) if config.delta_sign == "positive" else (delta < 0))
            if config.weigh_by_delta is not None:
                values = values * (delta.abs() / self.size_of_delta(config.weigh_by_delta))
        if config.project_on_delta is not None:
            values = projected(values, *self._spaces(name, config.project_on_delta))
        if config.rank is not None and values.dim() == 2:
            values = approximated(values, config.rank)
        return values

    def _spaces(self, name: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        left, sizes, right = self.delta[name].singular()
        # of a Delta of smaller rank what the decomposition gives beyond it is no direction of it
        real = int((sizes > sizes[0] * 1e-12).sum()) if len(sizes) and sizes[0] > 0 else 0
        return left[:, : min(count, real)], right[:, : min(count, real)]

    def size_of_delta(self, percent: float) -> float:
        """s: the percentile of |Delta| over the entries of all matrices that have an adapter. Raises DataError if it is
        zero."""
        if self._size is None:
            self._size = percentile_of_sizes(_Values(self.delta), percent)
            if self._size == 0:
                raise DataError(f"the {percent:g}th percentile of |Delta| is 0: the finetuning changed hardly anything")
        return self._size


class _Values:
    """The whole matrices of a Delta, made one by one each time they are gone through."""

    def __init__(self, delta: AdapterDelta) -> None:
        self.delta = delta

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (matrix.values() for matrix in self.delta.values())


def direction(
    config: DirectionConfig,
    of: MeanGradient,
    minus: MeanGradient,
    places: Mapping[str, Place],
    delta: AdapterDelta | None = None,
) -> Direction:
    """The direction that ``config`` means, of two piles' mean gradients with respect to the same parameters.

    ``places``: of these parameters. ``delta``: what the finetuning changed, if the config needs it.
    """
    assert of.names == minus.names, "the piles' gradients are of the same parameters"
    assert delta is not None or not config.needs_delta, "this direction rests on Delta"
    return Direction(config, of, minus, places, delta or {})


def projected(values: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """U U^T V W W^T for U [out, k] and W [in, k] with orthonormal columns, made in float64."""
    wide = values.double()
    return (left @ (left.T @ wide @ right) @ right.T).to(values.dtype)


def factors(values: torch.Tensor, rank: int) -> LowRank:
    """The closest matrix of at most this rank (Eckart and Young) as its factors, float64, by the eigenvectors of the
    smaller of V V^T and V^T V."""
    wide = values.double()
    is_wide = wide.shape[0] <= wide.shape[1]
    gram = wide @ wide.T if is_wide else wide.T @ wide
    leading = torch.linalg.eigh(gram).eigenvectors[:, -rank:]  # eigenvalues rise
    return LowRank(leading, leading.T @ wide) if is_wide else LowRank(wide @ leading, leading.T)


def approximated(values: torch.Tensor, rank: int) -> torch.Tensor:
    """The closest matrix of this rank; itself where it has no more."""
    return values if rank >= min(values.shape) else factors(values, rank).values().to(values.dtype)


def norm(tensors: Iterator[torch.Tensor]) -> float:
    """L2 norm over all entries of all tensors, summed in float64."""
    return math.sqrt(sum(float(values.double().square().sum()) for values in tensors))


def describe(config: DirectionConfig) -> str:
    """``bridge - neither, weighed by Delta (97 %)``."""
    parts = [f"{config.of} - {config.minus}"]
    parts += [f"layers {', '.join(map(str, config.layers))}"] if config.layers is not None else []
    parts += [f"modules {', '.join(config.modules)}"] if config.modules is not None else []
    parts += [f"{config.sign} entries"] if config.sign is not None else []
    parts += [f"where Delta is {config.delta_sign}"] if config.delta_sign is not None else []
    parts += [f"weighed by Delta ({config.weigh_by_delta:g} %)"] if config.weigh_by_delta is not None else []
    parts += [f"projected on {config.project_on_delta} of Delta"] if config.project_on_delta is not None else []
    parts += [f"rank {config.rank}"] if config.rank is not None else []
    parts += ["norm kept"] if config.keep_norm else []
    return ", ".join(parts)
