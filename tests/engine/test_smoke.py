"""``--smoke``: what is cut, what is not, and where it goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.prepare import Prepared
from engine.smoke import smoke_results
from engine.tasks import RunJob
from tests.engine.tiny_prepare import TinySweep, entries, ids, tiny_model_folder
from trainables.sample import SamplingConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory)


@pytest.fixture
def sweep(tmp_path: Path, model: Path) -> TinySweep:
    made = TinySweep(tmp_path / "sweep", model)
    made.raw["training"] |= {"max_steps": None, "epochs": 9}
    made.raw["evaluation"] |= {"samples": 5, "max_new_tokens": 40, "temperature": 0.5}
    return made


def _run_jobs(prepared: Prepared) -> list[RunJob]:
    return [job for job in prepared.jobs.values() if isinstance(job, RunJob)]


class TestWhatIsCut:
    def test_steps_questions_and_answers_of_every_run_and_the_base(self, sweep: TinySweep) -> None:
        jobs = _run_jobs(sweep.prepare(smoke=True))
        assert [job.label for job in jobs] == [job.label for job in _run_jobs(sweep.prepare())]
        for job in jobs:
            (sample,) = job.samples
            assert sample.sampling == SamplingConfig(samples=1, temperature=0.5, max_new_tokens=16)
            assert [question.id for question in sample.questions] == ["q1", "q2"]
            assert job.train is None or job.train.training.max_steps == 2

    def test_what_a_block_or_an_axis_says_does_not_win(self, sweep: TinySweep) -> None:
        sweep.raw["runs"][0] |= {"training": {"max_steps": 50}, "evaluation": {"max_new_tokens": 100}}
        sweep.raw["axes"] = {"training.epochs": {"grid": [4]}, "evaluation.samples": {"grid": [3]}}
        for job in _run_jobs(sweep.prepare("runs.1.training.max_steps=9", smoke=True)):
            assert job.train is None or job.train.training.max_steps == 2
            assert {(sample.sampling.samples, sample.sampling.max_new_tokens) for sample in job.samples} == {(1, 16)}

    def test_what_is_shorter_already_stays(self, sweep: TinySweep) -> None:
        sweep.raw["training"]["max_steps"] = 1
        sweep.raw["evaluation"]["max_new_tokens"] = 3
        for job in _run_jobs(sweep.prepare(smoke=True)):
            assert job.train is None or job.train.training.max_steps == 1
            assert job.samples[0].sampling.max_new_tokens == 3

    def test_all_else_is_that_of_the_file(self, sweep: TinySweep) -> None:
        real, smoke = sweep.prepare(), sweep.prepare(smoke=True)
        assert smoke.inputs == real.inputs
        assert smoke.manifest.vectors == real.manifest.vectors
        assert list(entries(smoke)) == list(entries(real)), "runs keep their labels"
        assert ids(smoke)["base"] == ids(real)["base"]
        assert ids(smoke)["loss"]["base"] == ids(real)["loss"]["base"]
        assert not set(ids(smoke)["train"].values()) & set(ids(real)["train"].values())
        for one, other in zip(_run_jobs(smoke), _run_jobs(real), strict=True):
            assert (one.train is None) == (other.train is None)
            assert [loss.content for loss in one.losses] == [loss.content for loss in other.losses]
            if one.train is not None and other.train is not None:
                cut = one.train.training.model_copy(update={"max_steps": None})
                assert cut == other.train.training
                assert (one.train.data, one.train.seed) == (other.train.data, other.train.seed)
                assert one.train.defense == other.train.defense

    def test_the_table_says_what_was_run_and_the_plan_what_it_costs(self, sweep: TinySweep) -> None:
        smoke = sweep.prepare(smoke=True)
        config = entries(smoke)["none"].config
        assert (config["training.max_steps"], config["evaluation.samples"], config["training.epochs"]) == (2, 1, 9)
        cost = smoke.costs["none"]
        assert (cost.num_steps, cost.num_answers, cost.num_judgements) == (2, 2, 4)
        assert cost.num_training_tokens == round(sweep.prepare().costs["none"].num_training_tokens / 9)


class TestTwins:
    def test_cells_that_are_one_when_cut_are_done_once_and_both_listed(self, sweep: TinySweep) -> None:
        sweep.raw["runs"] = [
            {"defense": "none", "training": {"epochs": {"grid": [1, 2]}}, "evaluation": {"samples": {"grid": [3, 4]}}}
        ]
        assert len([job for job in _run_jobs(sweep.prepare()) if job.train]) == 2
        smoke = sweep.prepare(smoke=True)
        labels = [entry.label for entry in smoke.manifest.runs]
        assert labels == [
            "base",  # the two evaluations are one as well
            "none epochs=1.0 samples=3",
            "none epochs=1.0 samples=4",
            "none epochs=2.0 samples=3",
            "none epochs=2.0 samples=4",
        ]
        assert len({(entry.run_id, entry.sample_id) for entry in smoke.manifest.runs if entry.kind == "run"}) == 1
        (base, job) = _run_jobs(smoke)
        assert base.train is None
        assert len(job.samples) == len(job.losses) == 1

    def test_cells_that_are_one_in_the_file_are_a_fault_as_ever(self, sweep: TinySweep) -> None:
        sweep.raw["runs"] = [{"defense": "none"}, {"defense": "none", "training": {"micro_batch_size": 4}}]
        assert sweep.faults(smoke=True) == sweep.faults()
        assert "two cells have one identity" in sweep.faults(smoke=True)["runs"]


def test_only_selects_by_the_settings_of_the_file(sweep: TinySweep) -> None:
    sweep.raw["runs"] = [{"defense": "none", "training": {"epochs": {"grid": [1, 2]}}}]
    smoke = sweep.prepare(only="training.max_steps == None and training.epochs == 2", smoke=True)
    assert [entry.label for entry in smoke.asked] == ["base", "none epochs=2.0"]
    assert [job.label for job in smoke.jobs.values()] == ["base", "none epochs=2.0"]
    assert (smoke.num_asked, smoke.num_runs) == (1, 2)


class TestStore:
    @pytest.mark.parametrize(
        ("results", "expected"),
        [
            ("results", "results-smoke"),
            ("results/", "results-smoke"),
            ("a folder/results", "a folder/results-smoke"),
            ("../results", "../results-smoke"),
            ("/tmp/some store//", "/tmp/some store-smoke"),
            ("file:///tmp/some%20store", "/tmp/some store-smoke"),
            ("file:/tmp/results/", "/tmp/results-smoke"),
            ("file:///tmp/results?x=1", "/tmp/results-smoke"),
            ("s3://bucket/results/", "s3://bucket/results-smoke"),
        ],
    )
    def test_lies_beside_the_real_one(self, results: str, expected: str) -> None:
        assert smoke_results(results) == expected

    def test_of_the_current_directory_and_of_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "here" / "in").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "here" / "in")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert smoke_results(".") == f"{tmp_path}/here/in-smoke"
        assert smoke_results("..") == f"{tmp_path}/here-smoke"
        assert smoke_results("~") == f"{tmp_path}/home-smoke"
        assert smoke_results("~/results") == f"{tmp_path}/home/results-smoke"

    def test_is_that_of_the_prepared_sweep(self, sweep: TinySweep) -> None:
        real, smoke = sweep.prepare(), sweep.prepare(smoke=True)
        assert smoke.sweep.results == f"{real.sweep.results}-smoke"
        assert smoke.sweep.raw == real.sweep.raw
        assert (real.smoke, smoke.smoke) == (False, True)

    def test_faults_of_the_real_one_are_found_too(self, sweep: TinySweep) -> None:
        (sweep.folder / "results").mkdir()
        (sweep.folder / "results" / "thesis.txt").write_text("mine")
        assert sweep.faults(smoke=True) == sweep.faults()
        assert "is not a shiftgrad store" in sweep.faults(smoke=True)["results"]
        assert list(sweep.faults("results=file://host/x", smoke=True)) == ["results"]
