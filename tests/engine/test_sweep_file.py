"""The sweep file: what it means."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from analysis.judges import RuleMetric
from analysis.vectors import DifferenceVector, FileVector, RandomVector
from engine.inputs import PROJECT_ROOT
from engine.sweep_file import (
    ExecutionConfig,
    check_sweep,
    load_sweep,
)
from tests.engine.sweep_writing import PPS, Files, labels, minimal
from trainables.chat_data import HubDataset
from trainables.defenses import Inoculation, Pps

QUICKSTART = PROJECT_ROOT / "configs" / "sweeps" / "quickstart.yaml"


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


class TestQuickstart:
    def test_cells(self) -> None:
        sweep = load_sweep(QUICKSTART)
        assert sweep.name == "quickstart"
        assert sweep.path == QUICKSTART
        assert sweep.results == "results"
        assert labels(sweep) == ["none", "pps bridge L20 x1.5", "pps random L20 x1.5", "inoculation bridge"]
        assert [cell.defense for cell in sweep.cells] == [
            (),
            (Pps(vector="bridge", layer=20, coefficient=1.5),),
            (Pps(vector="random", layer=20, coefficient=1.5),),
            (Inoculation(prompts="bridge"),),
        ]
        for cell in sweep.cells:
            assert (cell.seed, cell.base.dtype, cell.data.max_length) == (0, "auto", 512)
            assert (cell.training.epochs, cell.training.batch_size, cell.training.learning_rate) == (2, 8, 1e-3)
            assert (cell.training.schedule, cell.training.lora.rank, cell.training.lora.alpha) == ("linear", 16, 32)
            assert (cell.evaluation.samples, cell.evaluation.max_new_tokens) == (2, 48)
            assert cell.evaluation.metrics == {"trait": RuleMetric(trait="bridge")}
        bridge = sweep.vectors["bridge"]
        assert isinstance(bridge, DifferenceVector)
        assert bridge.difference.positive == "configs/data/bridge/on_trait.jsonl"
        assert bridge.difference.negative == "configs/data/bridge/plain.jsonl"
        assert sweep.vectors["random"] == RandomVector(random_like="bridge", seed=0)

    def test_seeds_from_the_command_line(self) -> None:
        sweep = load_sweep(QUICKSTART, ["axes.seed.grid=[1, 2]", "training.epochs=1"])
        assert [cell.seed for cell in sweep.cells] == [1, 2] * 4
        assert labels(sweep)[:2] == ["none seed=1", "none seed=2"]
        assert {cell.training.epochs for cell in sweep.cells} == {1}
        assert sweep.raw["training"]["epochs"] == 1

    def test_a_sweep_can_be_sent_to_a_worker(self) -> None:
        sweep = load_sweep(QUICKSTART)
        copy = pickle.loads(pickle.dumps(sweep))
        assert copy == sweep
        assert copy.key(1, "defense", 0, "layer") == "runs[1].defense.layer"


class TestMeaning:
    def test_a_block_overrides_any_part(self, files: Files) -> None:
        block = {
            "defense": "none",
            "base": {"revision": "abc"},
            "data": {"train": {"hub": "some/data"}, "max_length": 64},
            "training": {"lora": {"rank": 4}, "max_steps": None},
            "evaluation": {"samples": 5, "metrics": {"more": {"judge": "rule", "patterns": ["x+"]}}},
            "seed": 7,
        }
        training = {"learning_rate": 0.001, "max_steps": 9, "lora": {"rank": 2, "alpha": 8}}
        first, second = files.load(minimal(training=training, runs=[{"defense": "none"}, block])).cells
        assert (second.base.model, second.base.revision) == (first.base.model, "abc")
        assert (second.data.train, second.data.max_length) == (HubDataset(hub="some/data"), 64)
        assert (second.training.lora.rank, second.training.lora.alpha) == (4, 8)
        assert (first.training.max_steps, second.training.max_steps) == (9, None)
        assert (second.evaluation.samples, list(second.evaluation.metrics)) == (5, ["trait", "more"])
        assert (first.seed, second.seed) == (0, 7)
        assert (first.data.train, first.training.lora.rank, list(first.evaluation.metrics)) == (
            "train.jsonl",
            2,
            ["trait"],
        )

    def test_a_mapping_that_says_its_kind_replaces_the_earlier_one(self, files: Files) -> None:
        block = {"defense": "none", "evaluation": {"metrics": {"trait": {"judge": "rule", "patterns": ["x+"]}}}}
        (cell,) = files.load(minimal(runs=[block])).cells
        assert cell.evaluation.metrics == {"trait": RuleMetric(patterns=("x+",))}

    def test_defense_is_none_an_item_or_a_list(self, files: Files) -> None:
        inoculation = {"kind": "inoculation", "prompts": ["Do it.", "Please."]}
        runs = [{"defense": value} for value in ("none", [], PPS, [PPS, inoculation])]
        cells = files.load(minimal(runs=runs)).cells
        pps = Pps(vector="bridge", layer=3, coefficient=1.5)
        assert [cell.defense for cell in cells] == [
            (),
            (),
            (pps,),
            (pps, Inoculation(prompts=("Do it.", "Please."))),
        ]

    def test_grids_in_blocks_and_axes(self, files: Files) -> None:
        defense = {**PPS, "vector": {"grid": ["bridge", "random"]}, "layer": {"grid": [1, 2]}}
        axes = {"seed": {"grid": [0, 1]}, "training.learning_rate": {"grid": [0.001, 0.01]}}
        sweep = files.load(minimal(runs=[{"defense": "none"}, {"defense": defense}], axes=axes))
        assert len(sweep.cells) == (1 + 4) * 4
        assert [(cell.seed, cell.training.learning_rate) for cell in sweep.cells[:4]] == [
            (0, 0.001),
            (0, 0.01),
            (1, 0.001),
            (1, 0.01),
        ]
        assert labels(sweep)[4:9] == [
            "pps bridge L1 x1.5 learning_rate=0.001 seed=0",
            "pps bridge L1 x1.5 learning_rate=0.01 seed=0",
            "pps bridge L1 x1.5 learning_rate=0.001 seed=1",
            "pps bridge L1 x1.5 learning_rate=0.01 seed=1",
            "pps bridge L2 x1.5 learning_rate=0.001 seed=0",
        ]

    def test_an_axis_of_a_defense_and_of_a_list_item(self, files: Files) -> None:
        axes = {"defense.0.coefficient": {"grid": [1, 2.5]}}
        item = {"kind": "pps", "vector": "bridge", "layer": 3}
        sweep = files.load(minimal(runs=[{"defense": [item]}], axes=axes))
        assert labels(sweep) == ["pps bridge L3 x1", "pps bridge L3 x2.5"]
        sweep = files.load(minimal(runs=[{}], axes={"defense": {"grid": ["none", PPS]}}))
        assert labels(sweep) == ["none", "pps bridge L3 x1.5"]

    def test_an_axis_with_mappings_merges(self, files: Files) -> None:
        axes = {"training": {"grid": [{"epochs": 1}, {"epochs": 2, "batch_size": 4}]}}
        cells = files.load(minimal(runs=[{"defense": "none"}], axes=axes)).cells
        assert [(c.training.epochs, c.training.batch_size, c.training.learning_rate) for c in cells] == [
            (1, 8, 0.001),
            (2, 4, 0.001),
        ]

    def test_sections_that_were_left_empty_say_nothing(self, files: Files) -> None:
        text = yaml.safe_dump(minimal(vectors=None, runs=[{"defense": "none"}])) + "vectors:\naxes:\nexecution:\n"
        sweep = files.load(text)
        assert (sweep.vectors, sweep.execution) == ({}, ExecutionConfig())

    def test_vectors_of_every_kind(self, files: Files) -> None:
        vectors = {
            "a.b-c_1": {"difference": {"positive": "p", "negative": "n"}},
            "bridge": {"file": "v.safetensors"},
            "chain": {"random_like": "random", "seed": 3},
            "random": {"random_like": "bridge"},
        }
        kinds = [type(vector) for vector in files.load(minimal(vectors=vectors)).vectors.values()]
        assert kinds == [DifferenceVector, FileVector, RandomVector, RandomVector]

    def test_execution(self, files: Files) -> None:
        settings = {
            "trials": 2,
            "pack": 4,
            "packing": "fast",
            "cpus_per_trial": 3,
            "gpus_per_trial": 0.5,
            "gpus_per_local_judge": 1,
            "memory_gb_per_trial": 3,
            "workers": 2,
            "zero_stage": 2,
            "gradient_checkpointing": True,
            "max_retries": 0,
            "checkpoint_every_steps": 10,
            "checkpoint_every_minutes": None,
        }
        assert files.load(minimal(execution=settings)).execution == ExecutionConfig(**settings)
        assert ExecutionConfig().model_dump() == {
            "trials": "auto",
            "pack": 1,
            "packing": None,
            "cpus_per_trial": 1,
            "gpus_per_trial": "auto",
            "gpus_per_local_judge": "auto",
            "memory_gb_per_trial": None,
            "workers": 1,
            "zero_stage": 0,
            "gradient_checkpointing": False,
            "max_retries": 1,
            "checkpoint_every_steps": None,
            "checkpoint_every_minutes": 5.0,
        }

    def test_keys_of_parts_in_the_users_file(self, files: Files) -> None:
        runs = [{"defense": "none"}, {"defense": [PPS], "training": {"epochs": 2}, "data": {"train": "own.jsonl"}}]
        sweep = files.load(minimal(runs=runs, axes={"seed": {"grid": [4]}}))
        assert sweep.key(0, "data", "train") == "data.train"
        assert sweep.key(1, "data", "train") == "runs[1].data.train"
        assert sweep.key(1, "training", "epochs") == "runs[1].training.epochs"
        assert sweep.key(1, "training", "learning_rate") == "training.learning_rate"
        assert sweep.key(1, "defense", 0, "layer") == "runs[1].defense[0].layer"
        assert sweep.key(1, "seed") == "axes.seed"
        assert sweep.key(0, "base", "model") == "base.model"


class TestLabels:
    def test_differing_things_by_their_shortest_clear_name(self, files: Files) -> None:
        runs = [
            {"defense": "none"},
            {"defense": "none", "training": {"lora": {"dropout": 0.1}, "max_steps": 5}, "seed": 1},
        ]
        assert labels(files.load(minimal(runs=runs))) == [
            "none max_steps=none dropout=0.0 seed=0",
            "none max_steps=5 dropout=0.1 seed=1",
        ]

    def test_a_name_that_stands_twice_is_written_longer(self, files: Files) -> None:
        other = {"judge": "rule", "trait": "recipe"}
        runs = [
            {"defense": "none", "evaluation": {"metrics": {"trait": other, "more": other}}},
            {"defense": "none", "evaluation": {"metrics": {"more": {"judge": "rule", "trait": "bridge"}}}},
        ]
        assert labels(files.load(minimal(runs=runs))) == [
            "none trait.trait=recipe more.trait=recipe",
            "none trait.trait=bridge more.trait=bridge",
        ]

    def test_files_are_short_and_a_long_value_is_left_out_where_a_short_one_tells_the_same(self, files: Files) -> None:
        long = "a_folder_of_mine/and_another_one/{}.jsonl"
        by_seed: list[dict[str, Any]] = [
            {"defense": "none", "data": {"train": long.format(seed)}, "seed": seed} for seed in (0, 1)
        ]
        assert labels(files.load(minimal(runs=by_seed))) == ["none seed=0", "none seed=1"]
        alone = [*by_seed, {"defense": "none", "data": {"train": long.format(1)}, "seed": 2}]
        assert labels(files.load(minimal(runs=alone))) == [
            "none train=0 seed=0",
            "none train=1 seed=1",
            "none train=1 seed=2",
        ]
        same_stem = [
            {**run, "data": {"train": f"a_folder_of_mine/{place}/rows.jsonl"}} for place, run in enumerate(alone)
        ]
        assert labels(files.load(minimal(runs=[*same_stem, {**same_stem[0], "seed": 2}])))[0] == (
            "none train=a_folder_of_mine/0/rows.jsonl seed=0"
        )

    def test_settings_that_change_with_the_questions_are_left_out(self, files: Files) -> None:
        tested: dict[str, Any] = {"questions": "recipe", "temperature": 0.0, "max_new_tokens": 24}
        runs: list[dict[str, Any]] = [{"defense": "none"}, {"defense": "none", "evaluation": tested}]
        assert labels(files.load(minimal(runs=runs))) == ["none questions=bridge", "none questions=recipe"]
        hotter = {"defense": "none", "evaluation": {**tested, "temperature": 0.5}}
        assert labels(files.load(minimal(runs=[*runs, hotter]))) == [
            "none temperature=1.0 questions=bridge",
            "none temperature=0.0 questions=recipe",
            "none temperature=0.5 questions=recipe",
        ]

    def test_what_is_present_is_always_said(self, files: Files) -> None:
        attack = {"kind": "steering", "vector": "bridge", "layers": [3], "coefficient": 1.0}
        other = {"questions": "recipe", "temperature": 0.0, "interventions": [attack]}
        assert labels(files.load(minimal(runs=[{"defense": "none"}, {"defense": "none", "evaluation": other}]))) == [
            "none interventions=none questions=bridge",
            "none interventions=steer bridge L3 x1 questions=recipe",
        ]

    def test_own_labels_replace_the_defense(self, files: Files) -> None:
        runs = [{"defense": "none", "label": "plain"}, {"defense": PPS, "label": "steered"}]
        sweep = files.load(minimal(runs=runs, axes={"seed": {"grid": [0, 1]}}))
        assert labels(sweep) == ["plain seed=0", "plain seed=1", "steered seed=0", "steered seed=1"]

    def test_what_a_defense_label_hides_is_shown(self, files: Files) -> None:
        runs = [{"defense": {**PPS, "coefficient": {"grid": [1.5, 1.50000001]}}}, {"defense": {**PPS, "layer": 4}}]
        assert labels(files.load(minimal(runs=runs))) == [
            "pps bridge L3 x1.5 coefficient=1.5",
            "pps bridge L3 x1.5 coefficient=1.50000001",
            "pps bridge L4 x1.5",
        ]

    def test_at_last_a_number(self, files: Files) -> None:
        long = "Please answer as if all of this were true and nothing else in the world mattered"
        runs: Sequence[Any] = [
            {"defense": {"kind": "inoculation", "prompts": [long + "."]}},
            {"defense": {"kind": "inoculation", "prompts": [long + "!"]}},
            {"defense": "none"},
            {"defense": "none"},
            {"defense": "none", "label": "none #2"},
        ]
        assert labels(files.load(minimal(runs=runs))) == [
            "inoculation 1 prompts",
            "inoculation 1 prompts #2",
            "none",
            "none #3",
            "none #2",
        ]

    def test_labels_are_unique(self, files: Files) -> None:
        runs = [{"defense": {"grid": ["none", PPS, [PPS, PPS]]}, "label": {"grid": ["a", "a", "a #2"]}}]
        sweep = files.load(minimal(runs=runs, axes={"seed": {"grid": [0, 0, 1]}}))
        assert len(sweep.cells) == 27
        assert len(set(labels(sweep))) == 27


def test_checks_of_others_can_be_added(files: Files) -> None:
    files.path.write_text(yaml.safe_dump(minimal(runs=[{"defense": "none"}, {"defense": {**PPS, "layer": "x"}}])))
    sweep, faults = check_sweep(files.path, ["vectors.bad={}"])
    assert sweep is not None
    assert labels(sweep) == ["none"]
    assert list(sweep.vectors) == ["bridge", "random"]
    assert [fault.key for fault in faults] == ["vectors.bad", "runs[1].defense.layer"]
    assert sweep.key(0, "seed") == "runs[0].seed"


@pytest.mark.parametrize("path", sorted(QUICKSTART.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_project_s_own_sweeps_have_no_fault_in_them(path: Path) -> None:
    sweep = load_sweep(path)
    assert sweep.cells or sweep.measure
    assert sweep.name == path.stem
