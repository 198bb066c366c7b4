"""The judge pool: Ray actors that score finished answers while other runs still train, and ask servers for answers.

Actors are of one group each: judges that need no model; those that ask one endpoint for judgements, or for the answers
of runs, which share its budget; one actor per model of local judges. They need no CPU of their own but for a local
model, whose one thread runs beside the trials. All that hold no model live on the driver's node: another one can be
lost without them.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from analysis.judges import Asker, Reply, Request
from analysis.judges.local import LocalMetric
from analysis.judges.openai import OpenaiMetric
from engine.answering import answer_task
from engine.budget import Budget, Estimate, Grant
from engine.endpoints import EndpointConfig
from engine.judging import Judged, ReplyDesk, judge_task
from engine.openai_asker import OpenAIAsker
from engine.software import Software, check_same, software
from engine.store import Store
from engine.tasks import AnswerTask, JudgeTask
from trainables.base_model import ResolvedBase

if TYPE_CHECKING:
    from analysis.judges.local_asker import LocalAsker

LOCAL_BATCH = 8
"""Answers that a local model judges together; after each batch the replies are on disk."""

Group: TypeAlias = tuple[str, str]  # kind of asker, and which


class RemoteBudget:
    """Reservations from another process. Those asked for in one turn of the event loop travel together."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self._wanted: list[tuple[Estimate, asyncio.Future[Grant]]] = []
        self._sending: asyncio.Task[None] | None = None

    async def reserve(self, estimates: Sequence[Estimate]) -> list[Grant]:
        loop = asyncio.get_running_loop()
        grants = [loop.create_future() for _ in estimates]
        self._wanted += zip(estimates, grants, strict=True)
        if self._sending is None:
            self._sending = asyncio.create_task(self._send())
        return list(await asyncio.gather(*grants))

    async def settle(self, used: Sequence[tuple[Estimate, int, int]]) -> None:
        self.actor.settle.remote(used)

    async def _send(self) -> None:
        await asyncio.sleep(0)
        wanted, self._wanted, self._sending = self._wanted, [], None
        try:
            grants = await self.actor.reserve.remote([estimate for estimate, _ in wanted])
        except ray.exceptions.RayError as error:
            for _, future in wanted:
                future.set_exception(error)
            return
        for (_, future), grant in zip(wanted, grants, strict=True):
            if not future.done():
                future.set_result(grant)


class _JudgeActor:
    """Does judging tasks, many at a time; its replies are on disk before they count, so a new one goes on."""

    def __init__(self, store: Store, asker: Callable[[], Asker] | None, driver: Software) -> None:
        self.store = store
        self.driver = driver
        self._make = asker
        self._desk: ReplyDesk | None = None

    @property
    def desk(self) -> ReplyDesk:
        """Made when first needed, so that other software than the driver's is told as such, not as a failing model."""
        if self._desk is None:
            check_same(self.driver, software())
            self._desk = ReplyDesk(self.store, None if self._make is None else self._make())
        return self._desk

    async def judge(self, task: JudgeTask) -> Judged:
        return await judge_task(self.store, task, self.desk)

    async def answer(self, task: AnswerTask) -> Judged:
        asker = self.desk.asker
        assert isinstance(asker, OpenAIAsker)
        return await answer_task(self.store, task, self.desk, asker)

    async def counts(self) -> dict[str, float]:
        """What was asked, and the CPU seconds of this process so far, for progress and benchmarks."""
        asker = self.desk.asker
        counts: dict[str, float] = {"num_asked": self.desk.num_asked, "cpu_s": time.process_time()}
        return counts | (vars(asker.counts) if isinstance(asker, OpenAIAsker) else {})


class JudgePool:
    """Submits judging tasks as their answers come in and collects what failed. Lives in the driver.

    Keys are read from the driver's environment and go to the actors in memory: where Ray was started before, its
    processes do not have them.
    """

    def __init__(
        self,
        store: Store,
        tasks: Mapping[str, JudgeTask],
        failed: Callable[[str, str], None],
        endpoints: Mapping[str, EndpointConfig] | None = None,
        *,
        answers: Sequence[AnswerTask] = (),
        local_gpus: float = 0.0,
        gives_gpus_back: bool = False,
    ) -> None:
        self.store = store
        self.tasks = tasks
        self.endpoints = endpoints or {}
        self.failed = failed
        self.local_gpus = local_gpus
        self.gives_gpus_back = gives_gpus_back  # trials need them too: a local judge ends when it has nothing to do
        self.answers = {task.id: task for task in answers}
        self.software = software()
        self.pending: dict[Any, str] = {}
        self.submitted: set[str] = set()
        self.judged: dict[str, Judged] = {}
        self._actors: dict[Group, list[Any]] = {}
        self._budgets: dict[str, Any] = {}  # by endpoint
        self._seat: dict[tuple[Group, str], Any] = {}  # metrics that ask the same share replies

    def start(self) -> None:
        """Start the processes that the tasks need, and wait until they are up; without it each starts when needed."""
        for task in self._all():
            self._actor(task)
        self.counts()

    def counts(self) -> list[dict[str, float]]:
        """``_JudgeActor.counts`` of every process."""
        found: list[dict[str, float]] = ray.get(
            [actor.counts.remote() for actors in self._actors.values() for actor in actors]
        )
        return found

    def stop(self) -> None:
        """End the pool's processes; what they had under way is asked again some time."""
        for actors in self._actors.values():
            for actor in actors:
                ray.kill(actor)
        self._actors.clear()
        self._seat.clear()

    def answer(self, sample_id: str) -> None:
        """Ask for the answers of a sampling task whose run is served, if it is one; they are judged when they are
        there."""
        task = self.answers.get(sample_id)
        if task is not None and task.id not in self.submitted:
            self.submitted.add(task.id)
            self.pending[self._actor(task).answer.remote(task)] = task.id

    def submit(self, sample_id: str) -> None:
        """Judge the answers of a finished sampling task by every metric; asking again does nothing."""
        for task in self.tasks.values():
            if task.sample_id == sample_id and task.id not in self.submitted:
                self.submitted.add(task.id)
                self.pending[self._actor(task).judge.remote(task)] = task.id

    def poll(self) -> None:
        """Take note of what has ended, without waiting."""
        if self.pending:
            self._collect(ray.wait(list(self.pending), num_returns=len(self.pending), timeout=0)[0])

    def wait_for_one(self) -> None:
        """Wait until one more judging task has ended."""
        if self.pending:
            self._collect(ray.wait(list(self.pending), num_returns=1)[0])

    def wait(self) -> None:
        """Wait for everything submitted; a task that raised is reported with its error on one line."""
        while self.pending:
            self.wait_for_one()

    def _collect(self, ready: Sequence[Any]) -> None:
        for reference in ready:
            task_id = self.pending.pop(reference)
            try:
                judged = ray.get(reference)
            except ray.exceptions.RayError as error:
                self.failed(task_id, _reason(error))
                continue
            if task_id in self.answers:
                if judged.num_open:
                    why = f"{judged.num_open} of {judged.num_answers} answers did not come: {judged.why}"
                    self.failed(task_id, why)
                else:
                    self.submit(task_id)
                continue
            self.judged[task_id] = judged
            if judged.num_open:
                self.failed(task_id, f"{judged.num_open} of {judged.num_answers} answers have no score: {judged.why}")
        if self.gives_gpus_back:
            self._end_idle_local_judges()

    def _end_idle_local_judges(self) -> None:
        """End the processes of local judges that nothing is asked of just now; they start again when needed."""
        busy = {_group(self.tasks[task_id]) for task_id in self.pending.values() if task_id in self.tasks}
        for group in [group for group in self._actors if group[0] == "local" and group not in busy]:
            for actor in self._actors.pop(group):
                ray.kill(actor)
            self._seat = {seat: actor for seat, actor in self._seat.items() if seat[0] != group}

    def _all(self) -> list[JudgeTask | AnswerTask]:
        return [*self.tasks.values(), *self.answers.values()]

    def _actor(self, task: JudgeTask | AnswerTask) -> Any:
        group = _group(task)
        seat = (group, task.id if isinstance(task, AnswerTask) else task.sample_id)
        if seat not in self._seat:
            actors = self._actors.setdefault(group, self._start(group, task))
            self._seat[seat] = actors[sum(1 for known, _ in self._seat if known == group) % len(actors)]
        return self._seat[seat]

    def _start(self, group: Group, task: JudgeTask | AnswerTask) -> list[Any]:
        if group in self._actors:
            return self._actors[group]
        # before Ray knows that a node is gone, calls use up any number of retries at once: restarts end it
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 2, "max_task_retries": -1}
        if group[0] != "local":  # a model may not fit there
            options["scheduling_strategy"] = _on_this_node()
        asking = task.metric.asking if isinstance(task, JudgeTask) else None
        maker: Callable[[], Asker] | None
        if isinstance(task, AnswerTask):
            maker, number = self._endpoint_asker(task.endpoint, answers=True)
        elif isinstance(asking, OpenaiMetric):
            maker, number = self._endpoint_asker(asking.endpoint, answers=False)
        elif isinstance(asking, LocalMetric):
            maker, number = _LocalAsker(asking.base, self.local_gpus > 0), 1
            options["num_gpus"] = self.local_gpus
        else:
            maker, number = None, 1
        actor = ray.remote(**options)(_JudgeActor)
        return [actor.remote(self.store, maker, self.software) for _ in range(number)]

    def _endpoint_asker(self, name: str, *, answers: bool) -> tuple[_EndpointAsker, int]:
        """What asks an endpoint, and in how many processes. Judgements and answers share its budget and its places."""
        endpoint = self.endpoints[name]
        key = os.environ.get(endpoint.api_key_env, "") if endpoint.api_key_env else ""
        if name not in self._budgets:
            self._budgets[name] = None
            if Budget.limits(endpoint):
                shared = ray.remote(num_cpus=0, scheduling_strategy=_on_this_node())(Budget)
                self._budgets[name] = shared.remote(endpoint)
        groups = {_group(task) for task in self._all()}
        processes = endpoint.actors * len({("openai", name), ("answers", name)} & groups)
        share = max(1, endpoint.max_concurrency // max(1, processes))
        return _EndpointAsker(endpoint, share, self._budgets[name], key, answers), endpoint.actors


class _EndpointAsker:
    """Makes the asker of an endpoint in the actor's process."""

    def __init__(self, endpoint: EndpointConfig, share: int, budget: Any, key: str, answers: bool) -> None:
        self.endpoint, self.share, self.budget, self.answers = endpoint, share, budget, answers
        self._key = key

    def __call__(self) -> Asker:
        budget = None if self.budget is None else RemoteBudget(self.budget)
        return OpenAIAsker(
            self.endpoint, max_concurrency=self.share, budget=budget, key=self._key or None, answers=self.answers
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.endpoint.base_url!r})"


class _LocalAsker:
    """Loads the model of a local judge in the actor's process."""

    def __init__(self, base: ResolvedBase, cuda: bool) -> None:
        self.base, self.cuda = base, cuda

    def __call__(self) -> Asker:
        import torch

        from analysis.judges.local_asker import LocalAsker

        torch.set_num_threads(1)  # the cores belong to the trials
        return _InBatches(LocalAsker.load(self.base, torch.device("cuda" if self.cuda else "cpu")))


class _InBatches:
    """Gives a local model what waits together: it shares the beginning of the prompts. The event loop stays free."""

    def __init__(self, asker: LocalAsker) -> None:
        self.asker = asker
        self._waiting: list[tuple[Request, asyncio.Future[Reply]]] = []
        self._working: asyncio.Task[None] | None = None

    async def ask(self, request: Request) -> Reply:
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((request, done))
        if self._working is None:
            self._working = asyncio.create_task(self._work())
        return await done

    async def _work(self) -> None:
        await asyncio.sleep(0)
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:LOCAL_BATCH], self._waiting[LOCAL_BATCH:]
                try:
                    replies = await asyncio.to_thread(self.asker.ask_many, [request for request, _ in batch])
                except Exception as error:  # noqa: BLE001 - whoever waits is told; the next batch may be sound
                    for _, done in batch:
                        done.set_exception(error)
                    continue
                for (_, done), reply in zip(batch, replies, strict=True):
                    done.set_result(reply)
        finally:
            self._working = None


def _on_this_node() -> NodeAffinitySchedulingStrategy:
    """Where the driver is; elsewhere if Ray cannot have it there."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)


def _group(task: JudgeTask | AnswerTask) -> Group:
    if isinstance(task, AnswerTask):
        return "answers", task.endpoint
    asking = task.metric.asking
    if isinstance(asking, OpenaiMetric):
        return "openai", asking.endpoint
    if isinstance(asking, LocalMetric):
        return "local", json.dumps(asking.base.identity(), sort_keys=True)
    return "none", ""


def _reason(error: Exception) -> str:
    """What the judge itself raised, without the remote traceback; else what Ray says."""
    cause = getattr(error, "cause", None)
    text = "".join(traceback.format_exception_only(cause)) if isinstance(cause, BaseException) else str(error)
    return " ".join(text.split()) or type(error).__name__
