"""Runs that start from other runs: which one is meant, identities, faults, and what a trial makes of it."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console

from analysis.loading import find_base
from analysis.manifest import adapter_key, run_key
from analysis.results import load
from engine.look import find_run, show_view
from engine.measure_jobs import MeasureJob
from engine.prepare import Prepared
from engine.serving import merged_runs, vllm_commands
from engine.show import plan_table, total_cost
from engine.store import Store
from engine.tasks import RunJob, Start, TrainTask
from engine.work import _loaded
from tests.engine.tiny_prepare import TinySweep, entries, ids, tiny_model_folder
from tests.engine.tiny_work import work_in, work_on
from trainables.base_model import load_base, load_tokenizer
from trainables.chat_data import ChatEncoder
from trainables.errors import ConfigError, StoreError

CHILD = {"defense": "none", "label": "child", "data": {"train": "data/negative.jsonl"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory)


@pytest.fixture
def sweep(tmp_path: Path, model: Path) -> TinySweep:
    made = TinySweep(tmp_path / "here", model)
    made.raw["runs"] = [{"defense": "none", "label": "pre"}, {**CHILD, "start_from": from_pre("merge")}]
    return made


def from_pre(adapter: str, run: str = "pre") -> dict[str, str]:
    return {"run": run, "adapter": adapter}


def trainings(prepared: Prepared) -> dict[str, TrainTask]:
    """By label."""
    return {job.label: job.train for job in prepared.jobs.values() if isinstance(job, RunJob) and job.train}


class TestWhichRun:
    def test_the_one_with_the_same_values_on_shared_axes(self, sweep: TinySweep) -> None:
        sweep.raw["axes"] = {"seed": {"grid": [0, 1]}}
        pre, child = sweep.raw["runs"]
        for block in (pre, child):
            block["training"] = {"learning_rate": {"grid": [0.01, 0.02]}}
        pre["data"] = {"max_length": 120}  # only one of them says it, and it is no grid
        child["start_from"] = {"run": "pre", "adapter": {"grid": ["continue", "merge"]}}
        found = trainings(sweep.prepare())
        by_id = {task.id: task for task in found.values()}
        children = [task for label, task in found.items() if label.startswith("child")]
        assert len(children) == 8
        for task in children:
            (parent,) = (by_id[one] for one in task.start.ids)
            assert (parent.seed, parent.training.learning_rate) == (task.seed, task.training.learning_rate)

    def test_several_that_fit_are_told_and_a_whole_label_means_one(self, sweep: TinySweep) -> None:
        sweep.raw["runs"][0]["training"] = {"learning_rate": {"grid": [0.01, 0.02]}}
        message = sweep.faults()["runs[1].start_from.run"]
        assert message == (
            "2 runs of 'pre' fit: 'pre learning_rate=0.01', 'pre learning_rate=0.02'; write the whole label of one"
        )
        sweep.raw["runs"][1]["start_from"]["run"] = "pre learning_rate=0.02"
        found = trainings(sweep.prepare())
        assert found["child"].start == Start(merged=(found["pre learning_rate=0.02"].id,))

    def test_none_with_the_same_values_is_told(self, sweep: TinySweep) -> None:
        for block, rates in zip(sweep.raw["runs"], ([0.01], [0.02, 0.01]), strict=True):
            block["training"] = {"learning_rate": {"grid": rates}}
        assert "no run of 'pre' has training.learning_rate: 0.02" in sweep.faults()["runs[1].start_from.run"]

    def test_blocks_without_a_label_are_called_by_their_defense(self, sweep: TinySweep) -> None:
        del sweep.raw["runs"][0]["label"], sweep.raw["runs"][1]["label"]
        sweep.raw["runs"][1]["start_from"]["run"] = "none"
        assert list(trainings(sweep.prepare())) == ["none", "none after none"]

    def test_chains(self, sweep: TinySweep) -> None:
        """Children may stand before their parents, and rows stay in the order of the file."""
        names = ["d", "c", "b", "a"]
        how = {"d": "continue", "c": "merge", "b": "continue"}
        blocks = [{**CHILD, "label": name, "seed": seed} for seed, name in enumerate(names)]
        for block, parent in zip(blocks, names[1:], strict=False):
            block["start_from"] = {"run": parent, "adapter": how[str(block["label"])]}
        sweep.raw["runs"] = blocks
        prepared = sweep.prepare()
        found = trainings(prepared)
        a, b, c = (found[name].id for name in "abc")
        assert found["b"].start == Start(continued=a)
        assert found["c"].start == Start(merged=(b,)), "the continued adapter holds a's"
        assert found["d"].start == Start(merged=(b,), continued=c)
        assert [entry.label for entry in prepared.manifest.runs] == ["base", *names]
        assert entries(prepared)["d"].merged == (b,)
        assert list(found) == list("abcd"), "parents start first"


class TestIdentity:
    def test_is_what_it_was_without_and_another_with(self, sweep: TinySweep) -> None:
        made = {}
        for start in ("none", None, from_pre("continue"), from_pre("merge")):
            sweep.raw["runs"][1]["start_from"] = start
            made[str(start)] = ids(sweep.prepare())["train"]
        del sweep.raw["runs"][1]["start_from"]
        without = ids(sweep.prepare())["train"]
        assert made["none"] == made["None"] == without
        assert len({one["child"] for one in made.values()}) == 3
        assert {one["pre"] for one in made.values()} == {without["pre"]}

    def test_follows_the_parent_but_not_its_name(self, sweep: TinySweep) -> None:
        before = ids(sweep.prepare())["train"]["child"]
        sweep.raw["runs"][0]["label"] = sweep.raw["runs"][1]["start_from"]["run"] = "first"
        assert ids(sweep.prepare())["train"]["child"] == before
        sweep.raw["runs"][0]["training"] = {"learning_rate": 0.02}
        assert ids(sweep.prepare())["train"]["child"] != before


class TestFaults:
    def test_of_the_key_itself(self, sweep: TinySweep) -> None:
        sweep.raw["runs"] += [
            {**CHILD, "label": "b", "start_from": {"run": "pre"}},
            {**CHILD, "label": "c", "start_from": from_pre("keep")},
            {**CHILD, "label": "d", "start_from": "pre"},
            {**CHILD, "label": "e", "start_from": from_pre("merge", "pree")},
        ]
        faults = sweep.faults()
        assert faults["runs[2].start_from.adapter"] == "missing, and it has no default"
        assert faults["runs[3].start_from.adapter"].startswith("must be 'continue' or 'merge'; got 'keep'")
        assert faults["runs[4].start_from"].startswith("must be none or {run: ..., adapter: continue or merge}")
        assert faults["runs[5].start_from.run"].startswith("no run 'pree'; did you mean pre?")
        assert len(faults) == 4

    def test_a_run_that_is_faulty_itself_is_not_missing(self, sweep: TinySweep) -> None:
        sweep.raw["runs"][0]["data"] = {"max_lenght": 3}
        assert list(sweep.faults()) == ["runs[0].data.max_lenght"]

    def test_circles(self, sweep: TinySweep) -> None:
        sweep.raw["axes"] = {"seed": {"grid": [0, 1]}}
        sweep.raw["runs"][0]["start_from"] = from_pre("merge", "child")
        sweep.raw["runs"].append({**CHILD, "label": "own", "start_from": from_pre("merge", "own")})
        sweep.raw["runs"].append({**CHILD, "label": "outside", "start_from": from_pre("merge", "child")})
        assert sweep.faults() == {
            "runs[0].start_from.run": "goes in a circle: pre -> child -> pre",
            "runs[1].start_from.run": "goes in a circle: child -> pre -> child",
            "runs[2].start_from.run": "goes in a circle: own -> own",
        }

    def test_an_adapter_that_is_continued_keeps_its_shape(self, sweep: TinySweep) -> None:
        child = sweep.raw["runs"][1]
        child["training"] = {"lora": {"rank": 4, "alpha": 4, "dropout": 0.1, "target_modules": ["q_proj"]}}
        sweep.prepare()
        child["start_from"] = from_pre("continue")
        assert sweep.faults() == {
            "runs[1].training.lora.rank": "4, but the adapter of 'pre' that is continued has 2",
            "runs[1].training.lora.target_modules": (
                "[\"q_proj\"], but the adapter of 'pre' that is continued has null"
            ),
        }

    @pytest.mark.parametrize("adapter", ["continue", "merge"])
    def test_another_base_and_answers_of_a_server(self, sweep: TinySweep, adapter: str) -> None:
        child = sweep.raw["runs"][1]
        child["start_from"] = from_pre(adapter)
        child["base"] = {"dtype": "bfloat16"}
        child["evaluation"] = {"answers_from": "openai"}
        faults = sweep.faults()
        assert "'pre', which this run starts from, has" in faults.pop("base.model")
        if adapter == "merge":
            assert "merged into it; leave it out" in faults.pop("runs[1].evaluation.answers_from")
        assert not faults


class TestPartsOfASweep:
    def test_only_trains_the_parent_and_no_more(self, sweep: TinySweep) -> None:
        prepared = sweep.prepare(only="child")
        jobs = {job.label: job for job in prepared.jobs.values() if isinstance(job, RunJob)}
        assert list(jobs) == ["base", "pre", "child"]
        assert (jobs["pre"].samples, jobs["pre"].losses) == ((), ())
        assert jobs["child"].samples
        assert {entry.label for entry in prepared.asked} == {"base", "child"}
        whole = {job.label: job for job in sweep.prepare().jobs.values() if isinstance(job, RunJob)}
        assert whole["pre"].samples

    def test_smoke_has_parents_of_its_own(self, sweep: TinySweep) -> None:
        short, long = trainings(sweep.prepare("training.max_steps=9", smoke=True)), trainings(sweep.prepare())
        assert short["child"].start == Start(merged=(short["pre"].id,))
        assert short["pre"].training.max_steps == 2
        assert short["child"].start != trainings(sweep.prepare("training.max_steps=9"))["child"].start
        assert long["pre"].id == short["pre"].id, "of two steps anyway"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Prepared:
    """``pre`` with a child, a grandchild, something measured of it, and a run that has no part in it."""
    sweep = TinySweep(tmp_path_factory.mktemp("family"), model)
    sweep.raw["runs"] = [
        {"defense": "none", "label": "pre"},
        {**CHILD, "label": "merged", "start_from": from_pre("merge")},
        {**CHILD, "label": "grandchild", "start_from": from_pre("continue", "merged")},
        {**CHILD, "label": "other"},
    ]
    sweep.raw["measure"] = {"moved": {"kind": "gradients", "vectors": ["topic"], "layers": [2], "samples": 2}}
    sweep.raw["measure"]["moved"]["on"] = ["grandchild"]
    return sweep.prepare("training.max_steps=3", "evaluation.samples=1", "evaluation.max_new_tokens=2")


def do(prepared: Prepared, folder: Path, *labels: str) -> Store:
    """The jobs of these labels, all if none is given, in one process as trials do them one after another."""
    work = work_in(prepared, folder)
    for job in prepared.jobs.values():
        if not labels or job.label in labels:
            work.run(job.id, lambda **_: None)
    return work.store


@pytest.fixture(scope="module")
def done(family: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return do(family, tmp_path_factory.mktemp("done") / "store")


def adapter_bytes(store: Store, prepared: Prepared, label: str) -> bytes:
    folder = store.path(adapter_key(entries(prepared)[label].run_id))
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_process_that_trained_children_leaves_other_runs_as_they_are(
    family: Prepared, done: Store, tmp_path: Path
) -> None:
    """``other`` comes after all children in ``done``, and alone in a process that has just loaded the base here."""
    _loaded.clear()
    alone = do(family, tmp_path / "alone", "other")
    assert adapter_bytes(alone, family, "other") == adapter_bytes(done, family, "other")
    other = entries(family)["other"]
    for key in (f"tables/generations/{other.sample_id}.parquet", f"tables/losses/{other.plain_loss_id}.parquet"):
        assert alone.read(key) == done.read(key)


def plain_loss(model: Any, prepared: Prepared, store: Store, label: str) -> list[float]:
    """Of every plain answer, by the model's own loss: what measures the whole model of a run."""
    (job,) = [job for job in prepared.jobs.values() if isinstance(job, RunJob) and job.label == label]
    (measured,) = job.losses
    encoder = ChatEncoder(load_tokenizer(job.base), measured.max_length)
    losses = []
    for row in work_on(prepared, store).rows(measured.content):
        encoded = encoder.encode(row)
        ids = torch.tensor([encoded.input_ids])
        labels = torch.where(torch.tensor([encoded.response_mask]), ids, -100)
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=labels).loss))
    return losses


def test_what_is_measured_of_a_child_is_of_the_whole_chain(family: Prepared, done: Store) -> None:
    """Losses from the store against PEFT putting the adapters together by hand; float32 rounds at 6e-8."""
    results = load(done.path(f"sweeps/{family.sweep.name}"))
    found = entries(family)
    folder = {label: str(done.path(adapter_key(found[label].run_id))) for label in found if label != "base"}
    for label in ("merged", "grandchild"):
        base, _ = find_base(results, found[label], cuda=False, base=None)
        model: Any = load_base(base, torch.device("cpu")).model
        for part in ("pre", label):  # the grandchild's adapter holds what ``merged`` learned
            model = PeftModel.from_pretrained(model, folder[part]).merge_and_unload()
        by_hand = plain_loss(model, family, done, label)
        assert results.run(label).losses()["loss_mean"].tolist() == pytest.approx(by_hand, rel=1e-5)
        loaded, _ = results.load_model(label, device="cpu")
        assert plain_loss(loaded, family, done, label) == pytest.approx(by_hand, rel=1e-5)
    alone: Any = PeftModel.from_pretrained(load_base(base, torch.device("cpu")).model, folder[label])
    assert plain_loss(alone, family, done, label) != pytest.approx(by_hand, rel=1e-3), "the parent counts"
    (shard,) = [job for job in family.jobs.values() if isinstance(job, MeasureJob)]
    assert shard.merged == found["grandchild"].merged == (found["pre"].run_id,)
    measured = results.gradients()
    assert set(measured["run"]) == {"grandchild"}


def test_adapter_files_of_a_merged_run_say_what_they_belong_on(family: Prepared, done: Store) -> None:
    config = (done.path(adapter_key(entries(family)["merged"].run_id)) / "adapter_config.json").read_text()
    assert f"with the adapters of {entries(family)['pre'].run_id} merged" in config
    console = Console(file=io.StringIO(), width=200)
    results = load(done.path(f"sweeps/{family.sweep.name}"))
    console.print(show_view(results, find_run(results, "merged")))
    assert "it belongs on the base with the adapters of" in console.file.getvalue()  # type: ignore[attr-defined]


def test_serving_leaves_out_what_no_adapter_alone_can_be(family: Prepared, done: Store) -> None:
    results = load(done.path(f"sweeps/{family.sweep.name}"))
    (command,) = vllm_commands(results)
    found = entries(family)
    served = {label for label in ("pre", "merged", "grandchild", "other") if f"{found[label].run_id}=" in command}
    assert served == {"pre", "other"}
    assert "left out: 'merged', 'grandchild'." in str(merged_runs(results))


def test_a_parent_whose_adapter_is_gone_is_said(family: Prepared, done: Store, tmp_path: Path) -> None:
    shutil.copytree(done.root, tmp_path / "copy")
    store = Store.open(tmp_path / "copy")
    found = entries(family)
    shutil.rmtree(store.path(adapter_key(found["pre"].run_id)))
    store.path(run_key(found["merged"].run_id)).unlink()
    with pytest.raises(StoreError, match=f"remove {run_key(found['pre'].run_id)} from the store"):
        do(family, tmp_path / "copy", "merged")
    with pytest.raises(ConfigError, match="stands on the adapter of"):
        load(store.path(f"sweeps/{family.sweep.name}")).load_model("merged", device="cpu")


def test_the_plan_of_a_part_has_the_training_that_it_starts_from(sweep: TinySweep) -> None:
    prepared = sweep.prepare(only="child")
    console = Console(file=io.StringIO(), width=160)
    console.print(plan_table(prepared))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    (line,) = [line for line in text.splitlines() if line.startswith("pre ")]
    assert line.split()[3] == "2", "steps"
    assert line.split()[-2:] == ["0", "0"], "no answers, no judgements"
    assert total_cost(prepared).num_steps == 4
