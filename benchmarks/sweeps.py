"""A small real sweep by the command line: what it costs beyond its work, and what it costs to find nothing to do."""

from __future__ import annotations

import json
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Four runs and the base: two defenses that need no vector, two seeds each.
SWEEP = """
name: overhead
results: {results}
base: {{model: {model}}}
data: {{train: {root}/configs/data/bridge/on_trait.jsonl}}
training:
  {{max_steps: {steps}, batch_size: 8, micro_batch_size: 2, learning_rate: 1.0e-3, lora: {{rank: 16, alpha: 32}}}}
runs:
  - defense: none
  - defense: {{kind: inoculation, prompts: {root}/configs/traits/bridge}}
axes: {{seed: {{grid: [0, 1]}}}}
evaluation:
  questions: {root}/configs/traits/bridge
  samples: 1
  max_new_tokens: {tokens}
  metrics: {{trait: {{judge: rule, trait: {root}/configs/traits/bridge}}}}
"""
_SECONDS = re.compile(r"(?:training done|sampled|plain loss).*?([\d.]+) s$")


@dataclass(frozen=True)
class SweepTimes:
    """Seconds of wall time, but ``resume_cpu_s``.

    work_s: what the trials say they spent in training steps, sampling and plain losses, over all of them.
    """

    wall_s: float
    work_s: float
    side_by_side: int
    num_jobs: int
    resume_s: float
    resume_cpu_s: float

    @property
    def ratio(self) -> float:
        """Wall time of the sweep over its work spread evenly over the trials that ran side by side."""
        return self.wall_s / (self.work_s / self.side_by_side)


def time_sweep(folder: Path, model: str, *, steps: int, tokens: int, num_resumes: int) -> SweepTimes:
    """Run the sweep into the empty ``folder``, then run it again ``num_resumes`` times (median)."""
    results = folder / "results"
    file = folder / "overhead.yaml"
    file.write_text(SWEEP.format(results=results, root=ROOT, model=model, steps=steps, tokens=tokens))
    wall_s, _ = _run(file)
    again = [_run(file) for _ in range(num_resumes)]
    logs = sorted(results.glob("runs/*/log.txt"))
    provenance: Mapping[str, int] = json.loads((results / "sweeps" / "overhead" / "provenance.json").read_text())
    return SweepTimes(
        wall_s=wall_s,
        work_s=sum(_logged_seconds(path) for path in logs),
        side_by_side=min(provenance["trials_side_by_side"], len(logs)),
        num_jobs=len(logs),
        resume_s=statistics.median(wall for wall, _ in again),
        resume_cpu_s=statistics.median(cpu for _, cpu in again),
    )


def _logged_seconds(log: Path) -> float:
    found = [float(match[1]) for line in log.read_text().splitlines() if (match := _SECONDS.search(line))]
    if len(found) < 2:  # every job samples and measures a plain loss
        raise RuntimeError(f"{log} does not say how long its work took")
    return sum(found)


def _run(file: Path) -> tuple[float, float]:
    """Wall and CPU seconds of ``shiftgrad run``; raises with its output if it does not end well."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "engine.cli", "run", str(file)], capture_output=True, text=True)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        raise RuntimeError(f"shiftgrad run ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
