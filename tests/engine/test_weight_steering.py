"""Steering in weight space in a sweep: its graph, its ids, its faults, and what its trials leave in the store."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import engine.work
from analysis.loading import default_device
from analysis.losses import response_losses
from analysis.manifest import RunEntry, adapter_key, failures_key
from analysis.references import token_projections
from analysis.results import Results, load
from analysis.weight_space import MeanGradient, chosen_parameters, edited, gradient_sum
from analysis.weight_space.files import read_pile, read_sum
from engine.collect import find_garbage
from engine.judging import judge_task
from engine.prepare import Prepared
from engine.run import pending_jobs, pending_judge_tasks, publish_report, write_sweep
from engine.store import Store
from engine.tasks import RunJob
from engine.weight_jobs import PileJob, ProfileJob
from engine.work import SweepWork
from tests.engine.tiny_prepare import TinySweep, changed, entries, ids, tiny_model_folder
from tests.engine.tiny_weights import STEERING, steered
from tests.engine.tiny_work import work_on
from trainables.base_model import load_base
from trainables.chat_data import ChatEncoder
from trainables.errors import ConfigError, DataError
from trainables.lora import load_adapter


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory)


@pytest.fixture
def sweep(tmp_path: Path, model: Path) -> TinySweep:
    return steered(tmp_path / "sweep", model)


def do_all(prepared: Prepared) -> Store:
    """Every job in its order, and judging as soon as there are answers, in this process."""
    store = Store.open(prepared.sweep.results, create=True)
    write_sweep(prepared, store)
    work = work_on(prepared, store)
    for job_id, job in prepared.jobs.items():
        if all(store.exists(key) for key in job.outputs()):
            continue
        work.run(job_id, lambda **_: None)
        for task in prepared.judge_tasks.values():
            if store.exists(f"tables/generations/{task.sample_id}.parquet"):
                asyncio.run(judge_task(store, task))
    return store


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[Prepared, Store]:
    sweep = steered(tmp_path_factory.mktemp("done") / "sweep", model)
    sweep.raw["runs"].pop()
    prepared = sweep.prepare()
    return prepared, do_all(prepared)


@pytest.fixture(scope="module")
def results(done: tuple[Prepared, Store]) -> Results:
    return load(done[1].root / "sweeps" / "tiny")


def test_edited_models_are_rows_and_no_other_id_moves(sweep: TinySweep) -> None:
    with_steering = sweep.prepare()
    assert [entry.label for entry in with_steering.manifest.runs] == [
        "base",
        "tuned",
        "other",
        "tuned -0.5 plain",
        "tuned +0.5 plain",
        "base -0.5 plain",
        "base +0.5 plain",
        "tuned +0.5 weighed",
        "tuned +0.5 small",
    ]
    row = entries(with_steering)["base -0.5 plain"]
    assert row.kind == "edited"
    settings = {name: value for name, value in row.config.items() if name.startswith("steering.")}
    assert settings == {"steering.on": "base", "steering.direction": "plain", "steering.alpha": -0.5}
    assert row.config["training.learning_rate"] == 0.01
    costs = with_steering.costs["base -0.5 plain"]
    assert (costs.num_steps, costs.num_answers, costs.num_judgements) == (0, 8, 16)

    del sweep.raw["weight_steering"]
    without = sweep.prepare()
    plain = {label for label, entry in entries(without).items()}
    found = {
        kind: {k: v for k, v in names.items() if k.split("/")[0] in plain} for kind, names in ids(with_steering).items()
    }
    assert not changed(ids(without), found)


def test_what_changes_a_pile_or_an_edit_is_in_its_id_and_names_are_not(sweep: TinySweep) -> None:
    def of(**update: Any) -> dict[str, str]:
        sweep.raw["weight_steering"] = {**copy.deepcopy(STEERING), **update}
        prepared = sweep.prepare()
        rows = {row.label: row.run_id for row in prepared.manifest.runs if row.kind == "edited"}
        return rows | {f"pile {pile.name}": pile.shard_ids[0] for pile in prepared.manifest.piles}

    before = of()
    same = {"directions": {"v": STEERING["directions"]["plain"]}, "edits": [{"directions": ["v"], "alphas": [0.5]}]}
    assert of(**same)["tuned +0.5 v"] == before["tuned +0.5 plain"]
    both = {"piles": {**STEERING["piles"], "every": {}}}
    assert {name: one for name, one in of(**both).items() if name != "pile every"} == before
    for gradient in ({"loss": "kl"}, {"loss_on": "all"}, {"layers": [1]}, {"max_length": 99}, {"answers_per_shard": 4}):
        after = of(gradient={**STEERING["gradient"], **gradient})
        assert not set(after.values()) & set(before.values()), gradient
    after = of(answers={"questions": "topic", "samples": 3})
    assert not set(after.values()) & set(before.values())
    by_other = of(gradient={**STEERING["gradient"], "loss": "kl", "reference": "other"})
    by_base = of(gradient={**STEERING["gradient"], "loss": "kl"})
    assert not set(by_other.values()) & set(by_base.values())


def plain_losses(results: Results, label: str) -> list[float]:
    return list(results.run(label).losses()["loss_sum"])


def by_hand(store: Store, prepared: Prepared, label: str) -> list[float]:
    """Plain losses of an edited model, made by nothing but gradients of its piles' answers at the finetuned model."""
    row = entries(prepared)[label]
    assert row.edit is not None
    base = load_base(prepared.jobs[row.run_id].base, default_device())  # type: ignore[union-attr]
    tuned = load_adapter(base.fresh(), store.path(adapter_key(row.edit.finetuned_id)), "tuned")
    scores = load(store.root / "sweeps" / "tiny").run("tuned").scores()
    scores = scores[scores["metric"] == "trait"].merge(
        load(store.root / "sweeps" / "tiny")
        .run("tuned")
        .generations()[["question_id", "sample_index", "finish_reason"]]
    )
    encoder = ChatEncoder(base.tokenizer, 1024)
    piles: dict[bool, list[Any]] = {True: [], False: []}
    records: list[dict[str, Any]] = scores.to_dict("records")  # type: ignore[assignment]
    for score in (SimpleNamespace(**row) for row in records):
        messages = [{"role": "user", "content": score.question}, {"role": "assistant", "content": score.answer}]
        encoded = encoder.encode(messages)
        if score.finish_reason == "length":  # without the end mark, which the model has not written
            end = len(encoded.response_mask) - 1 - encoded.response_mask[::-1].index(True)
            masks = (encoded.input_ids[:end], encoded.response_mask[:end], encoded.loss_mask[:end])
            encoded = type(encoded)(*masks)
        if score.answer.strip():
            piles[score.value > 0.5].append(encoded)
    parameters = chosen_parameters(base.model)
    means = {
        shown: MeanGradient([gradient_sum(tuned, parameters, rows, pad_id=0, plain_head=True, batch_size=1)])
        for shown, rows in piles.items()
    }
    changes = [(name, means[True][name] - means[False][name]) for name in parameters]
    task = next(loss for loss in prepared.jobs[row.run_id].losses)  # type: ignore[union-attr]
    rows = work_on(prepared, store).rows(task.content)
    with edited(parameters, changes, row.edit.alpha):
        model = base.model if row.edit.on_base else tuned
        return [
            loss.loss_sum for loss in response_losses(base, model, rows, measure_id="x", max_length=task.max_length)
        ]


@pytest.mark.parametrize("label", ["tuned +0.5 plain", "base -0.5 plain"])
def test_an_edited_model_is_theta_plus_alpha_times_the_difference_of_the_piles(
    done: tuple[Prepared, Store], results: Results, label: str
) -> None:
    prepared, store = done
    found = plain_losses(results, label)
    # batches and shards differ from those by hand: float32 rounding, through a step of order 1
    assert found == pytest.approx(by_hand(store, prepared, label), rel=1e-4)
    before = plain_losses(results, label.split()[0])
    assert max(abs(a - b) for a, b in zip(found, before, strict=True)) > 0.01


def test_the_base_that_a_process_keeps_is_the_same_to_the_bit(done: tuple[Prepared, Store], results: Results) -> None:
    """The edited models were made in this process, of the base that it still holds."""
    del done
    (kept,) = engine.work._loaded.values()
    fresh = load_base(results_base(results), torch.device("cpu"))
    for (name, one), (_, other) in zip(kept.model.named_parameters(), fresh.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
        assert not one.requires_grad


def results_base(results: Results) -> Any:
    from analysis.loading import find_base

    return find_base(results, results.run("base").entry, cuda=False, base=None)[0]


def test_signs_raise_and_lower_the_loss_on_the_pile(done: tuple[Prepared, Store], results: Results) -> None:
    """Piles hold what they should, and the shards of a pile hold its answers once each."""
    prepared, store = done
    scores = results.run("tuned").scores()
    trait = scores[(scores["metric"] == "trait") & (scores["answer"].str.strip() != "")]
    counts = {"with": int((trait["value"] == 1).sum()), "without": int((trait["value"] == 0).sum())}
    assert min(counts.values()) > 0
    for pile in prepared.manifest.piles:
        assert len(pile.shard_ids) == 3
        assert (
            read_pile([store.path(f"piles/{one}.safetensors") for one in pile.shard_ids]).num_rows == counts[pile.name]
        )


def test_the_summary_compares_an_edited_model_with_what_it_was(results: Results) -> None:
    summary = results.summary().set_index("run")
    assert summary.loc["tuned +0.5 plain", "undefended"] == "tuned"
    assert summary.loc["base -0.5 plain", "undefended"] == "base"
    losses, moved = summary["plain_loss"].to_dict(), summary["plain_loss_vs_undefended"].to_dict()
    assert moved["tuned +0.5 plain"] == pytest.approx(losses["tuned +0.5 plain"] - losses["tuned"])
    assert set(results.runs()["status"]) == {"done"}
    assert results.failures().empty


def test_profiles_say_where_delta_and_directions_are_large(results: Results) -> None:
    profile = results.measured("weight_profiles")
    assert set(profile["what"]) == {"delta", "plain", "weighed", "small"}
    sums = profile.groupby("what")["sum_of_squares"].sum()
    assert sums["weighed"] == pytest.approx(sums["plain"], rel=1e-5)  # keep_norm
    assert set(profile[profile["what"] == "plain"]["layer"]) == set(range(6))
    assert set(profile[profile["what"] == "delta"]["layer"]) == {1, 2, 3, 4}
    sizes = results.measured("weight_sizes")
    delta = profile[profile["what"] == "delta"]
    assert sizes["num_entries"].sum() == delta["num_parameters"].sum()
    assert sizes["high"].max() > delta["largest"].max() >= sizes["low"].max()


def test_a_run_and_an_edited_model_can_be_loaded(results: Results, done: tuple[Prepared, Store]) -> None:
    prepared, store = done
    model, tokenizer = results.run("tuned +0.5 weighed").load_model(device="cpu")
    task = next(iter(prepared.jobs[entries(prepared)["tuned +0.5 weighed"].run_id].losses))  # type: ignore[union-attr]
    base = load_base(results_base(results), torch.device("cpu"))
    rows = work_on(prepared, store).rows(task.content)
    losses = response_losses(
        type(base)(model, tokenizer, base.device, base.plain_head),
        model,
        rows,
        measure_id="x",
        max_length=task.max_length,
    )
    found = [loss.loss_sum for loss in losses]
    assert found == pytest.approx(plain_losses(results, "tuned +0.5 weighed"), rel=1e-6)


def test_an_edit_can_be_written_for_others(results: Results, tmp_path: Path) -> None:
    run = results.run("tuned +0.5 small")
    moved, _ = run.load_model(device="cpu")
    ids = torch.tensor([[5, 6, 7, 80]])
    wanted = moved(input_ids=ids).logits
    base = load_base(results_base(results), torch.device("cpu"))
    folder = run.save_edit(tmp_path / "adapter", rank=1, with_finetuning=True)
    both = PeftModel.from_pretrained(base.fresh(), str(folder)).eval()
    torch.testing.assert_close(both(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)  # float32, in another order
    tensors = load_file(run.save_edit(tmp_path / "edit.safetensors"))
    assert {name.split(".")[-2] for name in tensors} == {"q_proj", "down_proj"}
    weights = dict(base.model.named_parameters())
    for name, tensor in tensors.items():
        weights[name].data += tensor
    tuned = load_adapter(base.fresh(), results.root / adapter_key(results.run("tuned").run_id), "tuned")
    torch.testing.assert_close(tuned(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="'tuned' is no edited model"):
        results.run("tuned").save_edit(tmp_path / "nothing")


def test_nothing_is_left_to_do_and_nothing_is_garbage(done: tuple[Prepared, Store]) -> None:
    prepared, store = done
    assert not pending_jobs(prepared, store)
    assert not pending_judge_tasks(prepared, store)
    assert not find_garbage(store)


@pytest.mark.slow
def test_the_report_shows_edited_models_and_where_directions_are_large(
    done: tuple[Prepared, Store], results: Results
) -> None:
    _, store = done
    publish_report(results, store)
    folder = store.root / "sweeps/tiny/report"
    page = (folder / "index.html").read_text()
    assert "tuned +0.5 plain" in page
    drawn = {path.stem for path in folder.glob("*.png")}
    assert {"weight_steering_rates", "weight_steering_layers", "weight_steering_sizes"} <= drawn


def test_only_asks_for_the_piles_of_the_edits_that_are_asked_for(sweep: TinySweep) -> None:
    sweep.raw["weight_steering"]["answers"] = {"questions": "topic", "samples": 3, "max_new_tokens": 4}
    prepared = sweep.prepare(only="steering.alpha == 0.5 and steering.on == 'base'")
    assert [entry.label for entry in prepared.asked] == ["base", "base +0.5 plain"]
    kinds = [type(job).__name__ for job in prepared.jobs.values()]
    assert kinds.count("PileJob") == 8
    assert kinds.count("ProfileJob") == 1
    tuned = prepared.jobs[entries(prepared)["tuned"].run_id]
    pile = next(job for job in prepared.jobs.values() if isinstance(job, PileJob))
    assert pile.sample_id in [sample.id for sample in tuned.samples]  # type: ignore[union-attr]
    alone = sweep.prepare(only="label == 'tuned'")
    assert not any(isinstance(job, PileJob | ProfileJob) for job in alone.jobs.values())


@pytest.mark.slow
def test_a_smoke_run_has_answers_in_every_pile(sweep: TinySweep) -> None:
    prepared = sweep.prepare("evaluation.max_new_tokens=3", smoke=True)
    store = do_all(prepared)
    assert set(load(store.root / "sweeps/tiny").runs()["status"]) == {"done"}
    for pile in prepared.manifest.piles:
        assert read_sum(store.path(f"piles/{pile.shard_ids[0]}.safetensors")).num_rows >= 1


def test_an_empty_pile_is_told_with_the_counts_of_all(
    done: tuple[Prepared, Store],
) -> None:
    prepared, store = done
    job = next(job for job in prepared.jobs.values() if isinstance(job, PileJob))
    bare = job.model_copy(
        update={"id": "0" * 12, "name": "both", "piles": {**job.piles, "both": {"trait": True, "degeneration": True}}}
    )
    degenerate = entries(prepared)["tuned"].judge_ids["degeneration"]
    bare = bare.model_copy(
        update={
            "judge_ids": {**job.judge_ids, "degeneration": degenerate},
            "scales": {**job.scales, "degeneration": (0.0, 1.0)},
        }
    )
    work = SweepWork(
        store=store, jobs={bare.id: bare}, device="cpu", threads=1, zero_stage=0, gradient_checkpointing=False
    )
    with pytest.raises(
        DataError, match=r"the pile 'both' is empty.*of 8 answers the piles hold with \d, without \d, both 0"
    ):
        work.run(bare.id, lambda **_: None)


def test_a_pile_that_failed_is_named_and_what_rests_on_it_skipped(sweep: TinySweep) -> None:
    prepared = sweep.prepare()
    store = Store.open(prepared.sweep.results, create=True)
    write_sweep(prepared, store)
    pile = prepared.manifest.piles[0]
    row = entries(prepared)["tuned +0.5 plain"]
    failures = {
        pile.shard_ids[0]: {"kind": "failed", "reason": "the pile 'with' is empty"},
        row.sample_id: {"kind": "skipped", "reason": "needs pile with of tuned 1/3, which failed"},
    }
    store.publish_json(failures_key("tiny"), failures)
    results = load(store.root / "sweeps" / "tiny")
    told = results.failures().set_index("task_id")
    assert tuple(told.loc[pile.shard_ids[0], ["run", "task"]]) == ("tuned", "pile with")
    assert results.run("tuned +0.5 plain").status == "skipped"


def test_a_cap_on_an_edited_model_is_calibrated_on_the_base_as_it_was(
    sweep: TinySweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    cap = {"kind": "capping", "vector": "topic", "layers": [2], "ceiling": {"percentile": 50}}
    sweep.raw["evaluation"]["interventions"] = [cap | {"reference": "data/plain_answers.jsonl"}]
    sweep.raw["weight_steering"]["answers"] = {"questions": "topic", "samples": 4, "max_new_tokens": 6}
    sweep.raw["runs"].pop()
    prepared = sweep.prepare()
    store = do_all(prepared)
    edit = next(entry for entry in prepared.manifest.runs if entry.kind == "edited")
    store.remove(f"tables/generations/{edit.sample_id}.parquet")
    monkeypatch.setattr(engine.work, "_projections", {})  # as in a process that has calibrated nothing yet
    read: list[dict[str, torch.Tensor]] = []

    def keep(base: Any, *arguments: Any) -> Mapping[int, torch.Tensor]:
        read.append({name: value.clone() for name, value in base.model.state_dict().items()})
        return token_projections(base, *arguments)

    monkeypatch.setattr(engine.work, "token_projections", keep)
    work_on(prepared, store).run(edit.run_id, lambda **_: None)
    (weights,) = read
    job = prepared.jobs[edit.run_id]
    assert isinstance(job, RunJob)
    untrained = load_base(job.base, torch.device("cpu")).model.state_dict()
    assert all(torch.equal(weights[name], untrained[name]) for name in untrained)


def test_jobs_travel_to_workers(sweep: TinySweep) -> None:
    import pickle

    prepared = sweep.prepare()
    jobs: Mapping[str, Any] = pickle.loads(pickle.dumps(dict(prepared.jobs)))
    assert jobs == dict(prepared.jobs)
    row: RunEntry = entries(prepared)["tuned -0.5 plain"]
    assert RunEntry.model_validate_json(row.model_dump_json()) == row
