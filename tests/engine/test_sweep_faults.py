"""Every mistake in a sweep file is found at once, under the key that the user wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.sweep_file import (
    check_sweep,
)
from tests.engine.sweep_writing import PPS, Files, minimal, only
from trainables.errors import ConfigError, Fault


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_all_faults_at_once(files: Files) -> None:
    raw = minimal(runs=[{"defense": {**PPS, "vector": "x", "layer": "x"}}, {"defense": "none", "sede": 1}], trials=1)
    faults = files.faults(raw, "training.epochs=x", "nonsense", "execution.trials=-1", "vectors.v={file: 1}")
    assert set(faults) == {
        "nonsense",
        "trials",
        "execution.trials",
        "vectors.v.file",
        "training.epochs",
        "runs[0].defense.vector",
        "runs[0].defense.layer",
        "runs[1].sede",
    }


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("override", "key", "message"),
        [
            ("trainig.epochs=1", "trainig", "unknown key; did you mean training? allowed: name, results, base"),
            ("epochs=1", "epochs", "unknown key; did you mean training.epochs?"),
            ("trials=1", "trials", "unknown key; did you mean execution.trials?"),
            ("seed=1", "seed", "belongs in a block of runs, or for every block in axes: {seed: {grid: [...]}}"),
            ("zzz=1", "zzz", "unknown key; allowed: name, results"),
            ("training.learnig_rate=1", "training.learnig_rate", "unknown key; did you mean learning_rate?"),
            ("training.lora.rnk=1", "training.lora.rnk", "did you mean rank? allowed: rank, alpha, dropout"),
            ("base.mdel=x", "base.mdel", "unknown key; did you mean model? allowed: model, revision, dtype"),
            ("evaluation.sampels=1", "evaluation.sampels", "did you mean samples?"),
            (
                "evaluation.metrics.trait.pattern=[a]",
                "evaluation.metrics.trait.pattern",
                "did you mean patterns? allowed: judge, trait, patterns",
            ),
            ("execution.trial=1", "execution.trial", "did you mean trials?"),
            ("runs.1.defnse=1", "runs[1].defnse", "did you mean defense? allowed: base, data, defense, start_from"),
            ("runs.1.defense.layr=1", "runs[1].defense.layr", "did you mean layer? allowed: kind, vector, layer"),
            ("runs.1.training.epoch=1", "runs[1].training.epoch", "did you mean epochs?"),
            ("vectors.random.sede=1", "vectors.random.sede", "did you mean seed? allowed: random_like, seed"),
            ("vectors.bridge.difference.posit=x", "vectors.bridge.difference.posit", "did you mean positive?"),
            ("axes.sede.grid=[1]", "axes.sede", "unknown key; did you mean seed? allowed: base, data"),
            ("axes.training.epoch.grid=[1]", "axes.training.epoch", "did you mean epochs?"),
            (
                "runs.1.defense.kind=ppps",
                "runs[1].defense.kind",
                "unknown kind 'ppps'; did you mean pps? allowed: pps, i",
            ),
            (
                "evaluation.metrics.trait.judge=rle",
                "evaluation.metrics.trait.judge",
                "unknown judge 'rle'; did you mean rule? allowed: rule",
            ),
        ],
    )
    def test_with_the_nearest_valid_one(self, files: Files, override: str, key: str, message: str) -> None:
        assert message in only(files.faults(minimal(), override), key)

    def test_once_although_every_cell_has_it(self, files: Files) -> None:
        raw = minimal(axes={"seed": {"grid": [0, 1, 2]}})
        raw["runs"][1]["defense"] = {**PPS, "layr": {"grid": [1, 2]}}
        raw["training"]["epoch"] = 1
        assert set(files.faults(raw)) == {"training.epoch", "runs[1].defense.layr"}

    def test_two_values_of_a_grid_can_both_be_wrong(self, files: Files) -> None:
        raw = minimal(runs=[{"defense": {**PPS, "layer": {"grid": ["x", 1, "y"]}}}])
        files.path.write_text(yaml.safe_dump(raw))
        _, faults = check_sweep(files.path)
        assert faults == [
            Fault("runs[0].defense.layer", "must be a whole number; got 'x'"),
            Fault("runs[0].defense.layer", "must be a whole number; got 'y'"),
        ]


class TestMissing:
    def test_learning_rate_once(self, files: Files) -> None:
        faults = files.faults(minimal(training={"epochs": 1}, axes={"seed": {"grid": [0, 1]}}))
        assert only(faults, "training.learning_rate") == "missing, and it has no default"

    def test_learning_rate_in_some_blocks_only(self, files: Files) -> None:
        given = {"defense": "none", "training": {"learning_rate": 0.1}}
        faults = files.faults(minimal(training=None, runs=[{"defense": "none"}, given, {"defense": PPS}]))
        assert only(faults, "training.learning_rate") == "missing, and it has no default (in runs[0], runs[2])"

    def test_everything(self, files: Files) -> None:
        faults = files.faults("name: x\nruns: [{seed: 1}]\n")
        assert set(faults) == {
            "base.model",
            "data.train",
            "training.learning_rate",
            "evaluation.questions",
            "evaluation.metrics",
            "runs[0].defense",
        }
        assert "write defense: none" in faults.pop("runs[0].defense")
        assert set(faults.values()) == {"missing, and it has no default"}

    def test_the_sections_are_checked_without_usable_runs(self, files: Files) -> None:
        faults = files.faults(minimal(runs=None, training={"epochs": "x", "learning_rate": 1}))
        assert faults == {"runs": "missing, and it has no default", "training.epochs": "must be a number; got 'x'"}
        assert "must not be empty" in only(files.faults(minimal(runs=[])), "runs")
        assert "must be a list; got 3" in only(files.faults(minimal(runs=3)), "runs")
        assert "must be a mapping; got 'none'" in only(files.faults(minimal(runs=["none"])), "runs[0]")

    def test_parts_of_a_defense(self, files: Files) -> None:
        faults = files.faults(minimal(runs=[{"defense": {"kind": "pps"}}, {"defense": [PPS, {"layer": 3}]}]))
        assert faults == {
            "runs[0].defense.vector": "missing, and it has no default",
            "runs[0].defense.coefficient": "missing, and it has no default",
            "runs[1].defense[1].kind": "missing; allowed: pps, inoculation, gradient_edit, ablation, "
            "projection_penalty, activation_penalty, gradient_penalty",
        }

    def test_a_section_of_the_wrong_type_is_one_fault(self, files: Files) -> None:
        assert only(files.faults(minimal(training=5)), "training") == "must be a mapping; got 5"

    def test_sources_of_a_metric(self, files: Files) -> None:
        faults = files.faults(minimal(), "evaluation.metrics={a: {judge: rule}, b: {trait: bridge}}")
        assert "exactly one of trait and patterns" in faults.pop("evaluation.metrics.a")
        assert "missing; allowed: rule" in only(faults, "evaluation.metrics.b.judge")

    def test_hub_dataset_without_hub(self, files: Files) -> None:
        faults = files.faults(minimal(data={"train": {"hbu": "x"}}))
        assert faults["data.train.hub"] == "missing, and it has no default"
        assert "did you mean hub?" in faults["data.train.hbu"]
        assert len(faults) == 2


class TestGridFaults:
    @pytest.mark.parametrize(
        ("override", "key", "message"),
        [
            ("runs.1.defense.layer={grid: []}", "runs[1].defense.layer", "the grid is empty"),
            ("runs.1.defense.layer={grid: 3}", "runs[1].defense.layer", "a grid must be a list of values"),
            ("runs.1.defense.grid=[1]", "runs[1].defense", "a grid stands alone in its mapping; found beside it: kind"),
            ("axes.seed.grid=[]", "axes.seed", "the grid is empty"),
            ("axes.seed=3", "axes.seed", "an axis is written {grid: [...]}; got 3"),
            ("axes.seed=[1]", "axes.seed", "an axis is written {grid: [...]}; got [1]"),
            ("axes=3", "axes", "must be a mapping; got 3"),
            (
                "training.learning_rate.x=1",
                "training.learning_rate.x",
                "training.learning_rate is 0.001, which has no 'x'; set training.learning_rate as a whole",
            ),
            (
                "training.learning_rate={grid: [1, 2]}",
                "training.learning_rate",
                "only in a block of runs or in axes; for every block write it in axes: {training.learning_rate:",
            ),
            ("training={grid: [{learning_rate: 1}]}", "training", "only in a block of runs or in axes"),
            ("vectors.random.random_like={grid: [bridge]}", "vectors.random.random_like", "only in a block of runs"),
            ("axes.defense.layer.grid=[1]", "axes.defense.layer", "cannot be set in runs[0]: defense is 'none'"),
        ],
    )
    def test_where_no_grid_can_be(self, files: Files, override: str, key: str, message: str) -> None:
        raw = minimal()
        if key == "axes.defense.layer":
            raw["runs"][1]["defense"] = {"kind": "pps", "vector": "bridge", "coefficient": 1}
        assert message in only(files.faults(raw, override), key)

    def test_an_axis_that_a_block_also_sets(self, files: Files) -> None:
        runs = [{"defense": "none", "seed": {"grid": [3, 4]}}, {"defense": PPS, "training": {"learning_rate": 1}}]
        axes = {"seed": {"grid": [0]}, "training.learning_rate": {"grid": [1]}}
        faults = files.faults(minimal(runs=runs, axes=axes))
        assert faults["runs[0].seed"] == "is also an axis; say it in one place, here or in axes.seed"
        assert "axes.training.learning_rate" in faults["runs[1].training.learning_rate"]
        assert len(faults) == 2

    def test_axes_that_overlap(self, files: Files) -> None:
        axes = {"training": {"grid": [{"epochs": 1}]}, "training.epochs": {"grid": [1]}}
        assert "overlaps axes.training" in only(files.faults(minimal(axes=axes)), "axes.training.epochs")

    def test_a_wrong_value_of_an_axis(self, files: Files) -> None:
        faults = files.faults(minimal(axes={"training.learning_rate": {"grid": [0.1, "x"]}}))
        assert only(faults, "axes.training.learning_rate") == "must be a number; got 'x'"


class TestVectors:
    def test_a_defense_names_a_vector_that_is_not_there(self, files: Files) -> None:
        runs = [{"defense": {**PPS, "vector": "brigde"}}, {"defense": [PPS, {**PPS, "vector": "zzz"}]}]
        assert files.faults(minimal(runs=runs)) == {
            "runs[0].defense.vector": "no vector 'brigde'; did you mean bridge? allowed: bridge, random",
            "runs[1].defense[1].vector": "no vector 'zzz'; allowed: bridge, random",
        }
        faults = files.faults(minimal(vectors=None))
        assert only(faults, "runs[1].defense.vector") == "no vector 'bridge'; allowed: none"

    def test_also_beside_other_faults_of_the_cell(self, files: Files) -> None:
        runs = [{"defense": {**PPS, "vector": "brigde"}}]
        assert set(files.faults(minimal(runs=runs, training={}))) == {
            "training.learning_rate",
            "runs[0].defense.vector",
        }

    @pytest.mark.parametrize(
        ("vectors", "key", "message"),
        [
            ({"x": {"random_like": "brige"}}, "vectors.x.random_like", "no vector 'brige'; did you mean bridge?"),
            ({"x": {"combine": [{"vector": "brige"}]}}, "vectors.x.combine[0].vector", "did you mean bridge?"),
            ({"x": {"combine": [{"vector": "x"}]}}, "vectors.x.combine[0].vector", "goes in a circle: x -> x"),
            ({"x": {"combine": [{"vector": "bridge", "weight": 0}]}}, "vectors.x.combine[0].weight", "adds nothing"),
            ({"x": {"random_like": "x"}}, "vectors.x.random_like", "goes in a circle: x -> x"),
            ({"x": {}}, "vectors.x", "needs exactly one of the keys difference, random_like, file"),
            ({"x": {"file": "a", "random_like": "bridge"}}, "vectors.x", "needs exactly one of the keys"),
            ({"x": {"diference": {}}}, "vectors.x", "did you mean difference?"),
            ({"x": "a.safetensors"}, "vectors.x", "needs exactly one of the keys"),
            ({"x": {"difference": {"positive": "a"}}}, "vectors.x.difference.negative", "missing"),
            ({"x": {"difference": {"positive": 1, "negative": "b"}}}, "vectors.x.difference.positive", "must be text"),
            ({"x": {"file": 3}}, "vectors.x.file", "must be text; got 3"),
            ({"a/b": {"file": "a"}}, "vectors.a/b", "a name has letters, digits"),
        ],
    )
    def test_what_is_no_vector(self, files: Files, vectors: dict[str, Any], key: str, message: str) -> None:
        faults = files.faults(minimal(vectors=minimal()["vectors"] | vectors))
        assert message in only(faults, key)

    def test_a_longer_circle_is_shown_and_what_leads_into_it_is_not(self, files: Files) -> None:
        vectors = {"a": {"random_like": "b"}, "b": {"random_like": "a"}, "c": {"random_like": "a"}}
        assert files.faults(minimal(vectors=minimal()["vectors"] | vectors)) == {
            "vectors.a.random_like": "goes in a circle: a -> b -> a",
            "vectors.b.random_like": "goes in a circle: b -> a -> b",
        }


class TestNames:
    @pytest.mark.parametrize("name", ["a/b", "../x", ".hidden", "a b", "", "grid", "ü", "a\n"])
    def test_a_sweep_is_a_folder(self, files: Files, name: str) -> None:
        assert "a name has letters, digits" in only(files.faults(minimal(name=name)), "name")

    @pytest.mark.parametrize("name", ["x y", "1st", "a.b", "grid", "a-b"])
    def test_a_metric_is_a_column(self, files: Files, name: str) -> None:
        raw = minimal()
        raw["evaluation"]["metrics"] = {name: {"judge": "rule", "trait": "bridge"}}
        with pytest.raises(ConfigError, match=r"a metric's name has|a grid stands only"):
            files.load(raw)

    @pytest.mark.parametrize("name", ["a", "2024-01-01", "a.b_c-d", "A1"])
    def test_good_names(self, files: Files, name: str) -> None:
        assert files.load(minimal(name=name)).name == name
