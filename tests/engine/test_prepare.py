"""From a sweep file to work: what shares what, and what it costs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from analysis.judges import DegenerationMetric, RuleMetric
from engine.graph import Cost
from engine.machine import Machine
from engine.tasks import RunJob
from tests.engine.tiny_prepare import TinySweep, add_long_question, tiny_model_folder, write_vector
from tests.tiny import CHATML, tiny_tokenizer
from trainables.chat_data import ChatEncoder, encode_all

PPS = {"kind": "pps", "vector": "topic", "layer": 2, "coefficient": 1.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory)


@pytest.fixture
def sweep(tmp_path: Path, model: Path) -> TinySweep:
    return TinySweep(tmp_path / "sweep", model)


class TestSharing:
    def test_cells_that_differ_in_evaluation_share_one_training(self, sweep: TinySweep) -> None:
        sweep.raw["runs"] = [{"defense": "none", "evaluation": {"temperature": {"grid": [1.0, 0.5]}}}]
        prepared = sweep.prepare()
        hot, cold = (entry for entry in prepared.manifest.runs if entry.kind == "run")
        assert hot.run_id == cold.run_id
        assert hot.sample_id != cold.sample_id
        job = prepared.jobs[hot.run_id]
        assert isinstance(job, RunJob)
        assert [sample.id for sample in job.samples] == [hot.sample_id, cold.sample_id]
        assert [loss.id for loss in job.losses] == [hot.plain_loss_id]
        assert hot.plain_loss_id == cold.plain_loss_id

    def test_one_base_per_base_and_evaluation(self, sweep: TinySweep) -> None:
        sweep.raw["runs"] = [
            {"defense": "none"},
            {"defense": PPS},
            {"defense": "none", "evaluation": {"samples": 3}},
            {"defense": "none", "base": {"dtype": "bfloat16"}},
            {"defense": "none", "evaluation": {"questions": "bridge"}},
        ]
        bases = [entry for entry in sweep.prepare().manifest.runs if entry.kind == "base"]
        assert [entry.label for entry in bases] == ["base", "base #2", "base #3", "base #4 on bridge"]
        assert [entry.config["evaluation.samples"] for entry in bases] == [2, 3, 2, 2]
        assert [entry.config["base.dtype"] for entry in bases] == ["float32", "float32", "bfloat16", "float32"]
        assert bases[0].run_id == bases[1].run_id != bases[2].run_id

    @pytest.mark.parametrize(
        "evaluation",
        [
            {"plain_answers": "data/negative.jsonl"},
            {"metrics": {"trait": {"judge": "rule", "patterns": ["x"]}}},
        ],
    )
    def test_what_is_measured_tells_two_cells_apart(self, sweep: TinySweep, evaluation: dict[str, object]) -> None:
        sweep.raw["runs"] = [{"defense": "none"}, {"defense": "none", "evaluation": evaluation}]
        prepared = sweep.prepare()
        assert [entry.kind for entry in prepared.manifest.runs] == ["base", "base", "run", "run"]
        assert len([job for job in prepared.jobs.values() if isinstance(job, RunJob) and job.train]) == 1
        for entry in prepared.manifest.runs:
            job = prepared.jobs[entry.run_id]
            assert isinstance(job, RunJob)
            assert entry.plain_loss_id in [loss.id for loss in job.losses]
            assert set(entry.judge_ids.values()) <= set(prepared.judge_tasks)

    def test_plain_answers_are_cut_like_the_data(self, sweep: TinySweep) -> None:
        sweep.raw["runs"] = [{"defense": "none"}, {"defense": "none", "data": {"max_length": 100}}]
        prepared = sweep.prepare()
        for entry in prepared.manifest.runs:
            job = prepared.jobs[entry.run_id]
            assert isinstance(job, RunJob)
            (length,) = [loss.max_length for loss in job.losses if loss.id == entry.plain_loss_id]
            assert length == entry.config.get("data.max_length", length)

    def test_one_vector_for_two_names_and_two_for_two_bases(self, sweep: TinySweep) -> None:
        sweep.raw["vectors"]["same"] = sweep.raw["vectors"]["topic"]
        sweep.raw["runs"] = [
            {"defense": PPS},
            {"defense": {**PPS, "vector": "same", "layer": 3}},
            {"defense": PPS, "base": {"dtype": "bfloat16"}},
        ]
        vectors = sweep.prepare().manifest.vectors
        assert list(vectors) == ["topic", "same", "topic #2"]
        assert vectors["topic"] == vectors["same"] != vectors["topic #2"]

    def test_a_vector_that_nothing_uses_is_not_made(self, sweep: TinySweep) -> None:
        sweep.raw["runs"] = [{"defense": "none"}]
        assert sweep.prepare().manifest.vectors == {}

    def test_a_random_vector_alone_brings_what_it_is_like(self, sweep: TinySweep) -> None:
        sweep.raw["runs"] = [{"defense": {**PPS, "vector": "random"}}]
        prepared = sweep.prepare()
        like, random = prepared.manifest.vectors["topic"], prepared.manifest.vectors["random"]
        assert prepared.jobs[random].parents == (like,)
        assert list(prepared.jobs)[:2] == [like, random]

    def test_workers_get_every_input_by_its_hash(self, sweep: TinySweep) -> None:
        write_vector(sweep.folder / "own.safetensors")
        sweep.raw["vectors"]["own"] = {"file": "own.safetensors"}
        sweep.raw["runs"].append({"defense": {**PPS, "vector": "own"}})
        prepared = sweep.prepare()
        assert all(hashlib.sha256(content).hexdigest() == name for name, content in prepared.inputs.items())
        assert hashlib.sha256((sweep.folder / "own.safetensors").read_bytes()).hexdigest() in prepared.inputs
        for job in prepared.jobs.values():
            if isinstance(job, RunJob):
                assert {loss.content for loss in job.losses} <= set(prepared.inputs)
                assert job.train is None or job.train.train_content in prepared.inputs

    def test_degeneration_is_always_measured(self, sweep: TinySweep) -> None:
        prepared = sweep.prepare()
        assert all(set(entry.judge_ids) == {"trait", "degeneration"} for entry in prepared.manifest.runs)
        metrics = {type(task.metric) for task in prepared.judge_tasks.values()}
        assert metrics == {RuleMetric, DegenerationMetric}
        sweep.raw["evaluation"]["metrics"] = {"degeneration": {"judge": "degeneration"}}
        assert all(set(entry.judge_ids) == {"degeneration"} for entry in sweep.prepare().manifest.runs)

    def test_a_model_folder_beside_the_sweep_file(self, sweep: TinySweep) -> None:
        before = [entry.run_id for entry in sweep.prepare().manifest.runs]
        sweep.raw["base"]["model"] = "model"
        prepared = sweep.prepare()
        assert [entry.run_id for entry in prepared.manifest.runs] == before
        assert {entry.config["base.model"] for entry in prepared.manifest.runs} == {"model"}
        sources = {job.base.source for job in prepared.jobs.values() if isinstance(job, RunJob)}
        assert sources == {str(sweep.folder / "model")}

    @pytest.mark.parametrize(("num_gpus", "device", "dtype"), [(0.0, "cpu", "float32"), (2.0, "cuda", "bfloat16")])
    def test_the_machine_settles_device_and_dtype(
        self, sweep: TinySweep, num_gpus: float, device: str, dtype: str
    ) -> None:
        sweep.raw["base"].pop("dtype")
        prepared = sweep.prepare(machine=Machine(4, num_gpus, 16.0))
        assert prepared.device == device
        assert prepared.num_trials == (4 if device == "cpu" else 2)
        assert {entry.config["base.dtype"] for entry in prepared.manifest.runs} == {dtype}


class TestCosts:
    def _tokens(self, sweep: TinySweep, max_length: int = 128) -> list[int]:
        text = (sweep.folder / "data" / "train.jsonl").read_text()
        rows = [json.loads(line)["messages"] for line in text.splitlines()]
        encoded, _ = encode_all(rows, ChatEncoder(tiny_tokenizer(CHATML), max_length), True)
        return [len(row.input_ids) for row in encoded]

    def test_of_every_row(self, sweep: TinySweep) -> None:
        costs = sweep.prepare().costs
        assert costs["base"] == Cost(0, 0, num_answers=8, num_judgements=16)
        # 2 steps of 4 rows: all 8 rows once
        assert costs["none"] == Cost(2, sum(self._tokens(sweep)), num_answers=8, num_judgements=16)

    @pytest.mark.parametrize(
        ("epochs", "batch_size", "steps", "uses_of_a_row"),
        [(1, 3, 3, 1.0), (2, 3, 6, 2.0), (2, 100, 2, 2.0), (0.5, 4, 1, 0.5), (1.5, 3, 5, 1 + 6 / 8)],
    )
    def test_a_last_batch_that_is_not_full(
        self, sweep: TinySweep, epochs: float, batch_size: int, steps: int, uses_of_a_row: float
    ) -> None:
        sweep.raw["training"] |= {"epochs": epochs, "batch_size": batch_size, "max_steps": None}
        cost = sweep.prepare().costs["none"]
        assert cost.num_steps == steps
        assert cost.num_training_tokens == round(uses_of_a_row * sum(self._tokens(sweep)))

    def test_rows_that_are_left_out_cost_nothing(self, sweep: TinySweep) -> None:
        add_long_question(sweep)
        kept = self._tokens(sweep)
        assert len(kept) == 8
        sweep.raw["data"]["allow_truncated_away"] = True
        assert sweep.prepare().costs["none"].num_training_tokens == sum(kept)


def test_system_prompts_are_an_axis_of_the_evaluation_alone(sweep: TinySweep) -> None:
    """Figure 7: every run trained once and asked under every prompt, and so is the base."""
    sweep.raw["runs"] = [{"defense": "none"}, {"defense": {"kind": "inoculation", "prompts": "topic"}}]
    sweep.raw["axes"] = {"evaluation.system_prompt": {"grid": [None, "Talk about bridges.", "Be brief."]}}
    prepared = sweep.prepare()
    runs = [entry for entry in prepared.manifest.runs if entry.kind == "run"]
    bases = [entry for entry in prepared.manifest.runs if entry.kind == "base"]
    assert (len(runs), len({entry.run_id for entry in runs}), len({entry.sample_id for entry in runs})) == (6, 2, 6)
    assert (len(bases), len({entry.run_id for entry in bases}), len({entry.sample_id for entry in bases})) == (3, 1, 3)
    asked = {str(entry.config["evaluation.system_prompt"]) for entry in bases}
    assert asked == {"None", "Talk about bridges.", "Be brief."}
    assert sum(isinstance(job, RunJob) and job.train is not None for job in prepared.jobs.values()) == 2
