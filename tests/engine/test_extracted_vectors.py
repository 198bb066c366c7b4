"""Vectors by the filtered protocol in a sweep: their tasks, ids, faults, cost; and end to end through Ray."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from analysis.results import load
from analysis.vectors import Vector
from engine.collect import find_garbage
from engine.judge_costs import judge_costs
from engine.judging import judge_task
from engine.prepare import Prepared
from engine.run import Outcome, run_sweep
from engine.store import Store
from engine.tasks import AnswersJob, VectorJob
from tests.engine.tiny_prepare import TinySweep, tiny_model_folder
from tests.engine.tiny_sweep import write_tiny_sweep
from tests.engine.tiny_work import work_in
from trainables.base_model import load_base
from trainables.chat_data import ChatEncoder
from trainables.errors import StoreError

EXTRACTABLE = """
extraction_questions: [{id: e1, question: "Is it warm?"}, {id: e2, question: "Who sings?"}, {id: e3, question: "Why?"}]
instructions:
  - {positive: "Talk about bridges.", negative: "Never do."}
  - {positive: "Bridges!", negative: "No bridges."}
adjectives: {positive: odd, negative: plain}
"""
ANY_VOWEL = {"judge": "rule", "patterns": ["[aeiou]"]}


def extractable(folder: Path) -> None:
    path = folder / "traits" / "topic" / "trait.yaml"
    if "extraction_questions" not in path.read_text():
        path.write_text(path.read_text() + EXTRACTABLE)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory)


@pytest.fixture
def sweep(tmp_path: Path, model: Path) -> TinySweep:
    sweep = TinySweep(tmp_path / "sweep", model)
    extractable(sweep.folder)
    sweep.raw["vectors"]["topic"] = {"extract": {"trait": "topic", "judge": dict(ANY_VOWEL), "max_new_tokens": 6}}
    return sweep


def judged_of(prepared: Prepared) -> tuple[str, ...]:
    """Judging tasks that the vector ``topic`` waits for."""
    job = prepared.jobs[prepared.manifest.vectors["topic"]]
    assert isinstance(job, VectorJob)
    return job.judge_ids


class TestTasks:
    def test_answers_come_before_the_vector_and_the_vector_before_what_needs_it(self, sweep: TinySweep) -> None:
        prepared = sweep.prepare()
        asked = [job for job in prepared.jobs.values() if isinstance(job, AnswersJob)]
        assert [job.label for job in asked] == [
            f"answers for vector topic, {side} {number}" for number in (1, 2) for side in ("positive", "negative")
        ]
        vector = prepared.jobs[prepared.manifest.vectors["topic"]]
        assert isinstance(vector, VectorJob)
        assert vector.parents == tuple(job.id for job in asked)
        assert len(set(vector.judge_ids)) == 4
        assert set(vector.judge_ids) <= prepared.judge_tasks.keys()
        random = prepared.jobs[prepared.manifest.vectors["random"]]
        assert random.parents == (vector.id,)

    def test_vectors_that_differ_in_their_filter_share_answers_and_judgements(self, sweep: TinySweep) -> None:
        before = sweep.prepare()
        sweep.raw["vectors"]["topic"]["extract"]["keep_above"] = 70
        after = sweep.prepare()
        assert before.manifest.vectors["topic"] != after.manifest.vectors["topic"]
        assert judged_of(before) == judged_of(after)
        sweep.raw["vectors"]["topic"]["extract"]["judge"]["patterns"] = ["a"]
        judged = sweep.prepare()
        assert judged.manifest.vectors["topic"] != after.manifest.vectors["topic"]
        assert {job.id for job in judged.jobs.values() if isinstance(job, AnswersJob)} <= after.jobs.keys()
        assert not set(judged_of(judged)) & set(judged_of(after))

    def test_the_trait_counts_by_what_is_asked(self, sweep: TinySweep) -> None:
        before = sweep.prepare().manifest.vectors["topic"]
        sweep.replace("traits/topic/trait.yaml", "description: Talks", "description: Speaks")
        assert sweep.prepare().manifest.vectors["topic"] == before
        sweep.replace("traits/topic/trait.yaml", "Never do.", "Do not.")
        assert sweep.prepare().manifest.vectors["topic"] != before

    def test_the_id_is_that_of_vectors_in_stores(self, sweep: TinySweep) -> None:
        """A literal id of what does not depend on the random model of this test: the recipe but for ids in it."""
        vector = sweep.prepare().jobs[sweep.prepare().manifest.vectors["topic"]]
        assert isinstance(vector, VectorJob)
        recipe = vector.vector.identity(vector.base, "topic")
        del recipe["base"]
        assert recipe == {"min_coherence": None, "tokens": "response_avg", "keep": "positive", "keep_above": 50.0}

    def test_the_manifest_says_what_the_vector_is_made_of(self, sweep: TinySweep) -> None:
        sweep.raw["vectors"]["topic"]["extract"]["compare"] = {"other": {"judge": "rule", "patterns": ["x"]}}
        prepared = sweep.prepare()
        assert [entry.about for entry in prepared.manifest.asked] == [
            "positive 1",
            "negative 1",
            "positive 2",
            "negative 2",
        ]
        entry = prepared.manifest.asked[0]
        assert (entry.vector, set(entry.judge_ids), entry.counted) == ("topic", {"trait", "other"}, ("trait",))
        assert entry.rule == {"keep": "positive", "keep_above": 50.0, "min_coherence": None}
        assert set(entry.judge_ids.values()) <= prepared.judge_tasks.keys()

    def test_only_brings_the_answers_of_the_vectors_that_are_needed(self, sweep: TinySweep) -> None:
        assert any(isinstance(job, AnswersJob) for job in sweep.prepare(only="pps").jobs.values())
        alone = sweep.prepare(only="label == 'none'")
        assert not any(isinstance(job, AnswersJob | VectorJob) for job in alone.jobs.values())
        judged = {judge_id for entry in alone.asked for judge_id in entry.judge_ids.values()}
        assert alone.judge_tasks.keys() == judged

    def test_smoke_asks_little(self, sweep: TinySweep) -> None:
        real, smoke = sweep.prepare(), sweep.prepare(smoke=True)
        asked = [job for job in smoke.jobs.values() if isinstance(job, AnswersJob)]
        assert [len(job.sample.questions) for job in asked] == [2, 2]
        assert not {job.id for job in asked} & real.jobs.keys()
        assert smoke.manifest.vectors["topic"] != real.manifest.vectors["topic"]

    def test_plan_counts_the_calls(self, sweep: TinySweep) -> None:
        metric = {"judge": "openai", "model": "m", "prompt": "Warm? {question} {answer}"}
        sweep.raw["vectors"]["topic"]["extract"]["judge"] = metric
        prepared = sweep.prepare()
        (cost,) = judge_costs(prepared.judge_tasks.values(), prepared.jobs.values(), prepared.sweep.endpoints)
        assert (cost.model, cost.endpoint, cost.num_calls) == ("m", "openai", 12)


class TestFaults:
    def test_all_at_once_under_the_users_keys(self, sweep: TinySweep) -> None:
        sweep.raw["vectors"]["topic"]["extract"] = {
            "trait": "topik",
            "judge": {"judge": "openai", "model": "m", "trait": "topic", "endpoint": "nowhere"},
            "compare": {"other": {"judge": "rule", "trait": "none_such"}},
        }
        faults = sweep.faults()
        assert "no trait 'topik'" in faults["vectors.topic.extract.trait"]
        assert "no endpoint 'nowhere'" in faults["vectors.topic.extract.judge.endpoint"]
        assert "no trait 'none_such'" in faults["vectors.topic.extract.compare.other.trait"]

    def test_a_trait_without_instructions(self, sweep: TinySweep) -> None:
        sweep.replace("traits/topic/trait.yaml", EXTRACTABLE, "")
        assert "has no" in sweep.faults()["vectors.topic.extract.trait"]

    def test_unknown_keys(self, sweep: TinySweep) -> None:
        sweep.raw["vectors"]["topic"]["extract"]["keep_abov"] = 3
        assert "did you mean keep_above?" in sweep.faults()["vectors.topic.extract.keep_abov"]


class TestMadeWithoutRay:
    @pytest.fixture
    def prepared(self, sweep: TinySweep) -> Prepared:
        sweep.raw["vectors"]["topic"]["extract"]["judge"]["patterns"] = ["e"]
        sweep.raw["vectors"]["topic"]["extract"]["compare"] = {"other": {"judge": "rule", "patterns": ["[a-z]"]}}
        sweep.raw["vectors"]["topic"]["extract"]["samples"] = 3
        sweep.raw["runs"] = [{"defense": {"kind": "pps", "vector": "topic", "layer": 2, "coefficient": 0.5}}]
        return sweep.prepare("training.max_steps=1", "evaluation.max_new_tokens=2")

    def test_from_answers_to_the_vector(self, prepared: Prepared, tmp_path: Path) -> None:
        work = work_in(prepared, tmp_path / "store")
        store, vector_id = work.store, prepared.manifest.vectors["topic"]
        vector_job = prepared.jobs[vector_id]
        assert isinstance(vector_job, VectorJob)
        for job in prepared.jobs.values():
            if isinstance(job, AnswersJob):
                work.run(job.id, lambda **_: None)
        with pytest.raises(StoreError, match="not all answers are judged by 'trait'"):
            work.run(vector_id, lambda **_: None)
        for judge_id in vector_job.judge_ids:
            asyncio.run(judge_task(store, prepared.judge_tasks[judge_id]))
        work.run(vector_id, lambda **_: None)
        made = Vector.read(store.path(f"vectors/{vector_id}.safetensors"))

        asked = vector_job.asked
        base = load_base(vector_job.base, torch.device("cpu"))
        encoder, rows = ChatEncoder(base.tokenizer, 2**31), []
        for positive, negative in zip(asked[::2], asked[1::2], strict=True):
            sides = [store.read_table("generations", one.sample.id).to_pylist() for one in (positive, negative)]
            rows += [pair for pair in zip(*sides, strict=True) if "e" in pair[0]["answer"].lower()]
        rows = [pair for pair in rows if all(one["answer"].strip() for one in pair)]
        assert 0 < len(rows) < 18, "some rows are kept and some are not"
        means = []
        for side in (0, 1):
            states = []
            for pair in rows:
                one = pair[side]
                head = [
                    {"role": "system", "content": one["system_prompt"]},
                    {"role": "user", "content": one["question"]},
                ]
                encoded = encoder.encode([*head, {"role": "assistant", "content": one["answer"]}])
                with torch.no_grad():
                    ids = torch.tensor([encoded.input_ids])
                    hidden = base.model(input_ids=ids, output_hidden_states=True).hidden_states[:-1]
                states.append(torch.stack(hidden)[:, 0, torch.tensor(encoded.response_mask)].double().mean(1))
            means.append(torch.stack(states).mean(0))
        # float32 activations, and sums over other batches: 1e-5 of values near 1
        torch.testing.assert_close(made.values[:-1].double(), means[0] - means[1], rtol=1e-4, atol=1e-5)
        assert f"{len(rows)} of 18 rows are left" in store.read(f"vectors/{vector_id}.log").decode()

    def test_what_each_judge_would_keep(self, prepared: Prepared, tmp_path: Path) -> None:
        work = work_in(prepared, tmp_path / "store")
        for job in prepared.jobs.values():
            if isinstance(job, AnswersJob):
                work.run(job.id, lambda **_: None)
        results = load(work.store.path("sweeps/tiny/manifest.json").parent)
        assert set(results.extractions()["num_rows"]) == {0}, "nothing is judged yet"
        vector_job = prepared.jobs[prepared.manifest.vectors["topic"]]
        assert isinstance(vector_job, VectorJob)
        judge_ids = list(vector_job.all_judge_ids)
        for number, judge_id in enumerate(judge_ids, start=1):
            asyncio.run(judge_task(work.store, prepared.judge_tasks[judge_id]))
            if number == 1:
                assert set(results.extractions()["num_rows"]) == {0}, "one side of one pair is judged"
        answers = results.asked_answers()
        positive = answers[answers["run"].str.startswith("positive")]
        shown = {metric: int(part["value"].sum()) for metric, part in positive.groupby("metric")}
        own, other = results.extractions().to_dict("records")
        assert (own["metric"], own["num_rows"], own["has_a_say"]) == ("trait", 18, True)
        assert (other["metric"], other["num_rows"], other["has_a_say"]) == ("other", 18, False)
        for row in (own, other):  # an empty negative answer may remove some rows more
            assert 0 < row["num_kept"] <= shown[row["metric"]]
        assert other["num_kept_by_both"] == own["num_kept"] == own["num_kept_by_both"], "e is a letter"
        for row in (own, other):
            assert row["num_kept_positive"] == row["num_kept"], "the filter of this vector"
            assert row["num_kept_paired"] < row["num_kept"], "the negative answers have vowels too"
        (row,) = results.agreement().to_dict("records")
        assert (row["answers"], row["metric"], row["other"], row["num_both"]) == ("vector topic", "trait", "other", 36)


def write(folder: Path, **extract: object) -> Path:
    path = write_tiny_sweep(
        folder, runs="  - defense: {kind: pps, vector: topic, layer: 2, coefficient: 0.5}\n", extra="trackers: none"
    )
    extractable(folder)
    raw = yaml.safe_load(path.read_text())
    raw["vectors"] = {"topic": {"extract": {"trait": "topic", "judge": ANY_VOWEL, "max_new_tokens": 6, **extract}}}
    raw["execution"] = {"trials": 2}
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.mark.slow
class TestEndToEnd:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("extract")

    @pytest.fixture(scope="class")
    def outcome(self, folder: Path) -> Outcome:
        small = {
            "judge": "local",
            "model": str(folder / "model"),
            "prompt": "Warm? {answer}",
            "min_probability_mass": 1e-9,
        }
        # `all`: a random model says nothing that a filter could be tried on; the vector waits for the judge as ever
        write_tiny_sweep(folder)  # brings the model
        return run_sweep(write(folder, judge=small, keep="all"), console=Console(file=io.StringIO(), width=120))

    def test_the_vector_is_the_mean_over_the_kept_answers(self, outcome: Outcome) -> None:
        assert not outcome.failures
        results = outcome.results
        assert list(results.runs()["status"]) == ["done", "done"]
        store = Store(results.root)
        vector_id = results.manifest.vectors["topic"]
        vector = Vector.read(store.path(f"vectors/{vector_id}.safetensors"))
        assert (vector.values.shape, vector.final_row) == ((5, 32), "pre_norm")
        assert torch.isfinite(vector.values).all()
        assert vector.values[1:].norm(dim=1).min() > 0
        assert "of 6 rows are left" in store.read(f"vectors/{vector_id}.log").decode()

    def test_again_there_is_nothing_to_do_and_nothing_to_collect(self, outcome: Outcome, folder: Path) -> None:
        again = run_sweep(folder / "sweep.yaml", console=Console(file=io.StringIO()))
        assert again.num_done_before == again.num_jobs
        assert not find_garbage(Store(outcome.results.root))

    def test_a_vector_that_waits_for_scores_alone_is_made_by_the_next_invocation(
        self, outcome: Outcome, folder: Path
    ) -> None:
        """As after a kill between judging and making: the answers are there, some scores and the vector are not."""
        store = Store(outcome.results.root)
        vector_id = outcome.results.manifest.vectors["topic"]
        key = f"vectors/{vector_id}.safetensors"
        before = store.read(key)
        store.remove(key)
        for entry in outcome.results.manifest.asked:
            store.remove(f"tables/scores/{entry.judge_ids['trait']}.parquet")
        again = run_sweep(folder / "sweep.yaml", console=Console(file=io.StringIO()))
        assert not again.failures
        assert store.read(key) == before
        assert again.num_jobs - again.num_done_before == 1

    def test_no_row_left_skips_what_needs_the_vector_and_says_why(self, outcome: Outcome, folder: Path) -> None:
        del outcome  # the answers are there
        rule = {"judge": "rule", "patterns": ["never in there"]}
        failed = run_sweep(write(folder, judge=rule), console=Console(file=io.StringIO()))
        reasons = sorted((failure.kind, failure.reason) for failure in failed.failures.values())
        assert [kind for kind, _ in reasons] == ["failed", "skipped"]
        assert "0 of 6 rows are left; removed: 6 (positive answer scores 50 or less)" in reasons[0][1]
        assert "'Is it warm?' ->" in reasons[0][1]
        assert "vector topic, which failed" in reasons[1][1]
