"""Answers of runs from a server that serves them by their ids: what reaches it, what is kept, what is asked again."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import pytest
import ray.exceptions
from rich.console import Console
from typer.testing import CliRunner

import engine.judge_pool
from engine.answering import answer_task, requests
from engine.cli import app
from engine.endpoints import EndpointConfig
from engine.judge_pool import JudgePool, _JudgeActor
from engine.judging import Judged, ReplyDesk, missing_keys
from engine.openai_asker import OpenAIAsker
from engine.run import run_sweep
from engine.software import Software
from engine.store import Store
from engine.tasks import AnswerTask, JudgeTask, QuestionText, RunJob, SampleTask
from tests.engine.finished import write_finished
from tests.engine.test_judge_pool import _Ray, _task
from tests.engine.tiny_prepare import TinySweep, ids, tiny_model_folder
from tests.engine.tiny_sweep import write_tiny_sweep
from tests.judge_server import Behaviour, JudgeServer, answer_of
from trainables.errors import VersionError
from trainables.sample import SamplingConfig

RUN = "c" * 12
SAMPLE = "a" * 12


def task(system_prompt: str | None = "Be brief.") -> AnswerTask:
    sampling = SamplingConfig(samples=2, temperature=0.7, max_new_tokens=33, system_prompt=system_prompt)
    questions = (QuestionText(id="q1", text="Why?"), QuestionText(id="q2", text="How?"))
    return AnswerTask(sample=SampleTask(id=SAMPLE, questions=questions, sampling=sampling, endpoint="vllm"), run_id=RUN)


def answer(store: Store, server: JudgeServer, task: AnswerTask, **endpoint: Any) -> Judged:
    async def go() -> Judged:
        config = EndpointConfig(base_url=server.url, api_key_env=None, **endpoint)
        asker = OpenAIAsker(config, answers=True)
        try:
            return await answer_task(store, task, ReplyDesk(store, asker), asker)
        finally:
            await asker.aclose()

    return asyncio.run(go())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store", create=True)


class TestAnswers:
    def test_everything_that_shapes_an_answer_reaches_the_server(self, store: Store) -> None:
        with JudgeServer(Behaviour(models=[RUN])) as server:
            assert answer(store, server, task()) == Judged(4, 0)
        rows = store.read_table("generations", SAMPLE).to_pylist()
        assert [(row["question_id"], row["sample_index"]) for row in rows] == [
            ("q1", 0), ("q1", 1), ("q2", 0), ("q2", 1),
        ]  # fmt: skip
        for row, request in zip(rows, requests(task()), strict=True):
            sent = {
                "model": RUN,
                "seed": request.seed,
                "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": row["question"]}],
                "temperature": 0.7,
                "top_p": 1.0,
                "max_tokens": 33,
            }
            assert row["answer"] == answer_of(sent)
        assert len({row["answer"] for row in rows}) == 4  # a seed per answer
        assert {(row["num_tokens"], row["finish_reason"], row["system_prompt"]) for row in rows} == {
            (7, "stop", "Be brief.")
        }

    def test_a_run_that_is_not_served_is_told_and_nothing_is_asked(self, store: Store) -> None:
        with JudgeServer(Behaviour(models=["d" * 12])) as server:
            judged = answer(store, server, task())
            assert server.seen.num_requests == 0
        assert (judged.num_answers, judged.num_open) == (4, 4)
        assert f"no model {RUN}, it has {'d' * 12}" in str(judged.why)
        assert not store.exists(f"tables/generations/{SAMPLE}.parquet")

    def test_committed_answers_are_not_asked_for_again(self, store: Store) -> None:
        with JudgeServer(Behaviour(models=[RUN], troubles={"500": 0.5}, seed=5)) as server:
            first = answer(store, server, task(), max_retries=0)
            assert 0 < first.num_open < 4, "choose another seed: some have to fail"
            assert "HTTP 500" in str(first.why)
            assert not store.exists(f"tables/generations/{SAMPLE}.parquet")
            server.behaviour = Behaviour(models=[RUN])
            assert answer(store, server, task()) == Judged(4, 0)
            assert set(server.seen.answered.values()) == {1}
            before = server.seen.num_requests
            assert answer(store, server, task()) == Judged(0, 0)
            assert server.seen.num_requests == before

    def test_trouble_is_tried_again_as_with_judges(self, store: Store) -> None:
        with JudgeServer(Behaviour(models=[RUN], troubles={"429_retry_after": 0.4, "reset": 0.2}, seed=1)) as server:
            assert answer(store, server, task(), max_retries=9) == Judged(4, 0)
            assert server.seen.troubles.total() > 0

    def test_what_a_server_keeps_back_is_no_answer_and_says_so(self, store: Store) -> None:
        with JudgeServer(Behaviour(models=[RUN], troubles={"content_filter": 1.0})) as server:
            assert answer(store, server, task()) == Judged(4, 0)
        rows = store.read_table("generations", SAMPLE).to_pylist()
        assert {(row["answer"], row["finish_reason"]) for row in rows} == {("", "filtered")}


class TestIdentity:
    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tiny_model_folder(tmp_path_factory)

    @pytest.fixture
    def sweep(self, tmp_path: Path, model: Path) -> TinySweep:
        sweep = TinySweep(tmp_path, model)
        sweep.raw["endpoints"] = {name: {"base_url": f"http://{name}/v1", "api_key_env": "KEY"} for name in ("a", "b")}
        return sweep

    def test_that_a_server_answers_counts_and_which_one_does_not(self, sweep: TinySweep) -> None:
        local = ids(sweep.prepare())
        sweep.raw["evaluation"]["answers_from"] = "a"
        served = ids(sweep.prepare())
        assert served["train"] == local["train"]
        assert not set(served["sample"].values()) & set(local["sample"].values())
        sweep.raw["evaluation"]["answers_from"] = "b"
        assert ids(sweep.prepare()) == served

    def test_an_unknown_endpoint_is_a_fault(self, sweep: TinySweep) -> None:
        sweep.raw["evaluation"]["answers_from"] = "c"
        assert "no endpoint 'c'" in sweep.faults()["evaluation.answers_from"]

    def test_the_trial_does_not_sample_and_the_key_is_needed(self, sweep: TinySweep) -> None:
        sweep.raw["evaluation"]["answers_from"] = "a"
        prepared = sweep.prepare()
        runs = [job for job in prepared.jobs.values() if isinstance(job, RunJob)]
        assert not any("generations" in key for job in runs for key in job.outputs())
        assert {task.run_id for task in prepared.answers} == {job.id for job in runs}
        endpoints = prepared.sweep.endpoints
        assert [fault.key for fault in missing_keys([], prepared.answers, endpoints, {})] == ["endpoints.a.api_key_env"]

    def test_a_smoke_run_samples_itself(self, sweep: TinySweep) -> None:
        sweep.raw["evaluation"]["answers_from"] = "a"
        assert sweep.prepare(smoke=True).answers == ()

    def test_plan_counts_the_answers(self, sweep: TinySweep) -> None:
        sweep.raw["evaluation"]["answers_from"] = "a"
        sweep.prepare()
        done = CliRunner().invoke(app, ["plan", str(sweep.file)])
        assert "40 answers of the runs at a, at most" in " ".join(done.output.split())

    def test_the_command_serves_trained_runs_by_their_ids(self, sweep: TinySweep) -> None:
        prepared = sweep.prepare()
        store = write_finished(prepared)
        folder = store.path("sweeps/tiny/manifest.json").parent
        nothing = CliRunner().invoke(app, ["serving", str(folder)])
        assert "no run of this sweep is trained yet" in str(nothing.exception)
        run = next(entry for entry in prepared.manifest.runs if entry.label == "none")
        store.publish(f"runs/{run.run_id}/adapter", sweep.folder / "data")  # any folder
        done = CliRunner().invoke(app, ["serving", str(folder)])
        base = prepared.manifest.runs[0]
        assert f"--served-model-name {base.run_id}" in done.output
        assert "--max-lora-rank 8" in done.output  # the least that holds rank 2
        assert f"--lora-modules {run.run_id}={store.root}/runs/{run.run_id}/adapter" in done.output


class TestPool:
    def test_answers_are_judged_when_they_are_there_and_failures_are_told(
        self, monkeypatch: pytest.MonkeyPatch, store: Store
    ) -> None:
        fake = _Answering()
        monkeypatch.setattr(engine.judge_pool, "ray", fake)
        failures: list[tuple[str, str]] = []
        other = AnswerTask(sample=task().sample.model_copy(update={"id": "e" * 12}), run_id=RUN)
        pool = JudgePool(
            store,
            {"b" * 12: _task(), "d" * 12: _task("d" * 12, "e" * 12)},
            lambda task_id, reason: failures.append((task_id, reason)),
            {"vllm": EndpointConfig(api_key_env=None)},
            answers=[task(), other],
        )
        fake.results = {f"answer {'e' * 12}": Judged(4, 1, "HTTP 500: no")}
        pool.answer(SAMPLE)
        pool.answer(SAMPLE)
        pool.answer("e" * 12)
        pool.answer("not served")
        pool.wait()
        assert fake.answered == [SAMPLE, "e" * 12]
        assert [call.id for call in fake.calls] == ["b" * 12]
        assert failures == [("e" * 12, "1 of 4 answers did not come: HTTP 500: no")]

    def test_other_software_than_the_driver_s_is_told_as_such(self, store: Store) -> None:
        driver = Software((("torch", "0.1"),), "x", "elsewhere:/x")
        actor = _JudgeActor(store, None, driver)
        with pytest.raises(VersionError, match=r"where the driver has 0\.1"):
            asyncio.run(actor.judge(_task()))


class _Answering(_Ray):
    exceptions = ray.exceptions

    def __init__(self) -> None:
        super().__init__()
        self.answered: list[str] = []
        self.answer = self

    @property
    def judge(self) -> _Answering:
        return self

    def remote(self, *arguments: Any, **options: Any) -> Any:
        if arguments and isinstance(arguments[0], AnswerTask):
            self.answered.append(arguments[0].id)
            return f"answer {arguments[0].id}"
        if options or not arguments or isinstance(arguments[0], JudgeTask):
            return super().remote(*arguments, **options)
        return self


@pytest.mark.slow
def test_a_sweep_with_served_runs_end_to_end(tmp_path: Path) -> None:
    """Trained while no server has the runs, answered once it does, nothing asked twice."""
    with JudgeServer(Behaviour(models=["some-base"])) as server:
        extra = f"execution: {{trials: 1}}\nendpoints: {{vllm: {{base_url: '{server.url}', api_key_env: null}}}}"
        file = write_tiny_sweep(tmp_path, runs="  - defense: none\n", extra=extra)
        file.write_text(file.read_text().replace("  samples: 2\n", "  samples: 2\n  answers_from: vllm\n"))
        printed = io.StringIO()
        first = run_sweep(file, console=Console(file=printed, width=200))
        entries = {entry.label: entry for entry in first.results.manifest.runs}
        assert set(first.failures) == {entry.sample_id for entry in entries.values()}
        assert "none, answers: FAILED: 8 of 8 answers did not come: the server has no model" in printed.getvalue()
        assert first.results.runs().set_index("run").loc["none", "num_steps"] == 2
        server.behaviour = Behaviour(models=[entry.run_id for entry in entries.values()])
        second = run_sweep(file, console=Console(file=io.StringIO()))
        assert not second.failures
        assert second.num_done_before == second.num_jobs  # nothing was trained again
        answers = second.results.generations()
        assert len(answers) == 16
        for row in answers.to_dict("records"):
            assert str(row["answer"]).startswith(f"{entries[str(row['run'])].run_id} says ")
        assert (second.results.summary()["trait_num_scored"] == 8).all()
        asked = server.seen.num_requests
        run_sweep(file, console=Console(file=io.StringIO()))
        assert server.seen.num_requests == asked
