"""The kinds of measurements. To add one, write its file and list its class in ``MeasurementConfig``."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from analysis.measurements.base import BaseMeasurement, Made, NamesData, Part, Shard
from analysis.measurements.gradients import GradientMeasurement
from analysis.measurements.losses import LossMeasurement
from analysis.measurements.prediction import PredictionMeasurement

MeasurementConfig: TypeAlias = Annotated[
    GradientMeasurement | LossMeasurement | PredictionMeasurement, Field(discriminator="kind")
]

__all__ = [
    "BaseMeasurement",
    "GradientMeasurement",
    "LossMeasurement",
    "Made",
    "MeasurementConfig",
    "NamesData",
    "Part",
    "PredictionMeasurement",
    "Shard",
]
