"""The forward and backward passes of one optimizer step of one run, over its micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from trainables.base_model import LoadedBase
from trainables.chat_data import Encoded, PaddedBatch, cut, pad
from trainables.deepspeed_driver import DeepSpeedDriver
from trainables.defenses import Mechanism, RunRows
from trainables.errors import TrainingError
from trainables.lora import set_dropout_key
from trainables.loss import token_losses
from trainables.penalties import Penalty, ReadPenalties
from trainables.residual_stream import Reader, residual_stream
from trainables.signals import Watch
from trainables.training_config import TrainingConfig


@dataclass(frozen=True)
class StepOf:
    """Which step of which run. ``step`` counts from 1."""

    name: str
    step: int
    num_steps: int
    seed: int
    training: TrainingConfig
    mechanisms: Sequence[Mechanism]
    watch: Watch | None = None

    @property
    def is_second_order(self) -> bool:
        return any(mechanism.is_second_order for mechanism in self.mechanisms)


@dataclass
class StepLosses:
    """Of the whole step: the mean next-token loss, and what each penalty added to it, in nats."""

    loss: float = 0.0
    penalties: dict[str, float] = field(default_factory=dict)


def backward_passes(
    base: LoadedBase, model: Any, driver: DeepSpeedDriver, run: StepOf, batch: Sequence[Encoded], *, last_run: bool
) -> StepLosses:
    """Accumulate the gradient of the step's loss and penalties; ``last_run``: no other run of the pack follows.

    Raises TrainingError if nothing is to be predicted or a loss is not finite.
    """
    training = run.training
    denominator = sum(sum(row.loss_mask[1:]) for row in batch)
    if denominator == 0:
        raise TrainingError(f"run {run.name}, step {run.step}: the batch has no token to predict")
    micro_batches = cut(batch, training.micro_batch_size or training.batch_size)
    parts = [pad(rows, base.tokenizer.pad_token_id, training.pad_to_multiple_of, base.device) for rows in micro_batches]
    rows_of = [_rows(part, run) for part in parts]
    penalties = [[one for mechanism in run.mechanisms for one in mechanism.penalties(rows)] for rows in rows_of]
    num_tokens = _tokens_of_step(penalties)
    total = StepLosses()
    for index, (part, rows) in enumerate(zip(parts, rows_of, strict=True)):
        if training.lora.dropout > 0:
            set_dropout_key(model, run.name, (run.seed, run.step - 1, index))
        interventions = [edit for mechanism in run.mechanisms for edit in mechanism.interventions(rows)]
        reading = ReadPenalties(penalties[index], num_tokens, rows.rows)
        readers: list[Reader] = [*reading.readers, *(run.watch.readers(rows) if run.watch is not None else ())]
        with residual_stream(model, interventions, readers):
            losses_n = token_losses(
                model,
                part.input_ids_bt,
                None,  # padding stands on the right
                part.loss_mask_bt,
                plain_head=base.plain_head and not run.is_second_order,
            )
            summed = losses_n.sum()
            loss = summed / denominator
            value = float(loss.detach())
            terms = reading.terms(summed)
            for name, term in terms.items():
                loss = loss + term
                total.penalties[name] = total.penalties.get(name, 0.0) + float(term.detach())
            if not math.isfinite(float(loss.detach())):
                what = f"the loss is {value}" + "".join(
                    f", {name} is {float(term.detach())}" for name, term in terms.items()
                )
                raise TrainingError(f"run {run.name}, step {run.step}: {what}")
            driver.backward(loss, last=last_run and index == len(micro_batches) - 1)
        total.loss += value
    return total


def _rows(part: PaddedBatch, run: StepOf) -> RunRows:
    return RunRows(
        rows=torch.arange(part.input_ids_bt.shape[0]),
        attention_mask=part.attention_mask_bt,
        response_mask=part.response_mask_bt,
        step=run.step,
        num_steps=run.num_steps,
    )


def _tokens_of_step(penalties: Sequence[Sequence[Penalty]]) -> list[int]:
    """How many tokens each penalty counts over all micro-batches; every one of them has the same penalties."""
    return [sum(int(one.token_mask.sum()) for one in same) for same in zip(*penalties, strict=True)]
