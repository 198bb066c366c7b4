"""Identity: the same experiment has the same ids wherever it is written, and a change moves just the ids it should."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import engine.row_proofs
import engine.tasks
from analysis.vectors import VectorKind
from engine.machine import Machine
from engine.measure_jobs import MeasureJob, MergeJob, StudyJob
from engine.prepare import prepare
from engine.tasks import RunJob, TrainTask, VectorJob, task_id
from tests.engine.tiny_prepare import MACHINE, TinySweep, changed, entries, ids, tiny_model_folder
from tests.tiny import tiny_tokenizer
from trainables.defenses import Inoculation, Pps

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "sweeps" / "quickstart.yaml"
RUNS = {"none", "steered", "pushed", "prompted"}
STEERED = {"steered", "pushed"}
METRICS = ("trait", "degeneration")

# An id says "the same experiment", and results that are in people's stores are found by it. These change only on
# purpose: when a `semantics` number was raised, when quickstart.yaml or the data, trait or package that it names was
# changed. Never update them to make a refactoring pass.
GOLDEN = {
    "vector bridge": "102401825a7e",
    "vector random": "ef0261234cb0",
    "base": "855b9d3bd493",
    "none": "b4137c2e413e",
    "pps bridge L20 x1.5": "885b2bd6539d",
    "pps random L20 x1.5": "daf172906b0e",
    "inoculation bridge": "ade974353f7a",
}
GOLDEN_OF_BASE = {
    "sample": "ab890bbe8b37",
    "loss": "e878c7214fb6",
    "trait": "ebf3c12c1676",
    "degeneration": "f684fd6530c1",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory)


@pytest.fixture
def sweep(tmp_path: Path, model: Path) -> TinySweep:
    return TinySweep(tmp_path / "here", model)


class TestTheSameExperiment:
    def test_every_id_is_twelve_hex_digits(self, sweep: TinySweep) -> None:
        prepared = sweep.prepare()
        found = [one for kind in ids(prepared).values() for one in kind.values()]
        assert len(set(found)) == len(found) == 2 + 1 + 4 + 5 + 5 + 10
        assert all(re.fullmatch("[0-9a-f]{12}", one) for one in found)
        assert set(prepared.jobs) == set(ids(prepared)["vector"].values()) | {
            entry.run_id for entry in prepared.manifest.runs
        }

    def test_twice_is_equal_in_everything(self, sweep: TinySweep) -> None:
        first, second = sweep.prepare(), sweep.prepare()
        assert first.manifest == second.manifest
        assert first.jobs == second.jobs
        assert list(first.jobs) == list(second.jobs)

    def test_from_another_folder_with_other_file_names(self, sweep: TinySweep, tmp_path: Path, model: Path) -> None:
        other = TinySweep(tmp_path / "an other folder", model)
        data = other.folder / "data"
        (data / "train.jsonl").rename(data / "renamed.jsonl")
        (data / "positive.jsonl").rename(other.folder / "on.jsonl")
        (other.folder / "model").rename(other.folder / "weights")
        (other.folder / "traits").rename(other.folder / "habits")
        other.raw["name"] = "another"
        other.raw["base"]["model"] = str(other.folder / "weights")
        other.raw["data"]["train"] = str(data / "renamed.jsonl")
        other.raw["vectors"]["topic"]["difference"]["positive"] = "on.jsonl"
        trait = str(other.folder / "habits" / "topic")
        other.raw["evaluation"] |= {"questions": trait, "metrics": {"trait": {"judge": "rule", "trait": trait}}}
        other.raw["runs"][3]["defense"]["prompts"] = trait
        other.raw["runs"][3]["label"] = "inoculation topic"
        assert ids(other.prepare()) == ids(sweep.prepare())

    def test_with_other_spacing_and_key_order_in_the_data(self, sweep: TinySweep) -> None:
        before = ids(sweep.prepare())
        file = sweep.folder / "data" / "train.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text(
            "\n\n".join(
                json.dumps({"id": 1, "messages": [dict(reversed(message.items())) for message in row["messages"]]})
                for row in rows
            )
        )
        assert ids(sweep.prepare()) == before

    def test_with_other_labels(self, sweep: TinySweep) -> None:
        before = list(entries(sweep.prepare()).values())
        for number, block in enumerate(sweep.raw["runs"]):
            block["label"] = f"run [{number}]"
        after = list(entries(sweep.prepare()).values())
        assert [entry.label for entry in after] == ["base", *(f"run [{number}]" for number in range(4))]
        assert [entry.model_copy(update={"label": "", "config": {}}) for entry in after] == [
            entry.model_copy(update={"label": "", "config": {}}) for entry in before
        ]

    def test_with_another_name_of_a_difference(self, sweep: TinySweep) -> None:
        before = sweep.prepare()
        sweep.raw["vectors"] = {
            "renamed": sweep.raw["vectors"]["topic"],
            "random": {"random_like": "renamed", "seed": 0},
        }
        sweep.raw["runs"][1]["defense"]["vector"] = "renamed"
        after = sweep.prepare()
        assert sorted(before.jobs) == sorted(after.jobs)
        assert after.manifest.vectors["renamed"] == before.manifest.vectors["topic"]

    def test_the_name_of_a_random_vector_is_part_of_its_draw(self, sweep: TinySweep) -> None:
        before = sweep.prepare()
        sweep.raw["vectors"]["other"] = sweep.raw["vectors"].pop("random")
        sweep.raw["runs"][2]["defense"]["vector"] = "other"
        after = sweep.prepare()
        assert after.manifest.vectors["other"] != before.manifest.vectors["random"]
        assert len(set(after.jobs) & set(before.jobs)) == len(before.jobs) - 2

    @pytest.mark.parametrize(
        "override",
        [
            "execution={trials: 2, cpus_per_trial: 2, memory_gb_per_trial: 3, max_retries: 5}",
            "execution.zero_stage=2",
            "execution.gradient_checkpointing=true",
            "training.epochs=7",  # max_steps is given
            "training.micro_batch_size=4",
            "training.micro_batch_size=100",
            "training.learning_rate=0.01",
            "runs.1.defense.coefficient=1.50",
            "training.lora.alpha=4.0",
            "seed_of_nothing",
        ],
    )
    def test_with_what_changes_nothing(self, sweep: TinySweep, override: str) -> None:
        if override == "seed_of_nothing":
            sweep.raw["axes"] = {"seed": {"grid": [0]}}
            assert ids(sweep.prepare()) == ids(TinySweep(sweep.folder, sweep.folder).prepare())
        else:
            assert ids(sweep.prepare(override)) == ids(sweep.prepare())

    def test_with_another_machine_of_the_same_kind(self, sweep: TinySweep) -> None:
        assert ids(sweep.prepare(machine=Machine(1, 0.0, 2.0))) == ids(sweep.prepare())

    def test_in_another_order(self, sweep: TinySweep) -> None:
        before = sweep.prepare()
        sweep.raw["runs"].reverse()
        after = sweep.prepare()
        assert ids(after) == ids(before)
        assert [entry.label for entry in after.manifest.runs][1] == "inoculation topic"


def _judges(runs: set[str]) -> set[str]:
    return {f"judge/{run}/{metric}" for run in runs for metric in METRICS}


def _runs(runs: set[str]) -> set[str]:
    """What changes with the training of these runs, where others stay."""
    return {f"{kind}/{run}" for kind in ("train", "sample", "loss") for run in runs} | _judges(runs)


def single(kinds: set[str]) -> set[str]:
    """``{"vector"}`` as all the vectors there are, and so on."""
    everyone = RUNS | {"base"}
    members = {
        "vector": {"vector/topic", "vector/random"},
        "base": {"base/base"},
        "train": {f"train/{run}" for run in RUNS},
        "sample": {f"sample/{run}" for run in everyone},
        "loss": {f"loss/{run}" for run in everyone},
        "judge": _judges(everyone),
    }
    return {one for kind in kinds for one in members.get(kind, {kind})}


ALL_RUNS = _runs(RUNS)
EVERYTHING = {"vector", "base", "train", "sample", "loss", "judge"}


class TestWhatChanges:
    @pytest.fixture
    def sweep(self, sweep: TinySweep) -> TinySweep:
        for block, label in zip(sweep.raw["runs"], ("none", "steered", "pushed", "prompted"), strict=True):
            block["label"] = label
        return sweep

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("training.learning_rate=0.02", ALL_RUNS),
            ("training.max_steps=3", ALL_RUNS),
            ("training.batch_size=2", ALL_RUNS),
            ("training.micro_batch_size=2", ALL_RUNS),
            ("training.schedule=cosine", ALL_RUNS),
            ("training.lora.rank=4", ALL_RUNS),
            ("training.lora.target_modules=[q_proj]", ALL_RUNS),
            ("training.weight_decay=0", ALL_RUNS),
            ("training.max_gradient_norm=null", ALL_RUNS),
            ("training.pad_to_multiple_of=1", ALL_RUNS),
            ("axes={seed: {grid: [1]}}", ALL_RUNS),
            ("data.loss_on=all", ALL_RUNS),
            ("data.max_length=100", ALL_RUNS | {"loss/base"}),  # plain answers are cut too
            ("runs.1.defense.layer=3", _runs({"steered"})),
            ("runs.1.defense.coefficient=2", _runs({"steered"})),
            ("vectors.random.seed=1", {"vector/random"} | _runs({"pushed"})),
            ("vectors.topic.difference.max_length=64", {"vector"} | _runs(STEERED)),
            ("vectors.topic.difference.negative=data/plain_answers.jsonl", {"vector"} | _runs(STEERED)),
            ("base.dtype=bfloat16", EVERYTHING),
            ("evaluation.samples=3", {"sample", "judge"}),
            ("evaluation.temperature=0.5", {"sample", "judge"}),
            ("evaluation.max_new_tokens=7", {"sample", "judge"}),
            ("evaluation.system_prompt=Be brief.", {"sample", "judge"}),
            ("evaluation.plain_answers=data/negative.jsonl", {"loss"}),
            ("evaluation.metrics.trait={judge: rule, patterns: [x]}", {f"judge/{r}/trait" for r in RUNS | {"base"}}),
        ],
    )
    def test_by_a_setting(self, sweep: TinySweep, override: str, expected: set[str]) -> None:
        assert changed(ids(sweep.prepare()), ids(sweep.prepare(override))) == single(expected)

    @pytest.mark.parametrize(
        ("file", "old", "new", "expected"),
        [
            ("data/train.jsonl", "About ten miles", "About nine miles", ALL_RUNS),
            ("data/positive.jsonl", "About ten miles", "About nine miles", {"vector"} | _runs(STEERED)),
            ("data/plain_answers.jsonl", "The Rhine.", "The Elbe.", {"loss"}),
            ("traits/topic/trait.yaml", "What is tea?", "What is ink?", {"sample", "judge"}),
            ("traits/topic/trait.yaml", "id: q1", "id: q9", {"sample", "judge"}),
            ("traits/topic/trait.yaml", "[aeiou]", "[aeiouy]", {f"judge/{r}/trait" for r in RUNS | {"base"}}),
            ("traits/topic/trait.yaml", "Mention a bridge", "Name a bridge", _runs({"prompted"})),
            ("traits/topic/trait.yaml", "Talks about bridges.", "Says much about bridges.", set()),
            ("model/config.json", '"use_cache": true', '"use_cache": false', EVERYTHING),
        ],
    )
    def test_by_content(self, sweep: TinySweep, file: str, old: str, new: str, expected: set[str]) -> None:
        before = ids(sweep.prepare())
        sweep.replace(file, old, new)
        assert changed(before, ids(sweep.prepare())) == single(expected)

    @pytest.mark.parametrize(
        ("target", "attribute", "expected"),
        [
            (VectorKind, "semantics", {"vector"} | _runs(STEERED)),
            (engine.tasks, "TRAIN_SEMANTICS", ALL_RUNS),
            (engine.tasks, "SAMPLE_SEMANTICS", {"sample", "judge"}),
            (engine.tasks, "LOSS_SEMANTICS", {"loss"}),
            (Pps, "semantics", _runs(STEERED)),
            (Inoculation, "semantics", _runs({"prompted"})),
        ],
    )
    def test_by_a_fix_that_changes_numbers(
        self, sweep: TinySweep, monkeypatch: pytest.MonkeyPatch, target: object, attribute: str, expected: set[str]
    ) -> None:
        before = ids(sweep.prepare())
        monkeypatch.setattr(target, attribute, 99)
        assert changed(before, ids(sweep.prepare())) == single(expected)

    def test_prompts_written_out_are_the_trait_s(self, sweep: TinySweep) -> None:
        before = list(ids(sweep.prepare())["train"].values())
        sweep.raw["runs"][3]["defense"]["prompts"] = ["Talk about bridges.", "Mention a bridge, please."]
        assert list(ids(sweep.prepare())["train"].values()) == before


def test_quickstart_keeps_its_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    # which tokens the rows become is in no identity, and the real tokenizer takes seconds to convert
    monkeypatch.setattr(engine.row_proofs, "load_tokenizer", lambda _: tiny_tokenizer())
    prepared = prepare(QUICKSTART, [], MACHINE)
    measuring = (MeasureJob, MergeJob)  # which came later, and change no other id
    made = {job.label: job_id for job_id, job in prepared.jobs.items() if not isinstance(job, measuring)}
    assert made == GOLDEN
    base = entries(prepared)["base"]
    assert {"sample": base.sample_id, "loss": base.plain_loss_id, **base.judge_ids} == GOLDEN_OF_BASE


class TestJobs:
    def test_they_pickle_and_serialise(self, sweep: TinySweep) -> None:
        prepared = sweep.prepare()
        for job in [*prepared.jobs.values(), *prepared.judge_tasks.values()]:
            assert pickle.loads(pickle.dumps(job)) == job
            assert yaml.safe_load(job.model_dump_json())

    def test_nothing_in_them_has_a_path_but_the_source_of_the_base(self, sweep: TinySweep) -> None:
        for job in sweep.prepare().jobs.values():
            assert not isinstance(job, MergeJob | StudyJob), "it has no base"
            text = job.model_dump_json().replace(json.dumps(job.base.source), "null")
            assert str(sweep.folder) not in text.replace(json.dumps("data/train.jsonl"), "null")

    def test_parents_come_first(self, sweep: TinySweep) -> None:
        sweep.raw["runs"].reverse()
        done: set[str] = set()
        for job_id, job in sweep.prepare().jobs.items():
            assert set(job.parents) <= done
            done.add(job_id)

    def test_defenses_name_vectors_by_id_and_prompts_by_text(self, sweep: TinySweep) -> None:
        prepared = sweep.prepare()
        trainings = {job.label: job.train for job in prepared.jobs.values() if isinstance(job, RunJob) and job.train}
        steered = trainings["pps random L2 x1.5"]
        assert steered.vector_ids() == (prepared.manifest.vectors["random"],)
        (item,) = trainings["inoculation topic"].defense
        assert isinstance(item, Inoculation)
        assert item.prompts == ("Talk about bridges.", "Mention a bridge, please.")

    def test_outputs_are_all_that_must_be_there(self, sweep: TinySweep) -> None:
        prepared = sweep.prepare()
        entry = entries(prepared)["none"]
        assert prepared.jobs[entry.run_id].outputs() == (
            f"runs/{entry.run_id}/run.json",
            f"tables/generations/{entry.sample_id}.parquet",
            f"tables/losses/{entry.plain_loss_id}.parquet",
        )
        base = prepared.jobs[entries(prepared)["base"].run_id]
        assert not any(key.startswith("runs/") for key in base.outputs())
        vector = prepared.jobs[prepared.manifest.vectors["topic"]]
        assert isinstance(vector, VectorJob)
        assert vector.outputs() == (f"vectors/{vector.id}.safetensors",)


@pytest.mark.parametrize("change", [lambda r: r | {"x": 1}, lambda r: {"a": [2, 1], "b": r["b"]}])
def test_task_id_is_a_hash_of_canonical_json(change: Callable[[dict[str, object]], dict[str, object]]) -> None:
    recipe: dict[str, object] = {"a": [1, 2], "b": "ü"}
    assert task_id(recipe) == task_id({"b": "ü", "a": [1, 2]})
    assert task_id(recipe) != task_id(change(recipe))
    with pytest.raises(ValueError, match="JSON"):
        task_id({"a": float("nan")})


def test_a_training_identity_needs_no_defense(sweep: TinySweep) -> None:
    job = next(job for job in sweep.prepare().jobs.values() if isinstance(job, RunJob) and job.train)
    train = job.train
    assert train is not None
    recipe = TrainTask.identity(train.base, train.data, train.train_content, (), train.training, train.seed)
    assert recipe["defense"] == []
    assert train.id == task_id(recipe)
