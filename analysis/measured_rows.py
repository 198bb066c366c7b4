"""Rows that measurements inside a model produce, declared as in trainables/rows.py: the fields are the columns.

Layers count the embedding as 0; layer l >= 1 is the output of decoder block l - 1, the last one before the final norm.
``vector`` is a name; its row of that layer is meant, at length 1 (written v^).
"""

from __future__ import annotations

from dataclasses import dataclass

from trainables.rows import column

_MEASURE_ID = "identity of the measuring task"
_ROW = "index of the row in the data file, from 0"
_CONDITION = "what was present in the forward pass; none: nothing"
_LAYER = "layer, counting the embedding as 0"
_VECTOR = "name of the vector compared with"


@dataclass(frozen=True, kw_only=True)
class GradientRow:
    """The gradient of the loss at one layer's output against one vector, for one row of a data file."""

    measure_id: str = column(_MEASURE_ID)
    row: int = column(_ROW)
    condition: str = column(_CONDITION)
    layer: int = column(_LAYER)
    vector: str = column(_VECTOR)
    num_tokens: int = column("measured tokens whose gradient is not exactly zero", "tokens")
    cosine: float | None = column(
        "mean over them of the cosine of dL/dh with the vector; negative: descent pushes activations along the vector; "
        "null: no token has a gradient"
    )
    positive_share: float | None = column("share of them whose cosine is above 0")
    gradient_norm: float = column(
        "mean over them of |dL/dh|, L summed over response tokens", "nats per unit of activation"
    )


@dataclass(frozen=True, kw_only=True)
class ProjectionRow:
    """The activations of one row of a data file along one vector."""

    measure_id: str = column(_MEASURE_ID)
    row: int = column(_ROW)
    condition: str = column(_CONDITION)
    layer: int = column(_LAYER)
    vector: str = column(_VECTOR)
    num_tokens: int = column("response tokens, with their end mark", "tokens")
    projection: float = column("mean over them of <h, v^>", "units of activation")
    activation_norm: float = column("mean over them of |h|", "units of activation")


@dataclass(frozen=True, kw_only=True)
class SimilarityRow:
    """The gradients of one row under two conditions against each other."""

    measure_id: str = column(_MEASURE_ID)
    row: int = column(_ROW)
    reference: str = column("the condition that the other one is compared with")
    condition: str = column(_CONDITION)
    layer: int = column(_LAYER)
    num_tokens: int = column("measured tokens whose gradient is not exactly zero under both", "tokens")
    cosine: float | None = column("mean over them of the cosine of the two gradients; null: there is none")


@dataclass(frozen=True, kw_only=True)
class ComponentRow:
    """One direction of what a condition changes about the gradient, against one vector (uncentred PCA)."""

    measure_id: str = column(_MEASURE_ID)
    condition: str = column("the condition whose change of the gradient is taken apart")
    reference: str = column("the condition that it is the change from")
    layer: int = column(_LAYER)
    component: int = column("1: the principal direction that explains most, and so on; 0: the mean change itself")
    num_rows: int = column("rows of the data that the directions are made of")
    variance: float | None = column("eigenvalue of D^T D / (N - 1), |D| = 1; null for the mean change")
    explained: float | None = column("its share of the sum of all; null for the mean change")
    cumulative: float | None = column("share of this and all earlier ones; null for the mean change")
    vector: str = column(_VECTOR)
    cosine: float = column("cosine of the direction with the vector; signs are such that the axis has none below 0")


@dataclass(frozen=True, kw_only=True)
class ComponentScoreRow:
    """How much of one direction is in one row's change of the gradient."""

    measure_id: str = column(_MEASURE_ID)
    condition: str = column("the condition whose change of the gradient is taken apart")
    reference: str = column("the condition that it is the change from")
    layer: int = column(_LAYER)
    component: int = column("number of the principal direction, from 1")
    row: int = column(_ROW)
    score: float = column("<d / |D|, u> of the row's change d and the direction u")


@dataclass(frozen=True, kw_only=True)
class ActivationChangeRow:
    """What ONE gradient step on one row does to that row's activations, against the gradient before it."""

    measure_id: str = column(_MEASURE_ID)
    row: int = column(_ROW)
    condition: str = column("what was present in the step; the activations are read without it")
    parameters: str = column("what the step moved: full (all parameters) or lora (an adapter)")
    layer: int = column(_LAYER)
    vector: str = column(_VECTOR)
    num_tokens: int = column("measured tokens with a gradient in the step and a change after it", "tokens")
    step_norm: float = column("|dtheta|, L2 over all moved parameters")
    learning_rate: float = column("the eta of that step: dtheta = - eta dL/dtheta")
    relative_change: float | None = column("mean over tokens of |dh| / |h|")
    change_cosine: float | None = column("mean over tokens of the cosine of dh with the vector")
    gradient_cosine: float | None = column("mean over tokens of the cosine of g = dL/dh of the step with the vector")
    change_gradient_cosine: float | None = column("mean over tokens of the cosine of dh with g; descent: negative")


@dataclass(frozen=True, kw_only=True)
class PredictionRow:
    """What is foreseen of one candidate defense at one layer, before any training with it."""

    measure_id: str = column(_MEASURE_ID)
    condition: str = column("the candidate defense")
    layer: int = column(_LAYER)
    vector: str = column("name of the trait's vector: the direction that the cosine is taken along")
    num_rows: int = column("rows of the data with a value under both conditions")
    cosine_without: float = column("mean over rows of the gradient's cosine with the vector, nothing present")
    cosine_with: float = column("the same with the candidate present")
    shift: float = column("cosine_with - cosine_without; positive: less amplification of the trait is foreseen")
    shift_error: float | None = column("standard error of the shift over rows; null for one row")
    flipped_share: float = column("share of rows whose cosine is below 0 without and above 0 with the candidate")
    loss_without: float = column("mean over rows of the loss, nothing present", "nats/token")
    loss_with: float = column("the same with the candidate present", "nats/token")
    loss_gap: float = column("loss_without - loss_with; positive: the candidate explains the data", "nats/token")
    projection_difference: float | None = column(
        "data minus the base's own answers along the candidate's vector; null: not measured or no vector",
        "units of activation",
    )


_NOISE = "standard deviation of the noise that is added to every coordinate"
_NUM_ROWS = "rows of each of the two sets"
_ESTIMATOR = "how the direction was found, see analysis/axes.py"


@dataclass(frozen=True, kw_only=True)
class AxisAlignmentRow:
    """One estimate of a known axis from one synthetic draw."""

    measure_id: str = column(_MEASURE_ID)
    estimator: str = column(_ESTIMATOR)
    noise: float = column(_NOISE, "units of activation")
    num_rows: int = column(_NUM_ROWS)
    seed: int = column("of the draw")
    alignment: float = column("cosine of the estimated direction with the known axis")


@dataclass(frozen=True, kw_only=True)
class AxisSummaryRow:
    """How near one estimator comes to the axis, over seeds."""

    measure_id: str = column(_MEASURE_ID)
    estimator: str = column(_ESTIMATOR)
    noise: float = column(_NOISE, "units of activation")
    num_rows: int = column(_NUM_ROWS)
    num_seeds: int = column("draws")
    alignment: float = column("mean over seeds of the cosine with the known axis")
    alignment_low: float | None = column("lower end of its 95 % bootstrap interval; null with one seed")
    alignment_high: float | None = column("upper end of its 95 % bootstrap interval; null with one seed")
    expected: float | None = column("closed form to first order; null for other estimators than the mean difference")


@dataclass(frozen=True, kw_only=True)
class CapStabilityRow:
    """A ceiling that is calibrated on some rows of the data and read on the others; see analysis/cap_stability.py."""

    measure_id: str = column(_MEASURE_ID)
    vector: str = column("name of the vector: the axis, and the direction of the attack")
    layer: int = column(_LAYER)
    num_rows: int = column("rows of the data that a ceiling is calibrated on; the others are held out")
    shift: float = column("standard deviation of the noise on activations, in units of reference_sd")
    strength: float = column("coefficient of the steering attack")
    num_draws: int = column("draws of the rows")
    ceiling: float = column("mean over draws of the ceiling", "units of activation")
    ceiling_sd: float | None = column("its standard deviation over draws; null with one", "units of activation")
    reference_sd: float = column("standard deviation of all projections of the data", "units of activation")
    kept: float = column("mean over draws of the share of held-out tokens that the cap leaves as they are")
    caught: float = column("mean over draws of the share of attacked tokens that it takes something away from")
    f1: float = column("mean over draws of the harmonic mean of the two")
    f1_low: float = column("2.5th percentile of it over draws")
    f1_high: float = column("97.5th percentile of it over draws")


@dataclass(frozen=True, kw_only=True)
class DriftRow:
    """How far the mean response activation of all rows lies from a place; see analysis/drift.py."""

    measure_id: str = column(_MEASURE_ID)
    condition: str = column("what was present; none: nothing")
    layer: int = column(_LAYER)
    center: str = column("name of the vector that is the place")
    num_rows: int = column("rows of the data")
    num_tokens: int = column("their response tokens, over which the mean is")
    drift: float = column("1 - cosine of the mean activation of these rows and the place")
    drift_estimate: float | None = column(
        "what it would be over all rows such as these: less, as a mean of few rows lies off in every direction; null "
        "with fewer than 3 rows, or where they scatter too much"
    )
    drift_estimate_low: float | None = column("lower end of its 95 % interval over rows")
    drift_estimate_high: float | None = column("upper end")


@dataclass(frozen=True, kw_only=True)
class AxisTestRow:
    """Two estimators against each other on the same draws."""

    measure_id: str = column(_MEASURE_ID)
    noise: float = column(_NOISE, "units of activation")
    num_rows: int = column(_NUM_ROWS)
    first: str = column(_ESTIMATOR)
    second: str = column("the estimator that it is compared with")
    num_seeds: int = column("draws")
    difference: float = column("mean alignment of the first minus that of the second")
    cohens_d: float | None = column("difference over the pooled standard deviation; null: neither varies")
    p_sign_flip: float = column("p of the paired permutation test over seeds, two-sided")
    p_t: float | None = column("p of the paired t test, two-sided; null where it has none")
