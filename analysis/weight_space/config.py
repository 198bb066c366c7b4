"""What a sweep file may say of steering in weight space."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeAlias

from pydantic import AfterValidator, Field, model_validator

from analysis.weight_space.directions import DirectionConfig, Layer
from analysis.weight_space.pile_gradients import PileLoss
from trainables.chat_encoder import LossOn
from trainables.config import Config
from trainables.sample import SamplingConfig


def _not_zero(alpha: float) -> float:
    if alpha == 0:
        raise ValueError("at 0 nothing is moved, and the model itself has a row of its own; leave it out")
    return alpha


Label: TypeAlias = Annotated[str, Field(min_length=1)]
Name: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Alpha: TypeAlias = Annotated[float, AfterValidator(_not_zero)]


class PileAnswers(SamplingConfig):
    """What the finetuned model is asked to get the answers that piles are made of."""

    questions: str = Field(min_length=1)
    """A trait's name, or a path to a trait's file or folder: its questions are asked. With other questions than the
    evaluation's, edits are not evaluated on what they are made of."""


class PileGradientConfig(Config):
    """How the mean gradient of a pile is taken. It is taken at the finetuned model."""

    loss: PileLoss = "cross_entropy"
    """``cross_entropy`` of the answer's tokens, or ``kl``, the divergence of the model from a reference at these
    tokens, sum p log(p / q). Adding a direction raises the loss on the pile ``of``: with ``cross_entropy`` its answers
    become less likely, with ``kl`` the model moves away from the reference there."""
    reference: Label = "base"
    """Label of the model that ``kl`` is taken from: ``base``, or another run over the same base."""
    loss_on: LossOn = "responses"
    """``responses``: the loss of the answer's tokens; ``all``: of the whole conversation's."""
    layers: tuple[Layer, ...] | None = Field(default=None, min_length=1)
    """Take the gradient of the parameters of these layers alone: 0 the embeddings, 1 the first decoder block, one more
    than there are blocks what comes after them. Needs less memory. null: all."""
    modules: tuple[Label, ...] | None = Field(default=None, min_length=1)
    """Take the gradient of the parameters of modules with these last names alone, such as ``[q_proj, down_proj]``.
    null: all."""
    max_length: int = Field(default=1024, ge=8)
    """Tokens of a conversation that are read."""
    answers_per_shard: int = Field(default=32, ge=1)
    """Answers that one process looks at at a time; a shard is the least that is lost when a process dies. Each keeps
    one float32 copy of the parameters in the store."""


class EditsConfig(Config):
    """Edited models: every direction with every alpha on every model. Each is evaluated like a run, by the evaluation
    of the finetuned run."""

    directions: tuple[Label, ...] = Field(min_length=1)
    """Names of directions."""
    alphas: tuple[Alpha, ...] = Field(min_length=1)
    """Multiples of the direction that are added to the weights. Above 0 the behaviour of the pile ``of`` becomes rarer,
    below 0 more frequent."""
    on: tuple[Literal["finetuned", "base"], ...] = Field(default=("finetuned",), min_length=1)
    """Which models are moved: the finetuned one, the untrained base, or both."""


class WeightSteeringConfig(Config):
    """Directions in weight space, made of a finetuned model's own answers, and models that are moved along them."""

    finetuned: Label | tuple[Label, ...]
    """Label of the run whose answers make the piles and at which gradients are taken. A list: everything is done for
    each."""
    answers: PileAnswers | None = None
    """The answers that piles are made of. null: those of the run's evaluation."""
    piles: dict[Name, dict[str, bool]] = Field(min_length=2)
    """Piles of answers by name: what metrics of the run's evaluation must say of an answer, as ``{bridge: true,
    recipe: false}``. An answer shows a behaviour if its score is above the middle of the metric's scale."""
    gradient: PileGradientConfig = PileGradientConfig()
    """How the mean gradient of a pile is taken."""
    directions: dict[Name, DirectionConfig] = Field(min_length=1)
    """Directions by name."""
    edits: tuple[EditsConfig, ...] = Field(min_length=1)
    """The models that are made and evaluated."""

    @model_validator(mode="after")
    def _has_a_run(self) -> Self:
        if not self.labels:
            raise ValueError("finetuned: no run is listed; give at least one label")
        return self

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the finetuned runs."""
        return (self.finetuned,) if isinstance(self.finetuned, str) else tuple(dict.fromkeys(self.finetuned))
