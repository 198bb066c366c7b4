"""Tasks of steering in weight space: shards of piles' gradients, edits of weights, and profiles of both.

Plain data that pickles, as in engine/tasks.py, which knows these as jobs of the one graph.
"""

from __future__ import annotations

from typing import Any

from analysis.manifest import pile_key
from analysis.tables import table_key
from analysis.weight_space.config import PileGradientConfig
from analysis.weight_space.directions import DirectionConfig
from engine.jobs import StoredJob
from trainables.base_model import ResolvedBase
from trainables.config import Config, recipe_of

PILE_SEMANTICS = 1
EDIT_SEMANTICS = 1
PROFILE_SEMANTICS = 1
PROFILE_TABLES = ("weight_profiles", "weight_sizes")


class PileJob(StoredJob):
    """Sums the gradients of one shard of a pile: of those of some answers of a finetuned run that belong to it."""

    id: str
    label: str
    name: str  # of the pile
    base: ResolvedBase
    run_id: str  # of the finetuned run
    sample_id: str
    judge_ids: dict[str, str]  # metric -> judging task, of all metrics that piles are made by
    scales: dict[str, tuple[float, float]]  # of these metrics
    piles: dict[str, dict[str, bool]]  # all piles of the run: an empty one is told beside the others
    start: int  # the answers that are looked at, in the order of the table
    stop: int
    gradient: PileGradientConfig
    reference_id: str | None  # run that KL is taken from; None: the base
    slice_of: tuple[int, int] | None = None  # smoke: every so-manieth answer is in, whatever judges say

    @staticmethod
    def identity(
        run_id: str,
        sample_id: str,
        judge_ids: dict[str, str],
        where: dict[str, bool],
        part: tuple[int, int],
        gradient: PileGradientConfig,
        reference: str | None,
        slice_of: tuple[int, int] | None,
    ) -> dict[str, Any]:
        """``judge_ids``: of the metrics in ``where``. ``reference``: what KL is taken from, if it is taken."""
        how = {name: value for name, value in recipe_of(gradient).items() if name not in _NOT_IN_RECIPE}
        recipe = {
            "kind": "weights/pile",
            "semantics": PILE_SEMANTICS,
            "run": run_id,
            "sample": sample_id,
            "judged": {metric: judge_ids[metric] for metric in where},
            "where": where,
            "answers": list(part),
            "gradient": how | {"reference": reference},
        }
        return recipe if slice_of is None else recipe | {"slice": list(slice_of)}

    @property
    def parents(self) -> tuple[str, ...]:
        return (self.run_id, *((self.reference_id,) if self.reference_id is not None else ()))

    def tasks(self) -> tuple[tuple[str, str], ...]:
        """Ids of what the job does, each with the key of what it makes."""
        return ((self.id, pile_key(self.id)),)


_NOT_IN_RECIPE = ("reference", "answers_per_shard")  # the recipe holds what comes of them


class EditTask(Config):
    """theta + alpha V: which model is moved, and along what."""

    finetuned_id: str
    on_base: bool
    alpha: float
    direction: DirectionConfig
    of_ids: tuple[str, ...]  # shards of the two piles
    minus_ids: tuple[str, ...]

    def identity(self, base_id: str) -> dict[str, Any]:
        """``base_id``: of the untrained base."""
        return {
            "kind": "weights/edit",
            "semantics": EDIT_SEMANTICS,
            "of": base_id if self.on_base else self.finetuned_id,
            "alpha": self.alpha,
            "direction": direction_recipe(self.direction, self.of_ids, self.minus_ids, self.finetuned_id),
        }

    @property
    def parents(self) -> tuple[str, ...]:
        return (self.finetuned_id, *dict.fromkeys((*self.of_ids, *self.minus_ids)))


class ProfileJob(StoredJob):
    """Sizes, by layer and module, of what a finetuning changed and of the directions of its piles."""

    id: str
    label: str
    base: ResolvedBase
    run_id: str
    directions: dict[str, DirectionConfig]  # by the id that the table calls them
    of_ids: dict[str, tuple[str, ...]]  # by the same
    minus_ids: dict[str, tuple[str, ...]]

    @staticmethod
    def identity(run_id: str, directions: list[str]) -> dict[str, Any]:
        """``directions``: their ids."""
        recipe = {"kind": "weights/profile", "semantics": PROFILE_SEMANTICS, "run": run_id}
        return recipe | {"directions": directions}

    @property
    def parents(self) -> tuple[str, ...]:
        shards = [shard for ids in (*self.of_ids.values(), *self.minus_ids.values()) for shard in ids]
        return (self.run_id, *dict.fromkeys(shards))

    def tasks(self) -> tuple[tuple[str, str], ...]:
        return tuple((self.id, table_key(table, self.id)) for table in PROFILE_TABLES)


def direction_recipe(
    config: DirectionConfig, of_ids: tuple[str, ...], minus_ids: tuple[str, ...], finetuned_id: str
) -> dict[str, Any]:
    """Everything that can change a direction; the names of its piles are not in it."""
    how = {name: value for name, value in recipe_of(config).items() if name not in ("of", "minus")}
    delta = finetuned_id if config.needs_delta else None
    return how | {"of": list(of_ids), "minus": list(minus_ids), "delta": delta}
