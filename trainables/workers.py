"""Several workers on one training: which micro-batches each of them does, and what they tell each other.

Each has the whole model, or at ZeRO stage 3 its part of it, and every row; of an optimizer step's micro-batches worker
r of n does number r, r + n, ... Randomness goes by the number of a micro-batch, so who does it has no say in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Workers:
    """This worker is number ``rank`` of ``size``; every worker must make the same calls in the same order."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def here() -> Workers:
        """What the process group says that a launcher (Ray Train) has made; one worker where there is none."""
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return Workers()
        return Workers(torch.distributed.get_rank(), torch.distributed.get_world_size())

    def own(self, num_micro_batches: int) -> Iterator[tuple[int, bool]]:
        """The micro-batches that this worker does, and whether each counts.

        All workers do as many, because the collectives of ZeRO wait for all: one with too few does one that another
        has already, and it does not count.
        """
        for first in range(0, num_micro_batches, self.size):
            index = first + self.rank
            yield (index, True) if index < num_micro_batches else (num_micro_batches - 1, False)

    def added(self, values: Sequence[float]) -> list[float]:
        """The sums over all workers, in float64; ``values`` themselves where there is one worker."""
        if self.size == 1 or not values:
            return list(values)
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(tensor)
        sums: list[float] = tensor.tolist()
        return sums

    def must_agree(self, values: Sequence[float], what: str) -> None:
        """Raise RuntimeError unless all workers have the same whole numbers: else they would go on, with gradients of
        other models.

        A checkpoint that one machine sees and another does not see yet is such a case; another attempt may go well.
        """
        here = list(values)
        if self.added(here) != [self.size * value for value in here]:  # at one worker at least, if they differ
            raise RuntimeError(f"workers differ in {what}: worker {self.rank} of {self.size} has {here}")

    def any(self, here: bool) -> bool:
        """Whether it is so at any worker: what clocks decide must be decided for all."""
        return self.added([float(here)])[0] > 0


ONE_WORKER = Workers()
