"""Steering in weight space: gradients averaged over piles of answers become directions that weights are moved along.

Pure functions of one process; engine/ makes tasks of them. See docs/weight-space.md.
"""

from analysis.weight_space.delta import AdapterDelta, LowRank, delta_of_adapter
from analysis.weight_space.directions import Direction, DirectionConfig, direction
from analysis.weight_space.edits import edited
from analysis.weight_space.parameters import Place, chosen_parameters, place_of
from analysis.weight_space.pile_gradients import GradientSum, MeanGradient, gradient_sum

__all__ = [
    "AdapterDelta",
    "Direction",
    "DirectionConfig",
    "GradientSum",
    "LowRank",
    "MeanGradient",
    "Place",
    "chosen_parameters",
    "delta_of_adapter",
    "direction",
    "edited",
    "gradient_sum",
    "place_of",
]
