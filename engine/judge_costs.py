"""What judging by models will ask and cost at most, before anything is asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from analysis.judges import BaseMetric, Item
from analysis.judges.local import LocalMetric
from analysis.judges.openai import OpenaiMetric
from engine.answering import requests
from engine.budget import estimate
from engine.endpoints import EndpointConfig
from engine.tasks import AnswersJob, AnswerTask, Job, JudgeTask, RunJob, SampleTask

RUNS = "the runs"
"""What is asked where answers come from a server."""

CHARACTERS_PER_ANSWER_TOKEN = 5  # more than in usual English text: an answer is taken to be as long as it may be


@dataclass(frozen=True)
class JudgeCost:
    """Calls of one model. ``dollars`` None: the endpoint's prices are not given; a local model costs nothing."""

    model: str
    endpoint: str | None  # None: in memory
    num_calls: int
    num_prompt_tokens: int
    num_completion_tokens: int
    dollars: float | None

    def describe(self) -> str:
        """One line for people."""
        calls = f"{self.num_calls:,} answers" if self.model == RUNS else f"up to {self.num_calls:,} judge calls"
        if self.endpoint is None:
            return f"{calls} of {self.model} in memory"
        tokens = f"{self.num_prompt_tokens:,} + {self.num_completion_tokens:,} tokens"
        prices = f"no price given (endpoints.{self.endpoint}.price_per_million_prompt_tokens, ..._completion_tokens)"
        cost = prices if self.dollars is None else f"${self.dollars:,.2f}"
        return f"{calls} of {self.model} at {self.endpoint}, at most {tokens}, {cost}"


def judge_costs(
    tasks: Iterable[JudgeTask], jobs: Iterable[Job], endpoints: Mapping[str, EndpointConfig]
) -> list[JudgeCost]:
    """What these judging tasks take, by model. What replies on disk save is not taken off; requests that several
    metrics share are counted for each."""
    samples: dict[str, SampleTask] = {}
    for job in jobs:
        if isinstance(job, RunJob):
            samples |= {sample.id: sample for sample in job.samples}
        elif isinstance(job, AnswersJob):
            samples[job.sample.id] = job.sample
    sums: dict[tuple[str, str | None], list[int]] = {}
    for task in tasks:
        asking = task.metric.asking
        if asking is None or task.sample_id not in samples:
            continue
        endpoint = asking.endpoint if isinstance(asking, OpenaiMetric) else None
        assert isinstance(asking, OpenaiMetric | LocalMetric)
        counts = sums.setdefault((asking.model, endpoint), [0, 0, 0])
        for index, count in enumerate(_task_cost(asking, samples[task.sample_id])):
            counts[index] += count
    return [
        JudgeCost(
            model=model,
            endpoint=endpoint,
            num_calls=calls,
            num_prompt_tokens=prompt,
            num_completion_tokens=completion,
            dollars=None if endpoint is None else endpoints[endpoint].price(prompt, completion),
        )
        for (model, endpoint), (calls, prompt, completion) in sums.items()
    ]


def answer_costs(tasks: Iterable[AnswerTask], endpoints: Mapping[str, EndpointConfig]) -> list[JudgeCost]:
    """What answers from servers take at most, by endpoint."""
    sums: dict[str, list[int]] = {}
    for task in tasks:
        counts = sums.setdefault(task.endpoint, [0, 0, 0])
        for request in requests(task):
            wanted = estimate(request)
            for index, count in enumerate((1, wanted.num_prompt_tokens, wanted.num_completion_tokens)):
                counts[index] += count
    return [
        JudgeCost(RUNS, name, calls, prompt, completion, endpoints[name].price(prompt, completion))
        for name, (calls, prompt, completion) in sums.items()
    ]


def _task_cost(metric: BaseMetric, sample: SampleTask) -> tuple[int, int, int]:
    """Calls, prompt tokens and completion tokens of one metric over the answers of one sampling task, at most."""
    judge = metric.make()
    answer = "x" * (CHARACTERS_PER_ANSWER_TOKEN * sample.sampling.max_new_tokens)
    calls = prompt = completion = 0
    for question in sample.questions:
        for request in judge.requests(Item(question.text, answer)):
            wanted = estimate(request)
            calls += 1
            prompt += wanted.num_prompt_tokens
            completion += wanted.num_completion_tokens
    number = sample.sampling.samples
    return calls * number, prompt * number, completion * number
