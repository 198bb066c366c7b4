"""``logistic``: the weights of a logistic regression between two files of answers."""

from __future__ import annotations

from pydantic import Field

from analysis.axes import INVERSE_PENALTY, Estimator, logistic_at
from analysis.vectors.axis import AxisVector, TwoSets


class Classes(TwoSets):
    """Two files, and how the weights between them are held."""

    inverse_penalty: float = Field(default=INVERSE_PENALTY, gt=0)
    """C of the regression: the larger, the less the weights are held near 0."""


class LogisticVector(AxisVector):
    """The direction of a classifier's weights."""

    logistic: Classes
    """The two files. Coordinates are standardised, a logistic regression is fitted (scikit-learn), and its weights are
    mapped back to activations."""

    def sets(self) -> TwoSets:
        return self.logistic

    def estimator(self) -> Estimator:
        return logistic_at(self.logistic.inverse_penalty)
