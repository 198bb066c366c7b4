"""Sweeps judged by models, end to end through Ray: a server that misbehaves, a local model, keys, scoring again."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from engine.rescore import rescore
from engine.run import Outcome, run_sweep
from tests.engine.tiny_sweep import write_tiny_sweep
from tests.judge_server import Behaviour, JudgeServer, score_of
from trainables.errors import ConfigError
from trainables.failpoints import ENVIRONMENT_VARIABLE

KEY = "sk-do-not-write-me-down-4711"
VARIABLE = "SHIFTGRAD_TEST_KEY"
TEMPLATE = "How warm is this? {question} {answer}"
RUNS = "  - defense: none\n  - {defense: none, seed: 1}\n"
NUM_ANSWERS = 24  # base and two runs, four questions, two answers
TROUBLES = {"429": 0.15, "500": 0.1, "reset": 0.05, "garbage_logprobs": 0.1, "refusal": 0.1}


def write(folder: Path, url: str) -> Path:
    sweep = write_tiny_sweep(
        folder,
        runs=RUNS,
        extra=f"execution: {{trials: 2}}\nendpoints: {{test: {{base_url: '{url}', api_key_env: {VARIABLE}}}}}",
    )
    rule = "metrics: {trait: {judge: rule, trait: topic}}"
    both = f"""metrics:
    trait: {{judge: rule, trait: topic}}
    warm: {{judge: openai, model: judge-1, prompt: "{TEMPLATE}", endpoint: test}}
    strict: {{judge: openai, model: judge-1, prompt: "{TEMPLATE}", endpoint: test, min_probability_mass: 0.95}}
    small: {{judge: local, model: {folder / "model"}, prompt: "{TEMPLATE}", min_probability_mass: 1.0e-9}}"""
    text = sweep.read_text()
    assert text.count(rule) == 1
    sweep.write_text(text.replace(rule, both))
    return sweep


@pytest.fixture(scope="module")
def server() -> Iterator[JudgeServer]:
    with JudgeServer(Behaviour(troubles=TROUBLES, key=KEY)) as server:  # type: ignore[arg-type]
        yield server


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, server: JudgeServer) -> Path:
    return write(tmp_path_factory.mktemp("judged"), server.url)


@pytest.fixture(scope="module")
def printed() -> io.StringIO:
    return io.StringIO()


@pytest.fixture(scope="module")
def outcome(sweep: Path, server: JudgeServer, printed: io.StringIO) -> Iterator[Outcome]:
    del server  # is up
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(VARIABLE, raising=False)
        with pytest.raises(ConfigError, match=rf"endpoints\.test\.api_key_env: the environment variable {VARIABLE}"):
            run_sweep(sweep, console=Console(file=printed))
        assert not list(sweep.parent.rglob("manifest.json"))  # before anything is spent
        patch.setenv(VARIABLE, KEY)
        yield run_sweep(sweep, console=Console(file=printed, width=120))


@pytest.mark.slow
class TestJudgedByModels:
    def test_every_answer_ends_with_one_status_and_the_known_score(self, outcome: Outcome) -> None:
        assert not outcome.failures
        scores = outcome.results.scores()
        warm = scores[scores["metric"] == "warm"]
        assert len(warm) == NUM_ANSWERS
        assert not warm.duplicated(["run", "question_id", "sample_index"]).any()
        assert set(warm["status"]) <= {"ok", "unparsable", "refused"}
        for row in warm[warm["status"] == "ok"].to_dict("records"):
            text = TEMPLATE.replace("{question}", str(row["question"])).replace("{answer}", str(row["answer"]))
            assert row["value"] == pytest.approx(score_of(text), abs=1e-9)
        assert (warm["status"] == "ok").sum() > NUM_ANSWERS / 2

    def test_metrics_with_the_same_requests_share_replies(self, outcome: Outcome, server: JudgeServer) -> None:
        scores = outcome.results.scores()
        strict = scores[scores["metric"] == "strict"]
        assert set(strict["status"]) <= {"low_mass", "unparsable", "refused"}  # the server is sure to 0.9
        assert len(server.seen.answered) <= NUM_ANSWERS  # twelve bodies may be the same text twice

    def test_the_local_model_scores_every_answer(self, outcome: Outcome) -> None:
        scores = outcome.results.scores()
        small = scores[scores["metric"] == "small"]
        assert len(small) == NUM_ANSWERS
        assert set(small["status"]) == {"ok"}
        assert small["value"].between(0, 100).all()

    def test_gaps_are_counted_in_the_summary(self, outcome: Outcome) -> None:
        summary = outcome.results.summary()
        total = summary["warm_num_scored"] + summary["warm_num_missing"]
        assert (total == 8).all()

    def test_again_asks_nothing(self, outcome: Outcome, sweep: Path, server: JudgeServer) -> None:
        before = server.seen.num_requests
        again = run_sweep(sweep, console=Console(file=io.StringIO()))
        assert server.seen.num_requests == before
        assert again.results.summary().equals(outcome.results.summary())

    def test_another_threshold_is_applied_offline(self, outcome: Outcome, sweep: Path, server: JudgeServer) -> None:
        before, scores = server.seen.num_requests, outcome.results.scores()
        done = rescore(sweep, ["evaluation.metrics.strict.min_probability_mass=0.5"])
        assert server.seen.num_requests == before
        assert done.num_open == 0
        now = done.results.scores()
        strict = now[now["metric"] == "strict"]["value"].dropna().tolist()
        assert strict == scores[scores["metric"] == "warm"]["value"].dropna().tolist()

    def test_the_key_is_nowhere(self, outcome: Outcome, sweep: Path, printed: io.StringIO) -> None:
        del outcome
        places = [sweep.parent, Path("/tmp/ray/session_latest").resolve()]
        files = [file for place in places if place.is_dir() for file in place.rglob("*") if file.is_file()]
        assert len(files) > 50
        assert [file for file in files if KEY.encode() in file.read_bytes()] == []
        assert KEY not in printed.getvalue()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_committed_reply_is_asked_for_again_after_kills(sweep: Path, tmp_path: Path) -> None:
    """The judge's process kills itself after every commit: what was committed until then is never asked for again."""
    with JudgeServer(Behaviour(latency_s=0.05, key=KEY)) as server:
        places = f"endpoints.test.base_url={server.url}"
        arguments = [str(sweep), f"results={tmp_path / 'results'}", places, "endpoints.test.max_concurrency=2"]
        killed = _run(arguments, fail_at="after_commit:judgements")
        assert killed.returncode == 3, killed.stdout
        assert "FAILED" in killed.stdout
        known = _asked_of_the_server(tmp_path / "results")
        assert 0 < len(known) < NUM_ANSWERS  # killed in the middle
        before = server.seen.num_requests
        done = _run(arguments)
        assert done.returncode == 0, done.stdout
        everything = _asked_of_the_server(tmp_path / "results")
        assert len(everything) == len(set(everything)), "no reply is committed twice"
        assert set(known) < set(everything)
        assert server.seen.num_requests - before == len(everything) - len(known)


def _asked_of_the_server(store: Path) -> list[str]:
    """Requests with a committed reply, without those to the model in memory, which generates no token."""
    lines = [
        json.loads(line) for file in (store / "judgements").glob("*.jsonl") for line in file.read_text().splitlines()
    ]
    return [line["request"] for line in lines if line["reply"]["num_completion_tokens"] == 1]


def _run(arguments: list[str], fail_at: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != ENVIRONMENT_VARIABLE}
    environment |= {VARIABLE: KEY} | ({ENVIRONMENT_VARIABLE: fail_at} if fail_at is not None else {})
    return subprocess.run(
        [sys.executable, "-m", "engine.cli", "run", *arguments],
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
