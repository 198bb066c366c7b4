"""What judging by models costs, counted before anything is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from analysis.judges.openai import OpenaiMetric
from analysis.judges.rule import RuleMetric
from engine.endpoints import EndpointConfig
from engine.judge_costs import judge_costs
from engine.machine import Machine
from engine.prepare import prepare
from engine.show import plan_table
from engine.tasks import JudgeTask, QuestionText, RunJob, SampleTask
from tests.engine.tiny_sweep import write_tiny_sweep
from trainables.base_model import ResolvedBase
from trainables.errors import ConfigError
from trainables.sample import SamplingConfig

PRICED = EndpointConfig(price_per_million_prompt_tokens=2.0, price_per_million_completion_tokens=8.0)


def job() -> RunJob:
    questions = (QuestionText(id="a", text="Why?"), QuestionText(id="b", text="How so?"))
    sample = SampleTask(id="s" * 12, questions=questions, sampling=SamplingConfig(samples=3, max_new_tokens=12))
    base = ResolvedBase(source="x", model="x", revision="1", dtype="float32")
    return RunJob(id="r" * 12, label="none", base=base, train=None, samples=(sample,), losses=())


def task(metric: OpenaiMetric | RuleMetric) -> JudgeTask:
    return JudgeTask(id="j" * 12, sample_id="s" * 12, run_id="r" * 12, metric=metric)


def test_calls_tokens_and_dollars_by_hand() -> None:
    """Prompt ``Rate: {answer}`` with 60 characters of answer: 66 / 3 = 22 tokens and 8 for the message; 6 answers."""
    metric = OpenaiMetric(prompt="Rate: {answer}", model="m")
    (cost,) = judge_costs([task(metric)], [job()], {"openai": PRICED})
    assert (cost.num_calls, cost.num_prompt_tokens, cost.num_completion_tokens) == (6, 180, 6)
    assert cost.dollars == pytest.approx((180 * 2 + 6 * 8) / 1e6)


def test_text_mode_asks_as_often_as_it_draws() -> None:
    metric = OpenaiMetric(prompt="Rate: {answer}", model="m", mode="text", samples=5)
    (cost,) = judge_costs([task(metric)], [job()], {"openai": EndpointConfig()})
    assert cost.num_calls == 30
    assert cost.dollars is None
    assert "no price given (endpoints.openai.price_per_million_prompt_tokens" in cost.describe()


def test_rules_ask_nothing() -> None:
    assert judge_costs([task(RuleMetric(patterns=("x",)))], [job()], {}) == []


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    sweep = write_tiny_sweep(tmp_path, runs="  - defense: none\n")
    text = sweep.read_text()
    asked = 'metrics: {warm: {judge: openai, model: judge-1, prompt: "Rate: {answer}"}}'
    sweep.write_text(text.replace("metrics: {trait: {judge: rule, trait: topic}}", asked))
    return sweep


def test_the_plan_says_it(sweep: Path) -> None:
    overrides = [
        "endpoints.openai.price_per_million_prompt_tokens=2",
        "endpoints.openai.price_per_million_completion_tokens=8",
    ]
    prepared = prepare(sweep, overrides, Machine(num_cpus=2, num_gpus=0, memory_gb=8))
    console = Console(width=160)
    with console.capture() as capture:
        console.print(plan_table(prepared))
    assert "up to 16 judge calls of judge-1 at openai" in capture.get()
    assert "$0.00" in capture.get()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "evaluation.metrics.warm.endpoint=opnai",
            "metrics.warm.endpoint: no endpoint 'opnai'; did you mean",
        ),
        ("endpoints.openai.max_dollars=3", "endpoints.openai.max_dollars: needs price_per_million_prompt_tokens"),
        ("endpoints.openai.base_url=localhost", "endpoints.openai.base_url: must begin with http"),
        ("endpoints.openai.api_key_env=sk-123", "is the NAME of an environment variable, never the key itself"),
        ("endpoints.openai.base_url=https://me:pw@host/v1", "must not hold a user or a password"),
    ],
)
def test_faults(sweep: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        prepare(sweep, [override], Machine(num_cpus=2, num_gpus=0, memory_gb=8))
    assert message in str(error.value)
    assert "sk-123" not in str(error.value).replace("endpoints.openai.api_key_env=sk-123", "")
