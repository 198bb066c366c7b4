"""The kinds of measurements. To add one, write its file and list its class in ``MeasurementConfig``."""

from __future__ import annotations

from typing import Annotated, TypeAlias, get_args

from pydantic import Field

from analysis.measurements.activation_changes import ActivationChangeMeasurement
from analysis.measurements.axis_synthetic import SyntheticAxes
from analysis.measurements.base import AnyMeasurement, BaseMeasurement, Made, NamesData, Part, Shard, Study
from analysis.measurements.cap_stability import CapStabilityMeasurement
from analysis.measurements.components import ComponentMeasurement
from analysis.measurements.drift import DriftMeasurement
from analysis.measurements.gradients import GradientMeasurement
from analysis.measurements.losses import LossMeasurement
from analysis.measurements.prediction import PredictionMeasurement
from analysis.measurements.projections import ProjectionMeasurement
from analysis.measurements.similarities import SimilarityMeasurement

ModelMeasurement: TypeAlias = (
    GradientMeasurement
    | LossMeasurement
    | PredictionMeasurement
    | SimilarityMeasurement
    | ComponentMeasurement
    | ProjectionMeasurement
    | ActivationChangeMeasurement
    | CapStabilityMeasurement
    | DriftMeasurement
)
"""Those that read a model on rows of data."""

MeasurementConfig: TypeAlias = Annotated[ModelMeasurement | SyntheticAxes, Field(discriminator="kind")]

STUDIES: frozenset[str] = frozenset(
    str(kind.model_fields["kind"].default)
    for kind in get_args(get_args(MeasurementConfig)[0])
    if issubclass(kind, Study)
)
"""The kinds that read no model, by name: a file with these alone needs no base."""

__all__ = [
    "STUDIES",
    "ActivationChangeMeasurement",
    "AnyMeasurement",
    "BaseMeasurement",
    "CapStabilityMeasurement",
    "ComponentMeasurement",
    "DriftMeasurement",
    "GradientMeasurement",
    "LossMeasurement",
    "Made",
    "MeasurementConfig",
    "ModelMeasurement",
    "NamesData",
    "Part",
    "PredictionMeasurement",
    "ProjectionMeasurement",
    "Shard",
    "SimilarityMeasurement",
    "Study",
    "SyntheticAxes",
]
