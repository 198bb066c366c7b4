"""Measurements of a sweep: what is refused, what they become, what their identity is made of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from analysis.measurements import GradientMeasurement
from engine.measure_jobs import MeasureJob
from engine.measure_tasks import chosen_rows
from engine.prepare import Prepared
from engine.tasks import Job, RunJob, VectorJob
from tests.engine.tiny_prepare import TinySweep, tiny_model_folder
from trainables.errors import ConfigError

BEFORE: dict[str, Any] = {
    "kind": "gradients",
    "vectors": ["topic", "random"],
    "layers": [2, 4],
    "rows_per_shard": 3,
    "samples": 5,
    "conditions": [
        {"kind": "pps", "vector": {"grid": ["topic", "random"]}, "layer": 2, "coefficient": {"grid": [0.5, 1.5]}},
        {"kind": "inoculation", "prompts": "topic"},
        {"kind": "steering", "vector": "topic", "coefficient": 1.0},
    ],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory)


@pytest.fixture
def sweep(tmp_path: Path, model: Path) -> TinySweep:
    sweep = TinySweep(tmp_path / "a sweep", model)
    sweep.raw["runs"] = sweep.raw["runs"][:2]
    sweep.raw["measure"] = {"before": dict(BEFORE), "after": {"kind": "losses", "on": "both"}}
    return sweep


@pytest.fixture
def without_runs(sweep: TinySweep) -> TinySweep:
    for name in ("runs", "training", "evaluation"):
        del sweep.raw[name]
    sweep.raw["measure"] = {"before": dict(BEFORE)}
    return sweep


def shards(prepared: Prepared) -> list[MeasureJob]:
    return [job for job in prepared.jobs.values() if isinstance(job, MeasureJob)]


def shard_ids(prepared: Prepared, name: str = "before") -> list[str]:
    return [job.id for job in shards(prepared) if job.name == name]


class TestFaults:
    def test_all_are_found_at_once_under_the_keys_of_the_user(self, sweep: TinySweep) -> None:
        sweep.raw["measure"]["before"] |= {
            "vectors": ["topc", "random", "random"],
            "layers": [2, 9],
            "conditions": [
                {"kind": "inoculation", "prompts": "topic"},
                {"kind": "pps", "vector": "topic", "layer": {"grid": [2, 7, 8]}, "coefficient": 1.0},
                {"kind": "steering", "vector": "nobody", "coefficient": 1.0},
                {"kind": "inoculation", "prompts": "no trait"},
            ],
        }
        sweep.raw["measure"]["after"] |= {"on": ["none", "nine"], "data": "nowhere.jsonl"}
        with pytest.raises(ConfigError) as caught:
            sweep.prepare()
        found = {(fault.key, fault.message.partition(";")[0]) for fault in caught.value.faults}
        assert found == {
            ("measure.before.vectors[0]", "no vector 'topc'"),
            ("measure.before.vectors[2]", "'random' is listed twice"),
            ("measure.before.layers[1]", "layer 9 does not exist"),
            ("measure.before.conditions[1].layer", "layer 7 does not exist"),
            ("measure.before.conditions[1].layer", "layer 8 does not exist"),
            ("measure.before.conditions[2].vector", "no vector 'nobody'"),
            ("measure.before.conditions[3].prompts", "no trait 'no trait' and no bank of that name"),
            ("measure.after.on[1]", "no run 'nine'"),
            ("measure.after.data", "no file 'nowhere.jsonl'"),
        }

    @pytest.mark.parametrize(
        ("change", "key", "said"),
        [
            ({"kind": "gradient"}, "measure.before.kind", "did you mean gradients?"),
            ({"sampels": 3}, "measure.before.sampels", "did you mean samples?"),
            ({"vectors": []}, "measure.before.vectors", "must not be empty"),
            ({"layers": []}, "measure.before.layers", "must not be empty"),
            ({"on": "bases"}, "measure.before.on", "did you mean base?"),
            ({"samples": 0}, "measure.before.samples", "must be at least 1"),
            ({"layers": {"grid": [1, 2]}}, "measure.before.layers", "a grid stands only in"),
            ({"conditions": [{"kind": "stering"}]}, "measure.before.conditions[0].kind", "did you mean steering?"),
            (
                {"conditions": [{"kind": "pps", "vector": "topic", "layer": {"grid": []}, "coefficient": 1}]},
                "measure.before.conditions[0].layer",
                "the grid is empty",
            ),
            (
                {"conditions": [{"kind": "steering", "vector": "topic", "coefficient": {"grid": [1, 1]}}]},
                "measure.before.conditions[0]",
                "stands twice",
            ),
        ],
    )
    def test_one(self, sweep: TinySweep, change: dict[str, Any], key: str, said: str) -> None:
        sweep.raw["measure"]["before"] |= change
        faults = sweep.faults()
        assert said in faults[key], faults
        assert set(faults) == {key}

    @pytest.mark.parametrize("on", ["base", "runs", ["none"]])
    def test_layers_are_checked_where_no_run_is_sound(self, sweep: TinySweep, on: object) -> None:
        sweep.raw["measure"] = {"before": {**BEFORE, "layers": [2, 9], "on": on}}
        sweep.raw["training"]["bach_size"] = 4
        faults = sweep.faults()
        assert set(faults) == {"training.bach_size", "measure.before.layers[1]"}
        del sweep.raw["training"]["bach_size"]
        sweep.raw["data"]["train"] = "nowhere.jsonl"
        assert set(sweep.faults()) == {"data.train", "measure.before.layers[1]"}

    def test_a_file_that_only_measures_says_nothing_about_runs(self, without_runs: TinySweep) -> None:
        without_runs.raw |= {"training": {"epochs": 1}, "base": {"model": "nowhere", "dtyp": "float32"}}
        faults = without_runs.faults()
        assert set(faults) == {"training", "base.dtyp", "base.model"}

    def test_a_file_without_runs_and_measurements_is_no_sweep(self, without_runs: TinySweep) -> None:
        del without_runs.raw["measure"]
        assert without_runs.faults()["runs"] == "missing, and it has no default"

    def test_runs_cannot_be_measured_where_there_are_none(self, without_runs: TinySweep) -> None:
        without_runs.raw["measure"]["before"]["on"] = "runs"
        assert without_runs.faults() == {"measure.before.on": "the file has no runs; write base"}


class TestGraph:
    def test_a_base_is_measured_beside_trainings_and_a_run_after_its_own(self, sweep: TinySweep) -> None:
        prepared = sweep.prepare()
        kinds = [
            f"{type(job).__name__}{'' if not isinstance(job, MeasureJob) else ' base' if job.is_base else ' run'}"
            for job in prepared.jobs.values()
        ]
        order = ["VectorJob", "MeasureJob base", "RunJob", "MeasureJob run"]
        assert [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before] == order
        vectors = {job.id for job in prepared.jobs.values() if isinstance(job, VectorJob)}
        for job in shards(prepared):
            assert set(job.parents) == (vectors if job.name == "before" else {job.run_id} - {prepared_base(prepared)})

    def test_rows_are_dealt_to_shards(self, sweep: TinySweep) -> None:
        prepared = sweep.prepare()
        before = [job.rows for job in shards(prepared) if job.name == "before"]
        assert [len(rows) for rows in before] == [3, 2]
        rows = [row for part in before for row in part]
        assert rows == sorted(set(rows)), "no row twice, in the order of the data"
        (entry, *_) = prepared.manifest.measurements
        assert entry.shard_ids == tuple(shard_ids(prepared))

    def test_more_samples_are_the_same_rows_and_more(self) -> None:
        few, many, all_rows = (
            set(chosen_rows(40, GradientMeasurement(vectors=("v",), samples=samples))) for samples in (5, 20, None)
        )
        assert few < many < all_rows == set(range(40))
        halves = [chosen_rows(41, GradientMeasurement(vectors=("v",), part=part)) for part in ("first", "second")]
        assert sorted([*halves[0], *halves[1]]) == list(range(41))
        other = chosen_rows(40, GradientMeasurement(vectors=("v",), samples=5, seed=1))
        assert set(other) != few

    def test_measure_only_trains_what_is_measured_and_samples_from_nothing(self, sweep: TinySweep) -> None:
        sweep.raw["measure"]["after"]["on"] = ["none"]
        prepared = sweep.prepare(measure_only=True)
        (run,) = [job for job in prepared.jobs.values() if isinstance(job, RunJob)]
        assert (run.label, run.samples, run.losses) == ("none", (), ())
        assert not prepared.judge_tasks
        assert {job.name for job in shards(prepared)} == {"before", "after"}
        whole = sweep.prepare()
        assert set(prepared.jobs) < set(whole.jobs), "the same tasks"

    def test_only_leaves_out_the_measurements_of_other_runs(self, sweep: TinySweep) -> None:
        prepared = sweep.prepare(only="none")
        assert {job.run for job in shards(prepared)} == {"base", "none"}
        assert len(prepared.manifest.measurements) == len(sweep.prepare().manifest.measurements)

    def test_a_file_without_runs_measures_its_base(self, without_runs: TinySweep) -> None:
        with_runs = shard_ids(without_runs.prepare())
        assert [job.run for job in shards(without_runs.prepare())] == ["base", "base"]
        assert without_runs.prepare().manifest.runs == ()
        assert len(with_runs) == 2

    def test_smoke_measures_two_rows(self, sweep: TinySweep) -> None:
        prepared = sweep.prepare(smoke=True)
        assert [len(job.rows) for job in shards(prepared) if job.name == "before"] == [1, 1]

    def test_plan_counts_forward_passes(self, sweep: TinySweep) -> None:
        cost = sweep.prepare().measure_costs["before", "base"]
        assert (cost.num_rows, cost.num_forwards, cost.num_shards) == (5, 5 * 7, 2)


def prepared_base(prepared: Prepared) -> str:
    (base,) = {entry.run_id for entry in prepared.manifest.runs if entry.kind == "base"}
    return base


class TestIdentity:
    def test_of_a_base_it_is_the_same_with_and_without_runs(self, sweep: TinySweep) -> None:
        before = shard_ids(sweep.prepare())
        for name in ("runs", "training", "evaluation"):
            del sweep.raw[name]
        sweep.raw["measure"] = {"before": dict(BEFORE)}
        assert shard_ids(sweep.prepare()) == before

    @pytest.mark.parametrize(
        "change",
        [
            {"layers": [2]},
            {"vectors": ["topic"]},
            {"samples": 4},
            {"seed": 1},
            {"rows_per_shard": 2},
            {"max_length": 64},
            {"positions": "predicting"},
            {"data": "data/negative.jsonl"},
            {"conditions": []},
        ],
    )
    def test_what_can_change_a_number_is_in_it(self, sweep: TinySweep, change: dict[str, Any]) -> None:
        before = shard_ids(sweep.prepare())
        sweep.raw["measure"]["before"] |= change
        assert set(shard_ids(sweep.prepare())) != set(before)

    def test_names_paths_and_workers_are_not_in_it(self, sweep: TinySweep) -> None:
        before = sweep.prepare()
        shutil.copy(sweep.folder / "data/train.jsonl", sweep.folder / "data/copy.jsonl")
        renamed = json.loads(json.dumps(BEFORE).replace('"topic"', '"subject"'))
        renamed["conditions"][1]["prompts"] = "topic"
        sweep.raw["measure"] = {"renamed": renamed | {"data": "data/copy.jsonl"}}
        sweep.raw["vectors"] = {
            "subject": sweep.raw["vectors"]["topic"],
            "random": {"random_like": "subject", "seed": 0},
        }
        sweep.raw["runs"] = sweep.raw["runs"][:1]
        after = sweep.prepare("execution.trials=3", "execution.cpus_per_trial=1")
        assert shard_ids(after, "renamed") == shard_ids(before)
        names = {entry.name: entry.names for entry in (*before.manifest.measurements, *after.manifest.measurements)}
        assert "pps topic L2 x0.5" in names["before"].values()
        assert set(names["before"]) == set(names["renamed"])
        assert "pps subject L2 x0.5" in names["renamed"].values(), "what a reader calls it follows the sweep"

    def test_a_sweep_without_measurements_has_the_ids_that_it_had(self, sweep: TinySweep) -> None:
        with_them = {job.id: job for job in sweep.prepare().jobs.values() if not isinstance(job, MeasureJob)}
        del sweep.raw["measure"]
        alone: dict[str, Job] = dict(sweep.prepare().jobs)
        assert alone == {job_id: job for job_id, job in with_them.items() if job.label != "vector random"}
