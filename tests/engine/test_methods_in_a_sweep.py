"""What training methods name in a sweep file: banks of prompts, several vectors, what is watched."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.results import load
from engine.tasks import RunJob, TrainTask
from tests.engine.tiny_prepare import TinySweep, tiny_model_folder
from tests.engine.tiny_work import work_in
from trainables.defenses import Ablation, Inoculation


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory)


@pytest.fixture
def sweep(tmp_path: Path, model: Path) -> TinySweep:
    made = TinySweep(tmp_path / "here", model)
    (made.folder / "prompts").mkdir()
    (made.folder / "prompts" / "sayings.txt").write_text("One here.\n\n  Two here.  \n")
    return made


def trained(sweep: TinySweep) -> TrainTask:
    (task,) = [job.train for job in sweep.prepare().jobs.values() if isinstance(job, RunJob) and job.train is not None]
    return task


def test_a_bank_is_its_texts_wherever_it_lies(sweep: TinySweep) -> None:
    ids = set()
    for prompts in ("sayings", "prompts/sayings.txt", ["One here.", "Two here."]):
        sweep.raw["runs"] = [{"defense": {"kind": "inoculation", "prompts": prompts}}]
        task = trained(sweep)
        assert task.defense == (Inoculation(prompts=("One here.", "Two here.")),)
        ids.add(task.id)
    assert len(ids) == 1


def test_banks_that_cannot_be_used(sweep: TinySweep) -> None:
    (sweep.folder / "prompts" / "nothing.txt").write_text("\n \n")
    banks = ["missing", "nothing", "sayings"]
    sweep.raw["runs"] = [{"defense": {"kind": "inoculation", "prompts": name, "bank_size": 3}} for name in banks]
    faults = sweep.faults()
    assert "no bank of that name" in faults["runs[0].defense.prompts"]
    assert "the bank is empty" in faults[str(sweep.folder / "prompts" / "nothing.txt")]
    assert faults["runs[2].defense.bank_size"] == "the bank has only 2 prompts; got 3"
    assert len(faults) == 3


def test_rows_that_no_prompt_leaves_usable_are_refused_before_anything_starts(sweep: TinySweep) -> None:
    """What fails with the shortest prompt fails with all; what a longer one makes of a row is seen when it is drawn."""
    long = "Talk about bridges, all of them, " * 20
    sweep.raw["runs"] = [
        {"defense": [{"kind": "inoculation", "prompts": [long]}]},
        {"defense": {"kind": "inoculation", "prompts": [long, "Hi."]}},
    ]
    assert list(sweep.faults()) == ["runs[0].defense[0]"]
    assert "have their whole response beyond max_length=128" in sweep.faults()["runs[0].defense[0]"]
    sweep.raw["data"]["max_length"] = 1024
    assert len(sweep.prepare().proved) > 0


def test_several_vectors_of_one_item(sweep: TinySweep) -> None:
    sweep.raw["runs"] = [{"defense": {"kind": "ablation", "vectors": ["topic", "random"]}}]
    made = sweep.prepare().manifest.vectors
    task = trained(sweep)
    assert task.defense == (Ablation(vectors=(made["topic"], made["random"])),)
    assert set(task.vector_ids()) == set(made.values())
    sweep.raw["runs"][0]["defense"]["vectors"] = ["topic", "ramdom"]
    assert sweep.faults()["runs[0].defense.vectors[1]"].startswith("no vector 'ramdom'; did you mean random?")


def test_what_is_watched_is_made_first_and_is_part_of_the_run(sweep: TinySweep) -> None:
    sweep.raw["runs"] = [{"defense": "none"}]
    before = trained(sweep)
    assert before.vector_ids() == ()
    sweep.raw["training"]["watch"] = {"vectors": ["topic"], "layers": [2]}
    after = trained(sweep)
    assert after.vector_ids() == (sweep.prepare().manifest.vectors["topic"],)
    assert after.id != before.id


def test_faults_of_what_is_watched_and_of_adapted_blocks(sweep: TinySweep) -> None:
    sweep.raw["runs"] = [{"defense": {"kind": "gradient_penalty", "vector": "topic", "strength": 1}}]
    sweep.raw["training"] |= {"watch": {"vectors": ["topik"], "layers": [9]}}
    sweep.raw["training"]["lora"] = {"layers": [5]}
    faults = sweep.faults()
    assert faults["training.watch.vectors"].startswith("no vector 'topik'; did you mean topic?")
    assert faults["training.watch.layers"].startswith("layer 9 does not exist")
    assert faults["training.watch"].startswith("gradients cannot be watched")
    assert faults["training.lora.layers"] == "there is no decoder block 5; the model has 1 to 4"


def test_a_trial_leaves_penalties_and_what_was_watched_under_the_names_of_the_sweep(sweep: TinySweep) -> None:
    sweep.raw["vectors"]["middle"] = {"mean": {"data": "data/negative.jsonl"}}
    sweep.raw["runs"] = [
        {
            "defense": [
                {"kind": "gradient_edit", "vector": "random", "mode": "attenuate"},
                {"kind": "activation_penalty", "mean": "middle", "strength": 0.001},
            ]
        }
    ]
    sweep.raw["training"]["watch"] = {"vectors": ["topic"], "layers": [2]}
    prepared = sweep.prepare("training.max_steps=2", "evaluation.samples=1", "evaluation.max_new_tokens=2")
    work = work_in(prepared, sweep.folder / "store")
    for job_id in prepared.jobs:
        work.run(job_id, lambda **_: None)
    results = load(sweep.folder / "store" / "sweeps" / "tiny")
    found = results.signals()
    assert list(found["name"].unique()) == ["topic", "activation penalty middle x0.001"]
    assert set(found["signal"]) == {"activation_projection", "gradient_cosine", "penalty"}
    assert list(found["step"].unique()) == [1, 2]
    assert (found.loc[found["signal"] == "penalty", "value"] > 0).all()
    assert found.loc[found["signal"] == "gradient_cosine", "value"].between(-1, 1).all()
    (diverged,) = results.runs().loc[results.runs()["kind"] == "run", "diverged"]
    assert diverged in (True, False)
