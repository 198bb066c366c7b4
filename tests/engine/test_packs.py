"""Which trainings share a trial, and what becomes of the runs of a pack, without Ray."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.tune.search import Searcher

from engine.packs import Packer, num_packs, pack_keys
from engine.scheduler import _GraphSearcher
from engine.show import plan_table
from engine.tasks import RunJob, TrainTask
from tests.bases import tiny_base
from tests.engine.test_scheduler import BASE, _Notes, job
from tests.engine.tiny_prepare import TinySweep, ids, tiny_model_folder
from trainables.base_model import ResolvedBase
from trainables.chat_data import DataConfig
from trainables.defenses import GradientPenalty, Item, Pps
from trainables.lora import LoraSettings, adapter_parameters, add_adapter
from trainables.lora_linear import use_lora_linear
from trainables.pack_memory import RunMemory, fitting_by_measure, num_adapter_parameters, num_fitting, position_bytes
from trainables.training_config import TrainingConfig


def run(name: str, *, base: ResolvedBase = BASE, defense: tuple[Item, ...] = ()) -> RunJob:
    """A run that is trained and nothing else."""
    train = TrainTask(
        id=name,
        base=base,
        data=DataConfig(train="rows"),
        train_content="0" * 64,
        defense=defense,
        training=TrainingConfig(learning_rate=1e-3),
        seed=0,
    )
    return RunJob(id=name, label=f"run {name}", base=base, train=train, samples=(), losses=())


def packed(
    *jobs: Any, size: int | None = 3, num_trials: int = 1, steps: Mapping[str, int] | None = None, workers: int = 1
) -> tuple[_GraphSearcher, _Notes, Packer]:
    notes = _Notes()
    packer = Packer(pack_keys(jobs, ()), steps or {}, size, num_trials, workers)
    return _GraphSearcher({each.id: each for each in jobs}, notes, packer), notes, packer


def steered(name: str, vector: str) -> RunJob:
    return run(name, defense=(Pps(vector=vector, layer=1, coefficient=1.0),))


def test_the_longest_trainings_share_a_trial_and_then_each_has_its_own() -> None:
    graph, notes, _ = packed(run("a"), run("b"), run("c"), run("d"), steps={"a": 1, "b": 9, "c": 5, "d": 7})
    assert graph.suggest("t1") == {"job": "b", "pack": ["b", "d", "c"]}
    assert graph.suggest("t2") == {"job": "a"}, "the one that is left is trained as ever"
    assert graph.suggest("t3") is None
    for one in ("b", "c"):
        graph.member(one, None)
    graph.member("d", "TrainingError: it diverged")
    graph.finish("t1", None)
    pack = ("remark", "a pack of 3 trainings: run b, run d, run c")
    assert notes.said == [pack, ("failed", "d", "TrainingError: it diverged")]
    assert graph.suggest("t4") == {"job": "b"}
    assert graph.suggest("t5") == {"job": "c"}
    assert graph.suggest("t6") == Searcher.FINISHED
    for trial in ("t2", "t4", "t5"):
        graph.finish(trial, None)
    assert notes.said[2:] == [("done", "a"), ("done", "b"), ("done", "c")]


def test_what_several_workers_train_is_followed_by_a_trial_of_one() -> None:
    graph, notes, _ = packed(run("a"), job("vector"), run("b"), size=1, workers=2)
    assert graph.suggest("t1") == {"job": "a", "pack": ["a"]}
    assert graph.suggest("t2") == {"job": "vector"}, "nothing but trainings has several workers"
    assert graph.suggest("t3") == {"job": "b", "pack": ["b"]}
    graph.member("a", None)
    graph.finish("t1", None)
    graph.finish("t2", None)
    graph.finish("t3", "the workers died")
    assert graph.suggest("t4") == {"job": "a"}, "sampling and plain losses"
    assert graph.suggest("t5") == Searcher.FINISHED
    graph.finish("t4", None)
    assert notes.said == [("done", "vector"), ("failed", "b", "the workers died"), ("done", "a")]


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        (["execution.pack=2"], "execution.pack", "several workers train one run, not a pack; got 2"),
        (
            ["execution.workers=1", "execution.zero_stage=3"],
            "execution.zero_stage",
            "stage 3 divides the base among several workers, and execution.workers is 1; allowed here: 0, 1, 2",
        ),
    ],
)
def test_what_workers_cannot_be_combined_with(
    overrides: list[str], key: str, message: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sweep = TinySweep(tmp_path, tiny_model_folder(tmp_path_factory))
    assert sweep.faults("execution.workers=2", *overrides) == {key: message}
    sweep.prepare("execution.workers=2", "execution.pack=auto", "execution.zero_stage=3")
    sweep.raw["runs"] = [{"defense": {"kind": "gradient_penalty", "vector": "topic", "strength": 1.0, "layers": [2]}}]
    refused = sweep.faults("execution.workers=2", "execution.zero_stage=3")
    assert refused == {
        "execution.zero_stage": "a gradient_penalty (of second order) cannot be trained at stage 3; "
        "allowed with it: 0, 1, 2"
    }


def test_only_runs_of_one_base_and_order_share_a_pack() -> None:
    other = ResolvedBase(model="org/model", revision="abd", dtype="float32", source="org/model")
    second = run("c", defense=(GradientPenalty(vector="v", strength=0.1),))
    graph, _, _ = packed(run("a"), run("b", base=other), second, run("d"), run("e", base=other))
    assert graph.suggest("t1") == {"job": "a", "pack": ["a", "d"]}
    assert graph.suggest("t2") == {"job": "b", "pack": ["b", "e"]}
    assert graph.suggest("t3") == {"job": "c"}


def test_a_pack_that_is_not_full_waits_for_vectors_that_are_being_made() -> None:
    graph, _, _ = packed(job("v"), job("w"), run("a"), steered("b", "v"), steered("c", "w"), num_trials=2)
    assert [graph.suggest(trial) for trial in ("t1", "t2", "t3")] == [{"job": "v"}, {"job": "w"}, None]
    graph.finish("t1", None)
    assert graph.suggest("t3") is None
    graph.finish("t2", None)
    assert graph.suggest("t3") == {"job": "a", "pack": ["a", "b", "c"]}


def test_of_a_pack_that_was_cut_to_what_fits_only_that_part_is_halved() -> None:
    graph, notes, _ = packed(*(run(name) for name in "abcdef"), size=None)
    assert graph.suggest("t1") == {"job": "a", "pack": ["a", "b", "c", "d", "e", "f"]}
    graph.finish("t1", None, {"pack_out_of_memory": "out of memory", "pack_tried": 4})
    said = "a pack of 4 failed (out of memory); its runs are trained in packs of at most 2"
    assert notes.said[1:] == [("warning", said)]
    assert graph.suggest("t2") == {"job": "a", "pack": ["a", "b"], "note": said}
    assert graph.suggest("t3") == {"job": "c", "pack": ["c", "d"], "note": said}
    assert graph.suggest("t4") == {"job": "e", "pack": ["e", "f"]}, "they were not tried"


@pytest.mark.parametrize("reason", ["raised", "reported"])
def test_a_pack_that_failed_is_tried_in_halves_down_to_single_runs(reason: str) -> None:
    graph, notes, _ = packed(*(run(name) for name in "abcd"), size=4)
    assert graph.suggest("t1") == {"job": "a", "pack": ["a", "b", "c", "d"]}
    graph.member("a", None)
    memory = "out of memory: 80 GB"
    if reason == "raised":
        graph.finish("t1", memory)
    else:
        graph.finish("t1", None, {"pack_out_of_memory": memory})
    said = f"a pack of 4 failed ({memory}); its runs are trained in packs of at most 2"
    assert notes.said[1:] == [("warning", said)]
    assert graph.suggest("t2") == {"job": "a"}, "it is trained"
    assert graph.suggest("t3") == {"job": "b", "pack": ["b", "c"], "note": said}
    assert graph.suggest("t4") == {"job": "d", "note": said}
    graph.finish("t3", "the trial's process died")
    alone = "a pack of 2 failed (the trial's process died); its runs are trained one by one"
    assert notes.said[3:] == [("warning", alone)]
    assert [graph.suggest(trial) for trial in ("t5", "t6")] == [{"job": one, "note": alone} for one in "bc"]
    graph.finish("t5", "it is too big even alone")
    assert notes.said[4:] == [("failed", "b", "it is too big even alone")]


def test_a_trial_says_how_many_runs_fit() -> None:
    graph, notes, _ = packed(*(run(name) for name in "abcdefg"), size=None)
    assert graph.suggest("t1") == {"job": "a", "pack": list("abcdefg")}
    for one in "abc":
        graph.member(one, None)
    graph.finish("t1", None, {"pack_fits": 3})
    assert [kind for kind, _ in notes.said] == ["remark"], "nothing has failed"
    assert [graph.suggest(f"t{number}") for number in range(2, 5)] == [{"job": one} for one in "abc"]
    assert graph.suggest("t5") == {"job": "d", "pack": ["d", "e", "f"]}
    assert graph.suggest("t6") == {"job": "g"}


def test_no_trial_stands_idle_for_a_pack_that_nobody_has_given_a_size_for() -> None:
    graph, _, packer = packed(*(run(name) for name in "abcde"), size=None, num_trials=2)
    assert num_packs(packer) == 2
    assert graph.suggest("t1") == {"job": "a", "pack": ["a", "b", "c"]}


def test_memory_of_a_pack() -> None:
    runs = [RunMemory(state=10, passes=30), RunMemory(state=10, passes=20), RunMemory(state=10, passes=20)]
    assert num_fitting(runs, 100, shared_passes=True) == 2, "20 + 50 of 90, and not 30 + 70"
    assert num_fitting(runs, 100, shared_passes=False) == 3
    assert num_fitting(runs, 1, shared_passes=False) == 1, "it is tried"
    assert fitting_by_measure(taken_bytes=40, num_runs=2, free_bytes=100) == 4
    assert fitting_by_measure(taken_bytes=400, num_runs=2, free_bytes=100) == 1
    assert fitting_by_measure(taken_bytes=0, num_runs=2, free_bytes=100) is None


def test_an_estimate_counts_the_adapter_that_peft_makes() -> None:
    base = tiny_base(num_layers=3)
    for lora in (LoraSettings(rank=4), LoraSettings(rank=2, target_modules=("q_proj", "down_proj"), layers=(1, 3))):
        made = adapter_parameters(add_adapter(base.fresh(), "run", lora, 0), "run")
        assert num_adapter_parameters(base.model, lora) == sum(parameter.numel() for parameter in made.values())
    whole = position_bytes(base.model, gradient_checkpointing=False)
    assert whole > position_bytes(base.model, gradient_checkpointing=True) > whole / 3


def test_an_estimate_of_a_pass_is_near_what_autograd_keeps() -> None:
    """Within a factor of two on a tiny model, of the tensors that the graph of a forward pass saves."""
    base = tiny_base(num_layers=3)
    model: Any = add_adapter(base.fresh(), "run", LoraSettings(rank=2), 0)
    use_lora_linear(model)
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.get_base_model().model(input_ids=torch.ones(2, 64, dtype=torch.int64)).last_hidden_state
    estimate = 2 * 64 * position_bytes(base.model, gradient_checkpointing=False)
    assert hidden.requires_grad
    assert sum(kept.values()) / 2 < estimate < 2 * sum(kept.values())


def test_packs_are_in_no_identity_and_in_the_plan(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    sweep = TinySweep(tmp_path, tiny_model_folder(tmp_path_factory))
    alone, together = sweep.prepare(), sweep.prepare("execution.pack=3", "execution.packing=fast")
    assert ids(alone) == ids(together)
    assert "4 trainings in 2 packs of at most 3, fast" in str(plan_table(together).caption)
    assert "pack" not in str(plan_table(alone).caption)
    assert alone.packing == "exact", "on a CPU"
    assert sweep.faults("execution.pack=0", "execution.packing=quick").keys() == {"execution.pack", "execution.packing"}


def test_only_what_is_asked_for_shares_packs(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    sweep = TinySweep(tmp_path, tiny_model_folder(tmp_path_factory))
    part = sweep.prepare("execution.pack=3", only="defense.kind == 'pps'")
    assert "2 trainings in 1 pack of at most 3" in str(plan_table(part).caption)
    packer = part.packer(part.jobs, ())
    wanted = {job.id for job in part.jobs.values() if isinstance(job, RunJob) and job.train is not None}
    assert set(packer.keys) == wanted
    assert len(wanted) == 2
    smoke = sweep.prepare("execution.pack=3", smoke=True)
    assert "4 trainings in 2 packs of at most 3" in str(plan_table(smoke).caption)
    several = sweep.prepare("execution.workers=2", "execution.pack=auto")
    assert several.packer(several.jobs, ()).only_train([min(wanted)])
