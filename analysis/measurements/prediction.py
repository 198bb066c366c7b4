"""Which candidate defenses are foreseen to keep a trait away, before any training: see analysis/predictions.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal

import pandas as pd
import torch
from pydantic import Field

from analysis.gradients import gradient_rows
from analysis.measured_rows import GradientRow
from analysis.measurements.base import BaseMeasurement, Made, Part, Shard
from analysis.measurements.conditions import (
    ConditionConfig,
    all_conditions,
    condition_faults,
    condition_key,
    condition_names,
)
from analysis.measurements.under_conditions import read_layers, readout_faults
from analysis.predictions import prediction_rows
from analysis.projections import projection_differences, projection_rows, with_answers
from analysis.rows import NO_CONDITION, LossRow
from trainables.config import AddedLater, NamesVector, Path, VectorName
from trainables.defenses import Message
from trainables.errors import DataError
from trainables.model_parts import decoder_layers
from trainables.sample import Question, SamplingConfig, sample_answers
from trainables.shapes import ModelShape, VectorShape

OWN_ANSWERS = "own answers"
"""Condition under which the projections of the base's own answers stand in the table ``projections``."""


class PredictionMeasurement(BaseMeasurement):
    """For every candidate how much it shifts the cosine of the gradient along the trait's vector, with the loss gap
    and, if asked for, the projection difference beside it. Candidates are ranked before anything is trained."""

    tables = ("gradients", "losses", "projections")
    merged_tables = ("predictions",)

    kind: Literal["prediction"] = "prediction"
    trait: VectorName
    """The vector of the trait that the data teaches: cosines are taken along it."""
    candidates: tuple[ConditionConfig, ...] = Field(min_length=1)
    """Defenses to choose among, each written as a defense of a run; ``{grid: [...]}`` in place of a value makes a
    candidate of each."""
    vectors: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], NamesVector(), AddedLater()] = ()
    """Further vectors that the gradient is compared with, such as a random one as a control; not used to predict."""
    layers: tuple[int, ...] | Literal["all"] = "all"
    """Where the gradient is read. ``all``: 1 to the last."""
    own_answer_tokens: int = Field(default=0, ge=0)
    """Length of the model's own greedy answer to each row's question, for the projection difference: data minus own
    answer along a candidate's vector. 0: none is sampled and there is no such column."""
    metric: str | None = Field(default=None, min_length=1)
    """The metric of the evaluation that shows the trait; outcomes of runs are compared by it. null: the first
    by name."""

    def faults(self, model: ModelShape, vectors: Mapping[str, VectorShape]) -> Iterable[tuple[Path, str]]:
        for path, message in readout_faults(self.layers, (*self.vectors, self.trait), model, vectors):
            yield (("trait",) if path == ("vectors", len(self.vectors)) else path), message
        for path, message in condition_faults(self.candidates, model, vectors):
            yield ("candidates", *path), message

    def forwards_per_row(self, model: ModelShape) -> int:
        del model
        return 1 + len(self.candidates) + (2 if self.own_answer_tokens else 0)

    def names(self, vectors: Mapping[str, str], banks: Mapping[tuple[str, ...], str]) -> dict[str, str]:
        return dict(vectors) | condition_names(self.candidates, vectors, banks)

    def measure(self, shard: Shard) -> Made:
        made: dict[str, list[object]] = {"gradients": [], "losses": [], "projections": []}
        rows = gradient_rows(
            shard.base,
            shard.model,
            list(shard.rows.values()),
            all_conditions(self.candidates, shard.vectors),
            {vector: shard.vectors[vector] for vector in (self.trait, *self.vectors)},
            read_layers(self.layers, len(decoder_layers(shard.base.model))),
            measure_id=shard.measure_id,
            max_length=shard.max_length,
            row_numbers=list(shard.rows),
            progress=shard.progress,
        )
        for row in rows:
            assert isinstance(row, GradientRow | LossRow)
            made["losses" if isinstance(row, LossRow) else "gradients"].append(row)
        if self.own_answer_tokens and self._places():
            made["projections"] = list(self._projections(shard))
        return Made(made)

    def _places(self) -> dict[str, tuple[str, int]]:
        """Candidate -> its vector and the layer that it is added at, of those that have one of each."""
        places = {}
        for config in self.candidates:
            vector, layer = getattr(config, "vector", None), getattr(config, "layer", None)
            if isinstance(vector, str) and isinstance(layer, int):
                places[condition_key(config)] = (vector, layer)
        return places

    def _projections(self, shard: Shard) -> Iterable[object]:
        places = self._places().values()
        rows = list(shard.rows.values())
        config = SamplingConfig(samples=1, temperature=0.0, max_new_tokens=self.own_answer_tokens)
        questions = [Question(str(number), _question(row, number)) for number, row in shard.rows.items()]
        answers = sample_answers(
            shard.model,
            shard.base.tokenizer,
            questions,
            config,
            sample_id=shard.measure_id,
            noise_key=shard.measure_id,
        )
        own = with_answers(rows, [answer.answer.strip() or "." for batch in answers for answer in batch])
        for name, texts in ((NO_CONDITION, rows), (OWN_ANSWERS, own)):
            for row in projection_rows(
                shard.base,
                shard.model,
                texts,
                {vector: shard.vectors[vector] for vector in dict.fromkeys(vector for vector, _ in places)},
                sorted({layer for _, layer in places}),
                measure_id=shard.measure_id,
                max_length=shard.max_length,
                row_numbers=list(shard.rows),
            ):
                yield dataclasses.replace(row, condition=name)

    def merge(self, measure_id: str, parts: Sequence[Part], vectors: Mapping[str, torch.Tensor]) -> Made:
        del vectors
        gradients, losses, projections = (
            pd.concat([part.tables[name] for part in parts], ignore_index=True) for name in self.tables
        )
        differences = None
        if len(projections):
            data, own = (projections[projections["condition"] == name] for name in (NO_CONDITION, OWN_ANSWERS))
            differences = projection_differences(data, own)
        rows = prediction_rows(
            gradients,
            losses,
            trait=self.trait,
            measure_id=measure_id,
            places=self._places(),
            differences=differences,
        )
        return Made({"predictions": list(rows)})


def _question(messages: Sequence[Message], row: int) -> str:
    """What a row asks. Raises DataError for more than one question with one answer."""
    if [message["role"] for message in messages] != ["user", "assistant"]:
        raise DataError(
            f"row {row + 1}: own answers need rows of one question and one answer; set own_answer_tokens to 0"
        )
    return messages[0]["content"]
