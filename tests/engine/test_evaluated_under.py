"""Evaluations under interventions, from sweep file to tables: identities, faults, and the work itself, without Ray."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from analysis.results import load
from engine.prepare import Prepared
from engine.tasks import RunJob
from tests.engine.tiny_prepare import TinySweep, ids, tiny_model_folder
from tests.engine.tiny_work import work_in

CAP: dict[str, Any] = {
    "kind": "capping",
    "vector": "topic",
    "layers": [2, 3],
    "ceiling": {"percentile": 50},
    "reference": "data/reference.jsonl",
}
STEER: dict[str, Any] = {"kind": "steering", "vector": "random", "layers": [1], "coefficient": 40.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory)


@pytest.fixture
def sweep(tmp_path: Path, model: Path) -> TinySweep:
    sweep = TinySweep(tmp_path / "a sweep", model)
    sweep.raw["runs"] = [{"defense": "none"}]
    shutil.copy(sweep.folder / "data" / "negative.jsonl", sweep.folder / "data" / "reference.jsonl")
    return sweep


def _under(sweep: TinySweep, items: Any) -> Prepared:
    sweep.raw["evaluation"]["interventions"] = items
    return sweep.prepare()


def test_none_is_the_same_experiment_as_not_saying_it(sweep: TinySweep) -> None:
    before = ids(sweep.prepare())
    for said in ("none", [], ["none"]):
        assert ids(_under(sweep, said)) == before


def test_answers_and_losses_get_ids_of_their_own_and_trainings_do_not(sweep: TinySweep) -> None:
    found = [ids(_under(sweep, items)) for items in ("none", CAP, [STEER, CAP], [CAP, STEER])]
    assert len({one["train"]["none"] for one in found}) == 1
    for kind in ("sample", "loss"):
        assert len({one[kind]["none"] for one in found}) == len({one[kind]["base"] for one in found}) == 4
    other = {**CAP, "ceiling": {"percentile": 51}}
    assert ids(_under(sweep, other))["sample"]["none"] not in [one["sample"]["none"] for one in found]
    sweep.replace("data/reference.jsonl", "Tea.", "Coffee.")
    changed = ids(_under(sweep, CAP))
    assert changed["vector"] == found[1]["vector"]
    assert changed["sample"]["none"] != found[1]["sample"]["none"]


def test_a_grid_makes_rows_that_share_the_training_and_rest_on_the_vectors(sweep: TinySweep) -> None:
    prepared = _under(sweep, "none")
    del sweep.raw["evaluation"]["interventions"]
    items = [{"grid": ["none", STEER]}, {"grid": ["none", {**CAP, "ceiling": {"percentile": {"grid": [50, 90]}}}]}]
    sweep.raw["axes"] = {"evaluation.interventions": {"grid": [items]}}
    prepared = sweep.prepare()
    jobs = [job for job in prepared.jobs.values() if isinstance(job, RunJob)]
    assert [len(job.samples) for job in jobs] == [6, 6]
    vectors = set(prepared.manifest.vectors.values())
    assert all(set(job.parents) == vectors for job in jobs)
    labels = [entry.label for entry in prepared.manifest.runs]
    assert labels[:2] == ["base", "base #2 under cap topic L2-3 at most p50"]
    assert labels[-1] == "none interventions=steer random L1 x40 + cap topic L2-3 at most p90"


def test_faults_have_the_user_s_keys(sweep: TinySweep) -> None:
    negative = {"kind": "capping", "vector": "topic", "layers": [2], "tau": -1}
    sweep.raw["evaluation"]["interventions"] = ["none", negative]
    assert sweep.faults() == {"evaluation.interventions[1].tau": "must be at least 0; got -1"}
    sweep.raw["evaluation"]["interventions"] = [
        {**STEER, "vector": "topik", "layers": [9]},
        "none",
        {**CAP, "reference": "data/nowhere.jsonl"},
        {"kind": "capping", "vector": "topic", "layers": [2], "floor": 3.0, "ceiling": 2.0},
    ]
    faults = sweep.faults()
    keys = ("[0].vector", "[0].layers", "[2].reference", "[3].ceiling")
    assert set(faults) == {f"evaluation.interventions{key}" for key in keys}
    assert "no vector 'topik'; did you mean" in faults["evaluation.interventions[0].vector"]
    sweep.raw["evaluation"]["interventions"] = {**CAP, "vector": "topik"}
    assert set(sweep.faults()) == {"evaluation.interventions.vector"}
    sweep.raw["evaluation"] |= {"interventions": [STEER], "answers_from": "openai"}
    assert "a server answers without them" in sweep.faults()["evaluation.interventions"]


def test_an_axis_of_another_model_is_refused(sweep: TinySweep) -> None:
    from tests.engine.tiny_prepare import write_vector

    write_vector(sweep.folder / "axis.safetensors", model="org/other", revision="abc")
    sweep.raw["vectors"]["axis"] = {"file": "axis.safetensors"}
    sweep.raw["evaluation"]["interventions"] = [{**CAP, "vector": "axis"}]
    assert "made for org/other" in sweep.faults()["vectors.axis.file"]


def test_the_work_is_done_under_them(sweep: TinySweep, tmp_path: Path) -> None:
    items = [{"grid": ["none", STEER]}, {"grid": ["none", CAP]}]
    sweep.raw["axes"] = {"evaluation.interventions": {"grid": [items]}}
    prepared = sweep.prepare()
    work = work_in(prepared, tmp_path / "store")
    for job_id in prepared.jobs:
        work.run(job_id, lambda **_: None)
    results = load(tmp_path / "store" / "sweeps" / "tiny")
    answers = results.generations().groupby("run")["answer"].apply(tuple)
    assert len(set(answers)) == len(answers) == 8  # every condition, of the base and of the run, changes some answer
    losses = results.losses().groupby("run")["loss_sum"].sum()
    assert losses.nunique() == 8
    assert list(results.capping()["cap"]) == ["none", "cap topic L2-3 at most p50"] * 2
