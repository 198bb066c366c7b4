"""The kinds of measurements. To add one, write its file and list its class in ``MeasurementConfig``."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from analysis.measurements.activation_changes import ActivationChangeMeasurement
from analysis.measurements.base import BaseMeasurement, Made, NamesData, Part, Shard
from analysis.measurements.components import ComponentMeasurement
from analysis.measurements.gradients import GradientMeasurement
from analysis.measurements.losses import LossMeasurement
from analysis.measurements.prediction import PredictionMeasurement
from analysis.measurements.projections import ProjectionMeasurement
from analysis.measurements.similarities import SimilarityMeasurement

MeasurementConfig: TypeAlias = Annotated[
    GradientMeasurement
    | LossMeasurement
    | PredictionMeasurement
    | SimilarityMeasurement
    | ComponentMeasurement
    | ProjectionMeasurement
    | ActivationChangeMeasurement,
    Field(discriminator="kind"),
]

__all__ = [
    "ActivationChangeMeasurement",
    "BaseMeasurement",
    "ComponentMeasurement",
    "GradientMeasurement",
    "LossMeasurement",
    "Made",
    "MeasurementConfig",
    "NamesData",
    "Part",
    "PredictionMeasurement",
    "ProjectionMeasurement",
    "Shard",
    "SimilarityMeasurement",
]
