"""What a defense changes about the gradient, taken apart: uncentred PCA of gradient differences.

Equations 9 to 12 of arXiv 2604.16423: rows d_n of D are a defense's change of the mean gradient of sample n, D is
divided by its Frobenius norm, and the directions are the eigenvectors of M = D^T D / (N - 1). Nothing is centred, so
the first one takes in the mean change and the largest spread around it together.

Legend: n samples, d hidden size, k directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from analysis.measured_rows import ComponentRow, ComponentScoreRow

CUMULATIVE = 0.95  # directions are reported until they explain this much together
NUM_SCORES = 3


class GradientDifferences:
    """The differences of one layer, collected from any number of shards in any order, at most d x d numbers.

    Up to d samples the differences themselves are kept, beyond that only D^T D: the directions are the same, but scores
    then need the differences once more (``Decomposition.scores_of``).
    """

    def __init__(self, hidden_size: int) -> None:
        self.hidden_size = hidden_size
        self.rows: list[int] = []
        self.sum_d = torch.zeros(hidden_size, dtype=torch.float64)
        self.differences: list[torch.Tensor] | None = []  # [.., d] each; None once they are too many
        self.moment_dd: torch.Tensor | None = None

    def add(self, rows: Sequence[int], differences_nd: torch.Tensor) -> None:
        """Take in the differences of ``rows``. Raises ValueError for a row that is there already, a shape that does not
        fit or a value that is not finite."""
        found = differences_nd.detach().cpu().double()
        if found.shape != (len(rows), self.hidden_size):
            raise ValueError(f"differences of {len(rows)} rows are {list(found.shape)}, not [n, {self.hidden_size}]")
        if not bool(torch.isfinite(found).all()):
            raise ValueError("a gradient difference is not finite")
        self._take_rows(rows)
        self.sum_d = self.sum_d + found.sum(0)
        if self.differences is not None:
            self.differences.append(found)
            if len(self.rows) > self.hidden_size:
                self._condense()
        else:
            assert self.moment_dd is not None
            self.moment_dd = self.moment_dd + found.T @ found

    def merge(self, other: GradientDifferences) -> None:
        """Take in what another shard collected; raises ValueError for rows that both have."""
        if other.differences is not None:
            if other.rows:
                self.add(other.rows, torch.cat(other.differences))
            return
        assert other.moment_dd is not None
        self._take_rows(other.rows)
        if self.differences is not None:
            self._condense()
        assert self.moment_dd is not None
        self.moment_dd = self.moment_dd + other.moment_dd
        self.sum_d = self.sum_d + other.sum_d

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """For a file: rows [n] int64, sum [d], and differences [n, d] or moment [d, d]; float64."""
        tensors = {"rows": torch.tensor(self.rows, dtype=torch.int64), "sum": self.sum_d}
        if self.differences is None:
            assert self.moment_dd is not None
            return tensors | {"moment": self.moment_dd}
        empty = torch.empty(0, self.hidden_size, dtype=torch.float64)
        return tensors | {"differences": torch.cat([empty, *self.differences])}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> GradientDifferences:
        """What ``to_tensors`` gave."""
        self = cls(tensors["sum"].shape[0])
        if "differences" in tensors:
            self.add(tensors["rows"].tolist(), tensors["differences"])
        else:
            self.rows, self.sum_d = tensors["rows"].tolist(), tensors["sum"]
            self.differences, self.moment_dd = None, tensors["moment"]
        return self

    def decompose(self, axis_d: torch.Tensor) -> Decomposition:
        """The principal directions, each with <u, axis> >= 0. Raises ValueError for fewer than two rows, or where the
        defense changes nothing at all."""
        num_rows = len(self.rows)
        if num_rows < 2:
            raise ValueError(f"a decomposition needs two rows or more, not {num_rows}")
        mean_d = self.sum_d / num_rows
        order = sorted(range(num_rows), key=self.rows.__getitem__)  # whatever shard came first
        if self.differences is not None:
            matrix_nd = torch.cat(self.differences)[order]
            norm = float(matrix_nd.norm())
            _must_be_something(norm)
            _, singular_k, directions_kd = torch.linalg.svd(matrix_nd / norm, full_matrices=False)
            squares_k = singular_k.square()
        else:
            assert self.moment_dd is not None
            norm = float(self.moment_dd.trace().sqrt())
            _must_be_something(norm)
            values, vectors = torch.linalg.eigh(self.moment_dd / norm**2)
            squares_k, directions_kd = values.flip(0).clamp_min(0), vectors.flip(1).T.contiguous()
        signs = torch.where(directions_kd @ axis_d.double().cpu() < 0, -1.0, 1.0).double()
        directions_kd = directions_kd * signs[:, None]
        scores = None if self.differences is None else matrix_nd / norm @ directions_kd.T
        return Decomposition(
            rows=[self.rows[index] for index in order],
            norm=norm,
            variances_k=squares_k / (num_rows - 1),
            explained_k=squares_k / squares_k.sum(),
            directions_kd=directions_kd,
            mean_d=mean_d,
            scores_nk=scores,
        )

    def _take_rows(self, rows: Sequence[int]) -> None:
        again = sorted(set(rows) & set(self.rows)) or sorted({row for row in rows if list(rows).count(row) > 1})
        if again:
            raise ValueError(f"the differences of row {again[0]} are there already")
        self.rows.extend(rows)

    def _condense(self) -> None:
        assert self.differences is not None
        parts = self.differences
        self.moment_dd = torch.zeros(self.hidden_size, self.hidden_size, dtype=torch.float64)
        for part_nd in parts:
            self.moment_dd += part_nd.T @ part_nd
        self.differences = None


def _must_be_something(norm: float) -> None:
    if norm == 0:
        raise ValueError("the gradient is the same under both conditions, so there is nothing to take apart")


@dataclass(frozen=True)
class Decomposition:
    """Principal directions, those that explain most first. All float64."""

    rows: list[int]
    norm: float  # Frobenius norm of the differences
    variances_k: torch.Tensor  # eigenvalues of M
    explained_k: torch.Tensor  # their shares
    directions_kd: torch.Tensor
    mean_d: torch.Tensor  # mean difference, not divided by anything
    scores_nk: torch.Tensor | None  # by row of ``rows``; None: the differences were not kept

    def num_explaining(self, share: float = CUMULATIVE) -> int:
        """How many directions it takes to explain ``share``."""
        reached = self.explained_k.cumsum(0) >= share - 1e-12
        return int(reached.double().argmax()) + 1 if bool(reached.any()) else len(self.explained_k)

    def scores_of(self, differences_nd: torch.Tensor) -> torch.Tensor:
        """Scores [n, k] of differences given once more."""
        return differences_nd.detach().cpu().double() / self.norm @ self.directions_kd.T


def component_rows(
    found: Decomposition,
    vectors: Mapping[str, torch.Tensor],
    layer: int,
    *,
    measure_id: str,
    condition: str,
    reference: str,
) -> Iterator[ComponentRow]:
    """A row per direction (the mean change as component 0, then those that explain 95 % together) and vector."""
    count = found.num_explaining()
    cumulative = found.explained_k.cumsum(0)
    for component in range(count + 1):
        direction_d = found.mean_d if component == 0 else found.directions_kd[component - 1]
        for name, vector in vectors.items():
            reference_d = vector[layer].double().cpu()
            yield ComponentRow(
                measure_id=measure_id,
                condition=condition,
                reference=reference,
                layer=layer,
                component=component,
                num_rows=len(found.rows),
                variance=float(found.variances_k[component - 1]) if component else None,
                explained=float(found.explained_k[component - 1]) if component else None,
                cumulative=float(cumulative[component - 1]) if component else None,
                vector=name,
                cosine=float(direction_d @ reference_d / (direction_d.norm() * reference_d.norm())),
            )


def component_score_rows(
    rows: Iterable[int],
    scores_nk: torch.Tensor,
    layer: int,
    *,
    measure_id: str,
    condition: str,
    reference: str,
    num_components: int = NUM_SCORES,
) -> Iterator[ComponentScoreRow]:
    """The scores of the first directions, a row per data row and direction."""
    for row, scores in zip(rows, scores_nk[:, :num_components].tolist(), strict=True):
        for number, score in enumerate(scores, start=1):
            yield ComponentScoreRow(
                measure_id=measure_id,
                condition=condition,
                reference=reference,
                layer=layer,
                component=number,
                row=row,
                score=score,
            )
