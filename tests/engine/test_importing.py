"""Other projects' files imported to disk and named directly in sweeps; vectors exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from analysis import load
from analysis.formats import Hints, any_trait
from analysis.traits import read_trait
from analysis.vectors import Vector
from engine.cli import app
from engine.exporting import export_vector
from engine.importing import import_files
from engine.tasks import RunJob
from tests.engine.finished import write_finished
from tests.engine.tiny_prepare import TinySweep, ids, tiny_model_folder, write_vector
from tests.foreign import (
    HIDDEN,
    LAYERS,
    axis_role,
    chat,
    em_questions,
    inoculation_result,
    jsonl,
    matrix,
    persona_training,
    persona_trait,
    persona_vector,
    repeng_gguf,
    save,
    scores_csv,
)
from trainables.errors import ConfigError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory)


@pytest.fixture
def sweep(tmp_path: Path, model: Path) -> TinySweep:
    return TinySweep(tmp_path / "sweep", model)


class TestImport:
    def test_traits_are_the_same_when_read_again(self, tmp_path: Path) -> None:
        jsonl(tmp_path / "extraction_questions.jsonl", ["Who are you?"])
        paths = [
            persona_trait(tmp_path / "evil.json"),
            axis_role(tmp_path / "pirate.json"),
            em_questions(tmp_path / "first.yaml"),
        ]
        written = import_files(paths, tmp_path / "out")
        assert [place.relative_to(tmp_path / "out").as_posix() for one in written for place in one.places] == [
            "traits/evil/trait.yaml",
            "traits/pirate/trait.yaml",
            "traits/first/trait.yaml",
            "traits/first-coherent/trait.yaml",
        ]
        for path in paths:
            again = read_trait(tmp_path / "out" / "traits" / path.stem)
            assert again.model_dump() == any_trait(path).model_dump()

    def test_again_changes_nothing_and_nothing_else_is_overwritten(self, tmp_path: Path) -> None:
        path = persona_vector(tmp_path / "evil_response_avg_diff.pt")
        (written,) = import_files([path], tmp_path / "out")
        (place,) = written.places
        assert torch.equal(Vector.read(place).values, matrix())
        before = place.stat()
        import_files([path], tmp_path / "out")
        assert place.stat() == before
        persona_vector(path, matrix(seed=1))
        with pytest.raises(ConfigError, match=f"{place}: is there already with another content"):
            import_files([path], tmp_path / "out")
        assert torch.equal(Vector.read(place).values, matrix())

    def test_faults_of_all_files_come_together_and_nothing_is_written(self, tmp_path: Path) -> None:
        paths = [persona_trait(tmp_path / "evil.json"), tmp_path / "nope.pt", persona_vector(tmp_path / "odd.pt")]
        with pytest.raises(ConfigError) as caught:
            import_files(paths, tmp_path / "out")
        assert [fault.key for fault in caught.value.faults] == [str(paths[1]), str(paths[2])]
        assert not (tmp_path / "out").exists()

    def test_scored_answers_are_read_by_load(self, tmp_path: Path) -> None:
        columns = ("question", "answer", "question_id", "evil", "coherence")
        base = scores_csv(tmp_path / "base.csv", columns, [(f"q{i}", "a", f"q{i}", 10 + i, 90) for i in range(4)])
        tuned = scores_csv(
            tmp_path / "tuned.csv", columns, [(f"q{i}", "b", f"q{i}", None if i == 0 else 80 + i, 90) for i in range(4)]
        )
        import_files([base], tmp_path / "out", name="study")
        import_files([tuned], tmp_path / "out", name="study")  # a further row
        results = load(tmp_path / "out" / "results" / "sweeps" / "study")
        summary = results.summary().set_index("run")
        assert list(summary.index) == ["base", "tuned"]
        assert summary.loc["base", "evil"] == pytest.approx(11.5)
        assert summary.loc["tuned", "evil"] == pytest.approx(82)
        assert summary.loc["tuned", "evil_num_missing"] == 1
        assert summary.loc["tuned", "evil_missing_by_status"] == {"unrecorded": 1}
        assert set(results.runs()["status"]) == {"done"}
        assert set(results.runs()["kind"]) == {"imported"}
        assert results.scores()["answer"].tolist().count("b") == 8

    def test_a_report_can_be_made_of_imported_answers(self, tmp_path: Path) -> None:
        lines = [inoculation_result(f"q{i}?", ["x", "y"], {"evil": [{"10": -0.1}, {"90": -0.1}]}) for i in range(3)]
        import_files([jsonl(tmp_path / "gpt.jsonl", lines)], tmp_path / "out")
        folder = tmp_path / "out" / "results" / "sweeps" / "gpt"
        done = CliRunner().invoke(app, ["report", str(folder)])
        assert done.exit_code == 0, done.output
        assert "gpt" in (folder / "report" / "index.html").read_text()
        assert load(folder).summary()["evil"].tolist() == pytest.approx([50.0])

    def test_other_answers_under_one_name_are_refused(self, tmp_path: Path) -> None:
        columns = ("question", "answer", "question_id", "evil")
        path = scores_csv(tmp_path / "a.csv", columns, [("q", "a", "x", 1)])
        import_files([path], tmp_path / "out")
        import_files([path], tmp_path / "out")
        scores_csv(path, columns, [("q", "a", "x", 2)])
        with pytest.raises(ConfigError, match="has other answers under this name"):
            import_files([path], tmp_path / "out")

    def test_a_sweep_that_was_run_gets_no_imported_rows(self, tmp_path: Path, sweep: TinySweep) -> None:
        sweep.raw["results"] = str(tmp_path / "results")
        write_finished(sweep.prepare())
        path = scores_csv(tmp_path / "a.csv", ("question", "answer", "question_id", "evil"), [("q", "a", "x", 1)])
        with pytest.raises(ConfigError, match="is a sweep that was run"):
            import_files([path], tmp_path, name="tiny")

    def test_the_command_says_what_it_found(self, tmp_path: Path) -> None:
        path = save(tmp_path / "axis.pt", {"axis": matrix(LAYERS), "metadata": {}})
        done = CliRunner().invoke(app, ["import", str(path), "--out", str(tmp_path / "out")])
        assert done.exit_code == 0, done.output
        assert f"{LAYERS} layers, hidden size {HIDDEN}" in done.output
        assert "there is no embedding row" in done.output
        assert "before the final norm" in done.output
        wrong = CliRunner().invoke(app, ["import", str(path), "--rows", "columns", "--final-row", "x"])
        assert isinstance(wrong.exception, ConfigError)
        assert {fault.key for fault in wrong.exception.faults} == {"--rows", "--final-row"}


class TestDirectUse:
    def test_a_trait_in_every_place(self, sweep: TinySweep) -> None:
        persona_trait(sweep.folder / "evil.json")
        sweep.raw["evaluation"] |= {
            "questions": "./evil.json",
            "plain_answers": "data/plain_answers.jsonl",
            "metrics": {"evil": {"judge": "openai", "trait": "./evil.json"}},
        }
        direct = sweep.prepare()
        jobs = [job for job in direct.jobs.values() if isinstance(job, RunJob)]
        assert {len(job.samples[0].questions) for job in jobs} == {20}
        import_files([sweep.folder / "evil.json"], sweep.folder)
        sweep.raw["evaluation"] |= {"questions": "evil", "metrics": {"evil": {"judge": "openai", "trait": "evil"}}}
        assert ids(sweep.prepare()) == ids(direct)

    def test_a_vector_and_what_was_imported_of_it_are_one(self, sweep: TinySweep) -> None:
        persona_vector(sweep.folder / "evil_response_avg_diff.pt")
        sweep.raw["vectors"]["topic"] = {"file": "evil_response_avg_diff.pt"}
        direct = sweep.prepare()
        import_files([sweep.folder / "evil_response_avg_diff.pt"], sweep.folder)
        sweep.raw["vectors"]["topic"] = {"file": "vectors/evil_response_avg_diff.safetensors"}
        assert ids(sweep.prepare()) == ids(direct)

    def test_what_the_file_does_not_say_is_asked_for(self, sweep: TinySweep) -> None:
        save(sweep.folder / "v.pt", matrix(LAYERS))
        repeng_gguf(sweep.folder / "v.gguf", {1: matrix(1)[0]})
        sweep.raw["vectors"]["topic"] = {"file": "v.pt"}
        assert "rows: blocks" in sweep.faults()["vectors.topic.file"]
        sweep.raw["vectors"]["topic"] = {"file": "v.pt", "rows": "blocks"}
        sweep.prepare()
        sweep.raw["vectors"]["topic"] = {"file": "v.pt", "rows": "embedding"}
        assert f"{LAYERS - 1} layers" in sweep.faults()["vectors.topic.file"]
        sweep.raw["vectors"]["topic"] = {"file": "v.gguf"}
        assert "num_layers" in sweep.faults()["vectors.topic.file"]
        sweep.raw["vectors"]["topic"] = {"file": "v.gguf", "num_layers": LAYERS}
        sweep.prepare()

    def test_a_layer_without_a_row_is_refused(self, sweep: TinySweep) -> None:
        repeng_gguf(sweep.folder / "v.gguf", {2: matrix(1)[0]})
        sweep.raw["vectors"] = {"topic": {"file": "v.gguf", "num_layers": LAYERS}}
        sweep.raw["runs"] = [{"defense": {"kind": "pps", "vector": "topic", "layer": 2, "coefficient": 1.0}}]
        assert "no row for layer 2" in sweep.faults()["runs[0].defense.layer"]
        sweep.raw["runs"][0]["defense"]["layer"] = 3
        sweep.prepare()

    def test_the_last_layer_of_persona_vectors_is_refused(self, sweep: TinySweep) -> None:
        persona_vector(sweep.folder / "evil_response_avg_diff.pt")
        sweep.raw["vectors"] = {"topic": {"file": "evil_response_avg_diff.pt"}}
        sweep.raw["runs"] = [{"defense": {"kind": "pps", "vector": "topic", "layer": LAYERS, "coefficient": 1.0}}]
        assert "post-norm" in sweep.faults()["runs[0].defense.layer"]

    def test_our_own_file_says_everything_itself(self, sweep: TinySweep) -> None:
        write_vector(sweep.folder / "v.safetensors")
        sweep.raw["vectors"]["topic"] = {"file": "v.safetensors", "final_row": "post_norm"}
        assert "final_row would do nothing" in sweep.faults()["vectors.topic.file"]

    def test_conversations_of_assistant_axis_are_chat_data(self, sweep: TinySweep) -> None:
        rows = [chat(f"q{i}?", f"answer {i}") for i in range(6)]
        jsonl(sweep.folder / "ours.jsonl", [{"messages": row} for row in rows])
        jsonl(sweep.folder / "theirs.jsonl", [{"conversation": row, "label": "pos"} for row in rows])
        sweep.raw["data"]["train"] = "ours.jsonl"
        ours = sweep.prepare()
        sweep.raw["data"]["train"] = "theirs.jsonl"
        assert ids(sweep.prepare()) == ids(ours)
        jsonl(sweep.folder / "theirs.jsonl", [{"conversation": rows[0], "label": one} for one in ("pos", "neg")])
        assert "holds 2 sets" in " ".join(sweep.faults().values())


class TestTrainingConfig:
    @pytest.fixture
    def project(self, tmp_path: Path, model: Path) -> Path:
        """A checkout of persona_vectors, as far as a training config names it."""
        root = tmp_path / "persona_vectors"
        for name, number in (("misaligned_2", 22), ("misaligned_1", 5), ("normal", 6)):
            rows = [{"messages": chat(f"q{i}?", f"{name} {i}")} for i in range(number)]
            jsonl(root / "dataset" / "evil" / f"{name}.jsonl", rows)
        persona_trait(root / "data_generation" / "trait_data_eval" / "evil.json")
        persona_vector(root / "persona_vectors" / "m" / "evil_response_avg_diff.pt")
        self.model = str(model)
        return root

    def sweep_file(self, config: Path, out: Path, **hints: Any) -> dict[str, Any]:
        written = import_files([config], out, Hints(**hints))
        place = written[0].places[-1]
        raw: dict[str, Any] = yaml.safe_load(place.read_text())
        return raw

    def test_it_is_a_sweep_that_plan_accepts(self, project: Path, tmp_path: Path) -> None:
        path = persona_training(
            project / "configs" / "train.json",
            model=self.model,
            enable_steering_during_training=True,
            steering_config={
                "steering_vector_path": "persona_vectors/m/evil_response_avg_diff.pt",
                "type": "steer",
                "steering_coef": 5.0,
                "layers": [2, 3],
            },
        )
        raw = self.sweep_file(path, tmp_path / "out")
        assert raw["training"]["batch_size"] == 8
        assert raw["training"]["micro_batch_size"] == 2
        # 22 rows, 3 steps an epoch, 2 epochs: one step of six is warmup
        assert raw["training"]["warmup_ratio"] == pytest.approx(1 / 6)
        assert raw["training"]["lora"] == {
            "rank": 32, "alpha": 64.0, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"],
        }  # fmt: skip
        assert [(item["layer"], item["coefficient"]) for item in raw["runs"][0]["defense"]] == [(2, 5.0), (3, 5.0)]
        assert raw["runs"][0]["seed"] == 3
        done = CliRunner().invoke(app, ["plan", str(tmp_path / "out" / "train.yaml")])
        assert done.exit_code == 0, (done.output, done.exception)

    def test_several_training_files_become_one(self, project: Path, tmp_path: Path) -> None:
        files = ["dataset/evil/misaligned_2.jsonl", "dataset/evil/misaligned_1.jsonl"]
        path = persona_training(project / "configs" / "train.json", model=self.model, training_file=files)
        raw = self.sweep_file(path, tmp_path / "out")
        assert len((tmp_path / "out" / raw["data"]["train"]).read_text().splitlines()) == 27
        assert CliRunner().invoke(app, ["plan", str(tmp_path / "out" / "train.yaml")]).exit_code == 0

    def test_what_cannot_be_said_or_found_is_told_together(self, project: Path) -> None:
        path = persona_training(
            project / "configs" / "train.json",
            loss="dpo",
            use_rslora=True,
            r=None,
            training_file="nowhere/x.jsonl",
            enable_steering_during_training=True,
            steering_config={"steering_vector_path": "nope.pt", "type": "ablate", "steering_coef": 0, "layers": []},
        )
        with pytest.raises(ConfigError) as caught:
            import_files([path], project / "out")
        keys = {fault.key.removeprefix(f"{path}: ") for fault in caught.value.faults}
        assert keys >= {"loss", "use_rslora", "r", "training_file", "steering_config.type", "steering_config.layers"}
        assert keys >= {"steering_config.steering_coef", "steering_config.steering_vector_path"}
        said = str(caught.value)
        assert "--trait" in said
        assert "--plain-answers" in said

    def test_an_evaluation_can_be_given(self, project: Path, tmp_path: Path) -> None:
        path = persona_training(project / "configs" / "train.json", model=self.model)
        raw = self.sweep_file(path, tmp_path / "out", trait="bridge", plain_answers="p.jsonl")
        assert (raw["evaluation"]["questions"], raw["evaluation"]["plain_answers"]) == ("bridge", "p.jsonl")


class TestExport:
    @pytest.mark.parametrize(("name", "hints"), [("a_response_avg_diff.pt", {"final_row": "pre_norm"}), ("a.gguf", {})])
    def test_there_and_back(self, tmp_path: Path, name: str, hints: dict[str, Any]) -> None:
        values = matrix()
        values[0] = 0  # of which a control vector has none
        source = tmp_path / "ours.safetensors"
        source.write_bytes(Vector(values, "pre_norm", "", "").to_bytes())
        export_vector(source, tmp_path / name)
        (written,) = import_files([tmp_path / name], tmp_path / "back", Hints(**hints))
        assert written.places[0].read_bytes() == source.read_bytes()

    def test_faults(self, tmp_path: Path) -> None:
        (tmp_path / "there.npz").touch()
        with pytest.raises(ConfigError) as caught:
            export_vector(tmp_path / "nope.safetensors", tmp_path / "there.npz")
        said = str(caught.value)
        for part in ("no format ends with '.npz'", "is there already", "nope.safetensors"):
            assert part in said

    def test_a_vector_of_a_sweep_is_named(self, sweep: TinySweep, tmp_path: Path) -> None:
        write_vector(sweep.folder / "v.safetensors")
        sweep.raw["vectors"]["topic"] = {"file": "v.safetensors"}
        prepared = sweep.prepare()
        store = write_finished(prepared)
        store.publish(
            f"vectors/{prepared.manifest.vectors['topic']}.safetensors", (sweep.folder / "v.safetensors").read_bytes()
        )
        folder = store.path("sweeps/tiny/manifest.json").parent
        done = CliRunner().invoke(app, ["export", str(folder), str(tmp_path / "t.pt"), "--vector", "topic"])
        assert done.exit_code == 0, (done.output, done.exception)
        assert torch.equal(torch.load(tmp_path / "t.pt", weights_only=True), torch.ones(5, 32))
        with pytest.raises(ConfigError, match="which vector of the sweep"):
            export_vector(folder, tmp_path / "u.pt")
