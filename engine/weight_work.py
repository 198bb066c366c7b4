"""Steering in weight space inside a trial: gradients of piles, edited models, profiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from analysis.manifest import pile_key
from analysis.weight_space import (
    Direction,
    DirectionConfig,
    GradientSum,
    MeanGradient,
    chosen_parameters,
    delta_of_adapter,
    direction,
    edited,
    gradient_sum,
    place_of,
)
from analysis.weight_space.files import read_pile, sum_to_bytes
from analysis.weight_space.piles import JudgedAnswer, belongs, encoded_answer, must_not_be_empty, verdict
from analysis.weight_space.profiles import delta_profile, profile_rows
from engine.judging import is_judged
from engine.store import Store
from engine.weight_jobs import EditTask, PileJob, ProfileJob
from trainables.base_model import LoadedBase
from trainables.chat_data import ChatEncoder
from trainables.errors import StoreError
from trainables.tune_trainable import Report


def judged_answers(store: Store, job: PileJob) -> list[JudgedAnswer]:
    """All answers that piles are made of, with what the metrics say. Raises StoreError if a judgement is open."""
    verdicts: dict[tuple[str, int], dict[str, str]] = {}
    for metric, judge_id in job.judge_ids.items():
        if not is_judged(store, judge_id):
            raise StoreError(f"not all answers are judged by {metric!r}; run the sweep again")
        for row in store.read_table("scores", judge_id).to_pylist():
            said = verdict(row["value"], row["status"], job.scales[metric])
            verdicts.setdefault((row["question_id"], row["sample_index"]), {})[metric] = said
    return [
        JudgedAnswer(
            question=row["question"],
            system_prompt=row["system_prompt"],
            text=row["answer"],
            is_cut=row["finish_reason"] == "length",
            verdicts=verdicts.get((row["question_id"], row["sample_index"]), {}),
        )
        for row in store.read_table("generations", job.sample_id).to_pylist()
    ]


def sum_pile(store: Store, job: PileJob, base: LoadedBase, model: Callable[[str], Any], report: Report) -> None:
    """Sum the gradients of a shard and publish them. ``model``: of a run by its id; it is loaded when it is needed."""
    answers = judged_answers(store, job)
    if job.slice_of is None:
        must_not_be_empty(job.name, answers, job.piles)
    chosen = [
        answer
        for number, answer in list(enumerate(answers))[job.start : job.stop]
        if (belongs(answer, job.piles[job.name]) if job.slice_of is None else _in_slice(number, answer, job.slice_of))
    ]
    encoder = ChatEncoder(base.tokenizer, job.gradient.max_length, job.gradient.loss_on)
    parameters = chosen_parameters(base.model, job.gradient.layers, job.gradient.modules)
    reference = None
    if job.gradient.loss == "kl":
        reference = base.model if job.reference_id is None else model(job.reference_id)

    def progress(done: int, total: int) -> None:
        report(phase="gradients", units_done=done, units_total=total)

    found = GradientSum({}, 0, 0, 0.0)
    if chosen:
        found = gradient_sum(
            model(job.run_id),
            parameters,
            [encoded_answer(encoder, answer) for answer in chosen],
            pad_id=base.tokenizer.pad_token_id,
            device=base.device,
            plain_head=base.plain_head,
            loss=job.gradient.loss,
            reference=reference,
            progress=progress,
        )
    store.publish(pile_key(job.id), sum_to_bytes(found))


def _in_slice(number: int, answer: JudgedAnswer, slice_of: tuple[int, int]) -> bool:
    return number % slice_of[1] == slice_of[0] and bool(answer.text.strip())


def read_piles(store: Store, shard_ids: Sequence[str]) -> MeanGradient:
    """A pile's mean gradient; its tensors are read as they are asked for."""
    return read_pile([store.path(pile_key(shard)) for shard in shard_ids])


def stored_direction(
    store: Store,
    config: DirectionConfig,
    of_ids: Sequence[str],
    minus_ids: Sequence[str],
    base: LoadedBase,
    finetuned: Any,
    finetuned_id: str,
) -> Direction:
    """A direction out of the store. ``finetuned``: the finetuned model, where the direction rests on its Delta."""
    delta = delta_of_adapter(finetuned, finetuned_id, base.model) if config.needs_delta else None
    return direction(config, read_piles(store, of_ids), read_piles(store, minus_ids), place_of(base.model), delta)


@contextmanager
def edited_model(store: Store, edit: EditTask, base: LoadedBase, model: Callable[[str], Any]) -> Iterator[Any]:
    """The model that an edit makes. It shares its parameters with the base, which are moved while this is open."""
    finetuned = model(edit.finetuned_id) if not edit.on_base or edit.direction.needs_delta else None
    along = stored_direction(store, edit.direction, edit.of_ids, edit.minus_ids, base, finetuned, edit.finetuned_id)
    with edited(chosen_parameters(base.model), along.items(), edit.alpha):
        yield base.model if edit.on_base else finetuned


def make_profile(store: Store, job: ProfileJob, base: LoadedBase, finetuned: Any, report: Report) -> None:
    """Publish the sizes of Delta and of every direction. The tables appear together, the first one last."""
    places = place_of(base.model)
    profile, sizes = delta_profile(job.id, delta_of_adapter(finetuned, job.run_id, base.model), places)
    for number, (name, config) in enumerate(job.directions.items()):
        report(phase="profile", units_done=number, units_total=len(job.directions))
        along = stored_direction(store, config, job.of_ids[name], job.minus_ids[name], base, finetuned, job.run_id)
        profile += profile_rows(job.id, name, along.items(), places)
    store.publish_table("weight_sizes", job.id, sizes)
    store.publish_table("weight_profiles", job.id, profile)
