"""Loss of a model on given answers: nothing is trained and nothing is added."""

from __future__ import annotations

import dataclasses
from typing import Literal

from analysis.losses import response_losses
from analysis.measurements.base import BaseMeasurement, Made, Shard


class LossMeasurement(BaseMeasurement):
    """Next-token loss over the response tokens of every row, with nothing else present."""

    tables = ("losses",)

    kind: Literal["losses"] = "losses"

    def measure(self, shard: Shard) -> Made:
        places = list(shard.rows)
        losses = response_losses(
            shard.base,
            shard.model,
            list(shard.rows.values()),
            measure_id=shard.measure_id,
            max_length=shard.max_length,
            progress=shard.progress,
        )
        return Made({"losses": [dataclasses.replace(row, row=places[row.row]) for row in losses]})
