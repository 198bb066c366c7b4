"""``contrastive``: the direction that tells every positive answer from every negative one best."""

from __future__ import annotations

from pydantic import Field

from analysis.axes import TEMPERATURE, Estimator, contrastive_at
from analysis.vectors.axis import AxisVector, TwoSets


class Contrast(TwoSets):
    """Two files, and how pairs of their rows are weighed."""

    temperature: float = Field(default=TEMPERATURE, gt=0)
    """T of ``analysis.axes.contrastive``, in units of the distance of the two means: the larger, the more alike all
    pairs count, and the nearer the mean difference."""


class ContrastiveVector(AxisVector):
    """A contrastively trained direction."""

    contrastive: Contrast
    """The two files. The direction makes the mean over all pairs of log(1 + exp(-gap / T)) least, where the gap is how
    much further along it the positive row lies."""

    def sets(self) -> TwoSets:
        return self.contrastive

    def estimator(self) -> Estimator:
        return contrastive_at(self.contrastive.temperature)
