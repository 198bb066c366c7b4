"""Kills at random instants, on a sweep of a tiny model: what is lost, done twice, different, or left running.

    python benchmarks/chaos.py [--kills 20] [--seed 0]

A sweep of four trainings (a checkpoint after every step), sampled, judged by rule and by a model behind a local server,
and measured, is run once undisturbed. Then again, in another store, while the driver, the process of a trial (while it
trains or samples, and while it measures) or a judge is killed by SIGKILL at a random instant; a driver that is gone is
started again at once, and a sweep that is done is compared and begun anew in another store, until there have been
``--kills``. Prints a line per kill and, as its last line, one JSON object:

kills                   by what they hit
lost_rows, doubled_rows rows of the undisturbed tables that are missing, and rows that are there twice, over all sweeps
differing_tables        tables that are not those of the undisturbed sweep (times apart), over all sweeps
repeated_judgements     requests that the judge's server answered again, although it had answered them before;
                        in_flight_at_kills is how many it was answering, or had answered a moment ago, as something was
                        killed: their replies may not have been on disk
orphan_processes        processes of a driver that was killed which are still there 30 s later
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
from drivers import is_same, start

from analysis.results import Results, load
from engine.watchdog import VARIABLE
from tests.engine.tiny_sweep import write_tiny_sweep
from tests.judge_server import Behaviour, JudgeServer

LATENCY_S = 0.05
JUST_NOW_S = 0.5  # a reply that was sent so long ago may not be on disk yet
GONE_WITHIN_S = 30.0
LONGEST_S = 600.0  # of one invocation
TRIAL, JUDGE = "ImplicitFunc", "_JudgeActor"  # in the titles of Ray's workers: Tune's trials, and the judges
KEYS = {  # what tells the rows of a table apart
    "training": ["run", "step"],
    "generations": ["run", "question_id", "sample_index"],
    "scores": ["run", "metric", "question_id", "sample_index"],
    "losses": ["run", "data", "row", "condition"],
    "gradients": ["run", "measurement", "row", "condition", "layer", "vector"],
}
RUNS = "  - defense: none\n  - defense: {kind: pps, vector: topic, layer: 2, coefficient: 1.5}\n"
EXTRA = """axes: {{seed: {{grid: [0, 1]}}}}
trackers: none
execution: {{trials: 2, checkpoint_every_steps: 1, max_retries: 2}}
endpoints: {{test: {{base_url: '{url}', api_key_env: null, max_concurrency: 4}}}}
measure:
  after: {{kind: gradients, on: runs, data: data/train.jsonl, vectors: [topic], rows_per_shard: 2}}
"""
RULE = "metrics: {trait: {judge: rule, trait: topic}}"
JUDGES = """metrics:
    trait: {judge: rule, trait: topic}
    warm: {judge: openai, model: judge-1, prompt: "How warm? {question} {answer}", endpoint: test}"""


class Sweep:
    """The sweep file, and a driver that runs it."""

    def __init__(self, folder: Path, url: str) -> None:
        self.file = write_tiny_sweep(folder, runs=RUNS, extra=EXTRA.format(url=url))
        text = self.file.read_text()
        assert text.count(RULE) == 1
        self.file.write_text(text.replace(RULE, JUDGES).replace("max_steps: 2", "max_steps: 20"))

    def start(self, store: Path) -> subprocess.Popen[str]:
        return start(self.file, store)


def processes_of(driver: int) -> list[psutil.Process]:
    """The processes of the driver's Ray: they carry its mark."""
    wanted = f"{driver}-"
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(VARIABLE, "").startswith(wanted):
                found.append(process)
        except psutil.Error:
            continue
    return found


def named(processes: Sequence[psutil.Process], word: str) -> list[psutil.Process]:
    """Ray's workers whose title says that they do this."""
    found = []
    for process in processes:
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if title.startswith("ray::") and word in title:
            found.append(process)
    return found


def is_measuring(store: Path) -> bool:
    """Whether some of the gradients are measured, and not all."""
    return 0 < len(list(store.glob("tables/gradients/*.parquet"))) < 16


class Chaos:
    """Kills, and what they came to."""

    def __init__(self, sweep: Sweep, server: JudgeServer, wanted: Results, kills: int, seed: int) -> None:
        self.sweep, self.server, self.wanted, self.num = sweep, server, wanted, kills
        self.random = random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.figures: Counter[str] = Counter(dict.fromkeys(("lost_rows", "doubled_rows", "differing_tables"), 0))
        self.in_flight = 0

    def run(self, folder: Path) -> None:
        """Sweeps in stores of their own until there have been enough kills, each to its end."""
        number = 0
        while self.kills.total() < self.num:
            number += 1
            self._sweep(folder / f"store {number}")

    def _sweep(self, store: Path) -> None:
        while True:
            driver = self.sweep.start(store)
            output: list[str] = []
            reader = threading.Thread(target=lambda d=driver, o=output: o.append(d.stdout.read()), daemon=True)
            reader.start()
            try:
                self._disturb(driver, store)
                code = driver.wait(timeout=LONGEST_S)
            finally:
                driver.kill()  # where that failed; a driver that has ended takes no notice
            reader.join()
            if code == 0:
                break
            if code not in (3, -signal.SIGKILL):
                raise RuntimeError(f"a driver ended with {code}:\n{output[0]}")
        self._compare(load(store / "sweeps" / "tiny"))

    def _disturb(self, driver: subprocess.Popen[str], store: Path) -> None:
        """Kill something after a random time, again and again while there are kills left and the driver lives."""
        while self.kills.total() < self.num:
            wait_until = time.monotonic() + self.random.uniform(1.0, 25.0)
            target = self.random.choice(["driver", "trial", "trial", "judge", "measurement", "measurement"])
            while time.monotonic() < wait_until or not self._can_hit(target, driver.pid, store):
                if driver.poll() is not None:
                    return
                if time.monotonic() > wait_until + 20:
                    break
                time.sleep(0.05)
            if self._kill(target, driver, store) == "driver":
                return

    def _can_hit(self, target: str, driver: int, store: Path) -> bool:
        if target == "driver":
            return True
        if target == "judge":
            return bool(named(processes_of(driver), JUDGE))
        return is_measuring(store) == (target == "measurement") and bool(named(processes_of(driver), TRIAL))

    def _kill(self, target: str, driver: subprocess.Popen[str], store: Path) -> str | None:
        below = processes_of(driver.pid)
        now = time.monotonic()
        if target == "driver":
            driver.kill()
        else:
            victims = named(below, JUDGE if target == "judge" else TRIAL)
            if not victims:
                return None
            if target != "judge":
                target = "measurement" if is_measuring(store) else "trial"
            victim = self.random.choice(victims)
            try:
                os.kill(victim.pid, signal.SIGKILL)
            except ProcessLookupError:
                return None
        if target in ("driver", "judge"):
            arrivals = self.server.seen.arrivals
            self.in_flight += sum(begun > now - JUST_NOW_S - LATENCY_S for begun in list(arrivals))
        self.kills[target] += 1
        print(f"kill {self.kills.total()}: {target}", flush=True)
        if target == "driver":
            _, alive = psutil.wait_procs(below, timeout=GONE_WITHIN_S)
            self.figures["orphan_processes"] += len(alive)
        return target

    def _compare(self, found: Results) -> None:
        for name, key in KEYS.items():
            one, other = found.table(name), self.wanted.table(name)
            there = one[key].astype(str).agg(" ".join, axis=1)
            wanted = other[key].astype(str).agg(" ".join, axis=1)
            self.figures["lost_rows"] += len(set(wanted) - set(there))
            self.figures["doubled_rows"] += int(there.duplicated().sum())
            self.figures["differing_tables"] += not is_same(name, one, other)
        self.figures["differing_tables"] += not is_same("summary", found.summary(), self.wanted.summary())


def repeated(answered: Counter[str], num_sweeps: Counter[str]) -> int:
    """Answers beyond one per request and sweep."""
    return sum(count - num_sweeps[body] for body, count in answered.items() if count > num_sweeps[body])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, JudgeServer(Behaviour(latency_s=LATENCY_S)) as server:
        folder = Path(scratch)
        sweep = Sweep(folder, server.url)
        driver = sweep.start(folder / "undisturbed")
        printed, _ = driver.communicate(timeout=LONGEST_S)
        if driver.returncode != 0:
            raise RuntimeError(printed)
        once = Counter(server.seen.answered)
        print(f"undisturbed: {time.monotonic() - started:.0f} s, {once.total()} judgements asked for", flush=True)
        wanted = load(folder / "undisturbed" / "sweeps" / "tiny")
        chaos = Chaos(sweep, server, wanted, options.kills, options.seed)
        chaos.run(folder)
        num_stores = len(list(folder.glob("store *")))
        allowed = Counter({body: count * (1 + num_stores) for body, count in once.items()})
        figures: dict[str, Any] = {
            "kills": chaos.kills.total(),
            "kills_of": dict(sorted(chaos.kills.items())),
            "sweeps": num_stores,
            **{name: chaos.figures[name] for name in ("lost_rows", "doubled_rows", "differing_tables")},
            "repeated_judgements": repeated(server.seen.answered, allowed),
            "in_flight_at_kills": chaos.in_flight,
            "orphan_processes": chaos.figures["orphan_processes"],
            "wall_s": round(time.monotonic() - started),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
