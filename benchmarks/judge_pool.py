"""The judge pool against a bare loop of AsyncOpenAI calls and against the latency bound, and under trouble.

A server in a process of its own answers after 200 ms. Interleaved, 2,000 judgements at 64 at a time:

- bare: ``openai.AsyncOpenAI`` and a semaphore, the reply read as the library gives it, nothing kept;
- pool: the pool's Ray actors, with every reply on disk before it counts, and the scores published.

``pool_over_bare``: judgements per second of the pool over those of the bare loop, median over pairs with its 95 %
interval, one actor. ``pool_over_bare_per_cpu_s``: the same per CPU second of the process that asks, which other work on
the machine does not disturb.
``pool_over_bound``: the pool's over 64 / 0.2 s, the most that 64 at a time can be. ``two_actors_over_one``: throughput.
Starting Ray's processes is not in the times; finding, reading, committing and publishing are.

Then once with trouble: 20 % of attempts 429, 10 % 500, 5 % hang, 5 % of requests garbage. ``chaos_items`` judgements
that ended with a status, ``chaos_lost`` items without one, ``chaos_doubled`` requests that are in the segments twice,
``chaos_wall_over_clean`` its time over that of the clean pool of the same run.

    python benchmarks/judge_pool.py [--pairs 8] [--items 2000]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ray
from interleaved import Ratio
from openai import AsyncOpenAI

from analysis.judges.openai import OpenaiMetric
from engine.endpoints import EndpointConfig
from engine.judge_pool import JudgePool
from engine.store import Store
from engine.tasks import JudgeTask
from trainables.rows import GenerationRow

AT_ONCE = 64
LATENCY_S = 0.2
NUM_RUNS = 20
TIMEOUT_S = 3.0
GOAL = 0.95


class Server:
    """tests/judge_server.py in a process of its own."""

    def __init__(self, **behaviour: Any) -> None:
        root = Path(__file__).resolve().parent.parent
        command = [sys.executable, "-m", "tests.judge_server", "--behaviour", json.dumps(behaviour)]
        self.process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def stop(self) -> None:
        self.process.communicate("")


def answers(store: Store, name: str, num_items: int) -> list[str]:
    """Answers of NUM_RUNS runs; texts differ from round to round, so nothing is known from an earlier one."""
    samples = []
    for run in range(NUM_RUNS):
        sample_id = f"{run:04d}{name}"[:12].ljust(12, "0")
        rows = [
            GenerationRow(
                sample_id=sample_id,
                question_id=f"q{i}",
                sample_index=0,
                question=f"Question {i}?",
                system_prompt=None,
                answer=f"Answer {i} of run {run} in round {name}.",
                num_tokens=8,
                finish_reason="stop",
            )
            for i in range(num_items // NUM_RUNS)
        ]
        store.publish_table("generations", sample_id, rows)
        samples.append(sample_id)
    return samples


METRIC = OpenaiMetric(prompt="How flattering is this?\n{question}\n{answer}", model="judge")


def run_bare(url: str, num_items: int, name: str) -> tuple[float, float]:
    """Seconds and CPU seconds of the bare loop."""

    async def go() -> tuple[float, float]:
        client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
        places = asyncio.Semaphore(AT_ONCE)

        async def one(i: int) -> None:
            async with places:
                reply = await client.chat.completions.create(
                    model="judge",
                    messages=[{"role": "user", "content": f"How flattering is this?\nbare {name} {i}"}],
                    max_tokens=1,
                    temperature=0,
                    logprobs=True,
                    top_logprobs=20,
                    seed=0,
                )
                assert reply.choices[0].logprobs is not None

        begun, begun_cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*[one(i) for i in range(num_items)])
        seconds, cpu_s = time.perf_counter() - begun, time.process_time() - begun_cpu
        await client.close()
        return seconds, cpu_s

    return asyncio.run(go())


def run_pool(store: Store, url: str, num_items: int, name: str, actors: int = 1) -> tuple[float, float, Counter[str]]:
    """Seconds of the pool from the first submission to the last published scores, CPU seconds of its processes in that
    time, and the statuses of all items."""
    samples = answers(store, name, num_items)
    tasks = {
        sample_id[::-1]: JudgeTask(id=sample_id[::-1], sample_id=sample_id, run_id="r" * 12, metric=METRIC)
        for sample_id in samples
    }
    endpoint = EndpointConfig(
        base_url=url, api_key_env=None, max_concurrency=AT_ONCE, actors=actors, timeout_s=TIMEOUT_S, max_retries=12
    )
    pool = JudgePool(store, tasks, print, {"openai": endpoint})
    pool.start()
    begun_cpu = sum(counts["cpu_s"] for counts in pool.counts())
    begun = time.perf_counter()
    for sample_id in samples:
        pool.submit(sample_id)
    pool.wait()
    seconds = time.perf_counter() - begun
    cpu_s = sum(counts["cpu_s"] for counts in pool.counts()) - begun_cpu
    pool.stop()
    statuses = Counter(
        status for task in tasks for status in store.read_table("scores", task).column("status").to_pylist()
    )
    return seconds, cpu_s, statuses


def doubled(store: Store) -> int:
    """Requests that stand in the segments more than once."""
    seen: Counter[str] = Counter()
    for name in store.names("judgements"):
        if name.endswith(".jsonl"):
            lines = store.path(f"judgements/{name}").read_text().splitlines()
            seen.update(json.loads(line)["request"] for line in lines)
    return sum(count > 1 for count in seen.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--items", type=int, default=2000)
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(address="local", include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    server = Server(latency_s=LATENCY_S)
    bound_s = arguments.items * LATENCY_S / AT_ONCE
    bare, pool, two = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(Path(folder) / "store", create=True)
        for pair in range(arguments.pairs):
            bare.append(run_bare(server.url, arguments.items, str(pair)))
            pool.append(run_pool(store, server.url, arguments.items, f"p{pair}")[:2])
            two.append(run_pool(store, server.url, arguments.items, f"t{pair}", actors=2)[0])
            parts = [
                f"{name} {seconds:6.2f} s ({cpu_s:.2f} CPU)"
                for name, (seconds, cpu_s) in (("bare", bare[-1]), ("pool", pool[-1]))
            ]
            print(f"pair {pair + 1}: {'   '.join(parts)}   two actors {two[-1]:6.2f} s")
        server.stop()
        chaos_server = Server(
            latency_s=LATENCY_S, troubles={"429": 0.2, "500": 0.1, "hang": 0.05, "garbage_logprobs": 0.05}
        )
        chaos_store = Store.open(Path(folder) / "chaos", create=True)
        chaos_s, _, statuses = run_pool(chaos_store, chaos_server.url, arguments.items, "c")
        chaos_server.stop()
        num_doubled = doubled(chaos_store)
    ray.shutdown()
    clean_s = statistics.median(seconds for seconds, _ in pool)
    wall = Ratio.of("pool_over_bare", [b for b, _ in bare], [p for p, _ in pool])
    cpu = Ratio.of("pool_over_bare_per_cpu_s", [b for _, b in bare], [p for _, p in pool])
    both = Ratio.of("two_actors_over_one", [p for p, _ in pool], two)
    for ratio in (wall, cpu, both):
        print(ratio.line())
    is_met = "met" if wall.low >= GOAL else "missed" if wall.high < GOAL else f"not resolved at n = {wall.num_pairs}"
    print(f"goal: pool_over_bare at least {GOAL}: {is_met}; the bound is {bound_s:.2f} s")
    print(f"with trouble: {chaos_s:.1f} s, {dict(statuses)}")
    figures = {name: round(value, 3) for ratio in (wall, cpu, both) for name, value in bounds_of(ratio).items()}
    print(
        json.dumps(
            figures
            | {
                "pool_over_bound": round(bound_s / clean_s, 3),
                "chaos_items": sum(statuses.values()),
                "chaos_lost": arguments.items - sum(statuses.values()),
                "chaos_doubled": num_doubled,
                "chaos_wall_over_clean": round(chaos_s / clean_s, 3),
            }
        )
    )


def bounds_of(ratio: Ratio) -> dict[str, float]:
    """The figures of a ratio by name; an interval that there is none of is left out."""
    bounds = {ratio.name: ratio.median, f"{ratio.name}_low": ratio.low, f"{ratio.name}_high": ratio.high}
    return {name: value for name, value in bounds.items() if math.isfinite(value)}


if __name__ == "__main__":
    main()
