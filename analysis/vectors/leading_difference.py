"""``leading_difference``: the direction in which pairs of answers differ most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from analysis.axes import Estimator, leading_difference
from analysis.vectors.axis import AxisVector, TwoSets
from trainables.config import Path
from trainables.defenses import Message
from trainables.errors import Fault


class LeadingDifferenceVector(AxisVector):
    """The leading principal direction of paired differences."""

    leading_difference: TwoSets
    """The two files; row i of one belongs to row i of the other. The direction is the leading component, not centred,
    of the differences of their activations."""

    def sets(self) -> TwoSets:
        return self.leading_difference

    def estimator(self) -> Estimator:
        return leading_difference

    def chat_faults(self, rows: Mapping[Path, Sequence[Sequence[Message]]]) -> Iterable[Fault]:
        yield from super().chat_faults(rows)
        num_positive, num_negative = (len(rows[self.key(), name]) for name in ("positive", "negative"))
        if num_positive != num_negative:
            message = (
                f"has {num_negative} rows and positive has {num_positive}; pairs need as many of one as of the other"
            )
            yield Fault(f"{self.key()}.negative", message)
