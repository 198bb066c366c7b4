"""Values of a sweep file: how they are written, on the command line too, and which are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from analysis.judges import RuleMetric
from analysis.vectors import RandomVector
from engine.sweep_file import load_sweep
from tests.engine.sweep_writing import Files, labels, minimal, only
from trainables.defenses import Pps
from trainables.errors import ConfigError


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


class TestNumbersAndText:
    @pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "0.001", "+.001", "1.0e-3"])
    def test_every_way_to_write_a_number(self, files: Files, text: str) -> None:
        raw = yaml.safe_dump(minimal()).replace("learning_rate: 0.001", f"learning_rate: {text}")
        assert files.load(raw).cells[0].training.learning_rate == 0.001
        assert files.load(minimal(), f"training.learning_rate={text}").cells[0].training.learning_rate == 0.001
        (cell,) = files.load(minimal(runs=[{"defense": "none"}]), f"axes.training.epochs.grid=[{text}]").cells
        assert cell.training.epochs == 0.001

    def test_yaml_1_1_surprises_are_text(self, files: Files) -> None:
        vectors = "{no: {file: 'on'}, on: {file: 12:30}, '1': {file: 2024-01-01}, y: {file: 0x1F}}"
        sweep = files.load(minimal(runs=[{"defense": "none"}]), f"vectors={vectors}")
        assert {name: vector.model_dump()["file"] for name, vector in sweep.vectors.items()} == {
            "no": "on",
            "on": "12:30",
            "1": "2024-01-01",
            "y": "0x1F",
        }
        assert [cell.seed for cell in files.load(minimal(), "axes.seed.grid=[010]").cells] == [10, 10]

    def test_anchors_and_merge_keys(self, files: Files) -> None:
        text = yaml.safe_dump(minimal(runs=None)) + (
            "runs:\n- defense: &steer {kind: pps, vector: bridge, layer: 3, coefficient: 1}\n"
            "- defense: {<<: *steer, layer: 4}\n"
        )
        assert labels(files.load(text)) == ["pps bridge L3 x1", "pps bridge L4 x1"]

    @pytest.mark.parametrize(
        ("override", "key", "message"),
        [
            ("training.epochs=true", "training.epochs", "must be a number; got true"),
            ("training.batch_size=true", "training.batch_size", "must be a whole number; got true"),
            ("training.batch_size=8.0", "training.batch_size", "must be a whole number; got 8.0"),
            ('training.batch_size="8"', "training.batch_size", "must be a whole number; got '8'"),
            ('training.learning_rate="1e-3"', "training.learning_rate", "must be a number; got '1e-3'"),
            ("training.learning_rate=.nan", "training.learning_rate", "must be a finite number; got NaN"),
            ("training.learning_rate=.inf", "training.learning_rate", "must be a finite number; got Infinity"),
            ("training.learning_rate=0", "training.learning_rate", "must be greater than 0; got 0"),
            ("training.warmup_ratio=1", "training.warmup_ratio", "must be less than 1; got 1"),
            ("training.lora=4", "training.lora", "must be a mapping; got 4"),
            ("training.lora.target_modules=q", "training.lora.target_modules", "must be a list; got 'q'"),
            ("base.model=3", "base.model", "must be text; got 3"),
            ('base.model=""', "base.model", "must not be empty; got ''"),
            ("data.train=5", "data.train", "must be text or a mapping; got 5"),
            ("data.allow_truncated_away=1", "data.allow_truncated_away", "must be true or false; got 1"),
            ("data.max_length=4", "data.max_length", "must be at least 8; got 4"),
            (
                "training.schedule=liner",
                "training.schedule",
                "must be 'linear' or 'cosine' or 'constant'; got 'liner'; did you mean linear?",
            ),
            ("evaluation.samples=0", "evaluation.samples", "must be at least 1; got 0"),
            ("evaluation.metrics={}", "evaluation.metrics", "must not be empty; got {}"),
            ("execution.trials=all", "execution.trials", "must be 'auto' or a whole number; got 'all'"),
            ("execution.trials=0", "execution.trials", "must be at least 1; got 0"),
            ("execution.trials=true", "execution.trials", "must be 'auto' or a whole number; got true"),
            ("execution.zero_stage=4", "execution.zero_stage", "; got 4"),
            ("execution.zero_stage=true", "execution.zero_stage", "must be a whole number; got true"),
            ("execution.gpus_per_trial=1.5", "execution.gpus_per_trial", "above 1 a trial takes whole GPUs; got 1.5"),
            ("execution.memory_gb_per_trial=0", "execution.memory_gb_per_trial", "must be greater than 0; got 0"),
            ("runs.0.seed=-1", "runs[0].seed", "must be at least 0; got -1"),
            ("runs.0.seed=1.5", "runs[0].seed", "must be a whole number; got 1.5"),
            ("runs.0.label=3", "runs[0].label", "must be text; got 3"),
            ('runs.0.label=""', "runs[0].label", "a label is one line of text"),
            ("runs.1.defense.layer=true", "runs[1].defense.layer", "must be a whole number; got true"),
            ('runs.1.defense.layer="20"', "runs[1].defense.layer", "must be a whole number; got '20'"),
            ("runs.1.defense=pps", "runs[1].defense", "must be none, one item such as {kind: ...}, or a list"),
            ("runs.1.defense=true", "runs[1].defense", "or a list of items; got true"),
            ("runs.1.defense=[none]", "runs[1].defense[0]", "must be a mapping"),
            ("name=3", "name", "must be text; got 3"),
            ("results=''", "results", "must not be empty"),
            ("vectors.random.seed=x", "vectors.random.seed", "must be a whole number; got 'x'"),
            ("vectors=3", "vectors", "must be a mapping; got 3"),
        ],
    )
    def test_wrong_values_say_what_was_given_and_what_is_allowed(
        self, files: Files, override: str, key: str, message: str
    ) -> None:
        faults = files.faults(minimal(vectors=minimal()["vectors"]), override)
        if key == "vectors":  # the defense then names a vector that is nowhere
            faults.pop("runs[1].defense.vector")
        assert message in only(faults, key)


class TestOverrides:
    def test_places_in_lists_and_whole_sections(self, files: Files) -> None:
        sweep = files.load(
            minimal(),
            "runs.1.defense.layer=12",
            "runs[0].label=plain",
            "training={learning_rate: 2e-4, epochs: 2}",
            "training.epochs=5",  # in order
            "evaluation.metrics.own={judge: rule, patterns: [a=b]}",
            "execution.trials=3",
            "results=s3://bucket/a=b",
            "vectors.random.seed=4",
            "base.revision=",
        )
        assert sweep.cells[1].defense == (Pps(vector="bridge", layer=12, coefficient=1.5),)
        assert labels(sweep)[0] == "plain"
        assert (sweep.cells[0].training.learning_rate, sweep.cells[0].training.epochs) == (2e-4, 5)
        assert sweep.cells[0].evaluation.metrics["own"] == RuleMetric(patterns=("a=b",))
        assert (sweep.execution.trials, sweep.results) == (3, "s3://bucket/a=b")
        assert sweep.vectors["random"] == RandomVector(random_like="bridge", seed=4)
        assert sweep.cells[0].base.revision is None
        assert sweep.raw["runs"][1]["defense"]["layer"] == 12
        assert sweep.raw["execution"] == {"trials": 3}

    def test_axes_hold_dots(self, files: Files) -> None:
        raw = minimal(axes={"training.learning_rate": {"grid": [1.0]}})
        sweep = files.load(raw, "axes.training.learning_rate.grid.0=0.5", "axes.training.lora.rank.grid=[1, 2]")
        assert [(cell.training.learning_rate, cell.training.lora.rank) for cell in sweep.cells] == [
            (0.5, 1),
            (0.5, 2),
        ] * 2
        sweep = files.load(minimal(), "axes.training.learning_rate={grid: [1, 2]}", "axes.seed={grid: [3]}")
        assert [cell.training.learning_rate for cell in sweep.cells] == [1, 2, 1, 2]

    @pytest.mark.parametrize("override", ["nonsense", "=3", "x..y=1", ".x=1", " =1", ""])
    def test_malformed(self, files: Files, override: str) -> None:
        faults = files.faults(minimal(), override)
        assert only(faults, override) == "an override is written key=value, such as training.epochs=1"

    @pytest.mark.parametrize(
        ("override", "key", "message"),
        [
            ("runs.2.seed=1", "runs.2.seed", "runs is a list; '2' is none of its places (0 to 1)"),
            ("runs.first.seed=1", "runs.first.seed", "'first' is none of its places"),
            ("runs.0.defense.layer=1", "runs.0.defense.layer", "runs.0.defense is 'none', which has no 'layer'"),
            ("name.x=1", "name.x", "name is 'small', which has no 'x'"),
            ("training.epochs=[1", "training.epochs", "the value '[1': not valid YAML"),
            ("training={epochs: 1, epochs: 2}", "training", "the key 'epochs' stands twice"),
            ("training.epochs=1: 2", "training.epochs", "a key must be text; got 1"),
        ],
    )
    def test_what_cannot_be_written(self, files: Files, override: str, key: str, message: str) -> None:
        assert message in only(files.faults(minimal(), override), key)

    def test_an_override_that_an_axis_would_hide(self, files: Files) -> None:
        raw = minimal(axes={"training.learning_rate": {"grid": [1, 2]}})
        message = only(files.faults(raw, "training.learning_rate=3"), "training.learning_rate")
        assert (
            message
            == "axes.training.learning_rate sets this for every run; override axes.training.learning_rate instead"
        )

    def test_the_file_is_not_written(self, files: Files) -> None:
        files.load(minimal())
        before = files.path.read_bytes()
        load_sweep(files.path, ["training.epochs=1"])
        assert files.path.read_bytes() == before
        assert [path.name for path in files.path.parent.iterdir()] == ["sweep.yaml"]


class TestText:
    @pytest.mark.parametrize(
        ("text", "line", "message"),
        [
            ("name: x\nruns: [1\nbase: 2\n", 3, "not valid YAML"),
            ("name: x\n\truns: []\n", 2, "not valid YAML"),
            ("name: 'x\n", 2, "not valid YAML"),
            ("name: x\nbase: \x01\n", 2, "special characters are not allowed"),
            ("name: x\nbase: !!python/object:os.system {}\n", 2, "the tag !!python/object:os.system is not allowed"),
            ("name: x\nbase: &a [*a]\n", 2, "contains itself"),
            ("name: x\n1: 2\n", 2, "a key must be text; got 1"),
            ("name: x\n[a]: 2\n", 2, "a key must be text; got a list or mapping"),
            ("name: x\nbase: *nothing\n", 2, "undefined alias"),
            ("name: x\n---\nname: y\n", 2, "not valid YAML"),
        ],
    )
    def test_faults_of_the_text_have_their_line(self, files: Files, text: str, line: int, message: str) -> None:
        assert message in only(files.faults(text), f"{files.path}:{line}")

    def test_a_key_that_stands_twice_beside_all_other_faults(self, files: Files) -> None:
        text = yaml.safe_dump(minimal()) + "trainig: {}\nname: again\nexecution: {trials: 1,\n  trials: 2}\n"
        faults = files.faults(text)
        lines = text.splitlines()
        assert f"first in line {lines.index('name: small') + 1}" in faults.pop(f"{files.path}:{len(lines) - 2}")
        assert "the key 'trials' stands twice" in faults.pop(f"{files.path}:{len(lines)}")
        assert "did you mean training?" in only(faults, "trainig")

    @pytest.mark.parametrize(
        ("text", "what"), [("", "it is empty"), ("# x\n", "it is empty"), ("- 1\n", "it holds [1]")]
    )
    def test_no_mapping(self, files: Files, text: str, what: str) -> None:
        assert what in only(files.faults(text), str(files.path))

    def test_a_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        for path, message in ((tmp_path / "no.yaml", "No such file"), (tmp_path, "directory")):
            with pytest.raises(ConfigError) as caught:
                load_sweep(path)
            (fault,) = caught.value.faults
            assert fault.key == str(path)
            assert message in fault.message

    def test_a_file_that_is_no_text(self, files: Files) -> None:
        files.path.write_bytes(b"name: \xff\n")
        with pytest.raises(ConfigError, match="not UTF-8 text"):
            load_sweep(files.path)

    def test_a_nesting_without_end(self, files: Files) -> None:
        assert "nested too deeply" in only(files.faults("[" * 5000), str(files.path))
