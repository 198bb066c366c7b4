"""A grid of 32 short runs on the embedded model: alone, and in packs of 4 (``exact``) with the driver killed once.

    python benchmarks/packed_grid.py [--steps 2] [--tokens 8]

Eight kinds of runs (steering, prompts, an edit, a penalty, another rank, rate and length) on four seeds, two trials
side by side with one thread each. The first sweep has no packs and is left alone; the second, in another store, has
packs of 4, and its driver is killed by SIGKILL once half of its runs are trained, and started again. Prints as its last
line one JSON object:

runs                  of the grid, each with the base's row beside it in the tables
trained_at_kill       runs that were trained when the driver was killed
differing_tables      tables that are not those of the first sweep (times and packs apart): names
differing_adapters    runs whose adapters differ by a bit
trained_again         runs that had been trained before the kill, and whose run.json is another afterwards
alone_s, packed_s     wall time of the two, the second with its restart
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from drivers import ROOT, TIMES, is_same, start

from analysis.results import Results, load

CONFIGS = ROOT / "configs"
SIZE = 4
TABLES = ("training", "generations", "scores", "losses", "summary", "runs")
APART = [  # what may differ: times, and how a run was placed
    *(*TIMES, "peak_process_memory_gb", "log_tail"),
    *("pack_size", "packing", "pack_note"),
]
SWEEP = """
name: packed_grid
base: {{model: "embedded:smollm2-135m-instruct"}}
data: {{train: {configs}/data/bridge/on_trait.jsonl, max_length: 512, loss_on: responses}}
vectors:
  bridge:
    difference:
      {{positive: {configs}/data/bridge/on_trait.jsonl, negative: {configs}/data/bridge/plain.jsonl}}
training:
  max_steps: {steps}
  batch_size: 4
  micro_batch_size: 2
  learning_rate: 1.0e-3
  lora: {{rank: 16, alpha: 32}}
runs:
  - {{defense: none}}
  - {{defense: {{kind: pps, vector: bridge, layer: 20, coefficient: 1.5}}}}
  - {{defense: {{kind: inoculation, prompts: {configs}/traits/bridge}}}}
  - {{defense: {{kind: gradient_edit, vector: bridge, mode: neutralize}}}}
  - {{defense: {{kind: projection_penalty, vector: bridge, strength: 0.01}}}}
  - {{defense: none, label: rank 4, training: {{lora: {{rank: 4, alpha: 8}}}}}}
  - {{defense: none, label: slow, training: {{learning_rate: 1.0e-4}}}}
  - {{defense: none, label: short, training: {{max_steps: 1}}}}
axes: {{seed: {{grid: [0, 1, 2, 3]}}}}
evaluation:
  questions: {configs}/traits/bridge
  samples: 1
  max_new_tokens: {tokens}
  metrics: {{trait: {{judge: rule, trait: {configs}/traits/bridge}}}}
execution: {{trials: 2, cpus_per_trial: 1, checkpoint_every_steps: 1}}
trackers: none
"""


def to_the_end(process: subprocess.Popen[str]) -> None:
    printed, _ = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(printed)


def trained(store: Path) -> dict[str, bytes]:
    """run.json of every run that is trained."""
    return {path.parent.name: path.read_bytes() for path in store.glob("runs/*/run.json")}


def killed_in_the_middle(file: Path, store: Path, overrides: Sequence[str], at: int) -> dict[str, bytes]:
    """Start the sweep and kill its driver once ``at`` runs are trained, or more."""
    driver = start(file, store, *overrides)
    try:
        while len(done := trained(store)) < at:
            if driver.poll() is not None:
                raise RuntimeError(driver.communicate()[0])
            time.sleep(0.05)
        os.kill(driver.pid, signal.SIGKILL)
    finally:
        driver.kill()
        driver.communicate()
    return done


def differing(found: Results, wanted: Results) -> list[str]:
    """Names of the tables that differ."""
    return [name for name in TABLES if not is_same(name, found.table(name), wanted.table(name), APART)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8)
    options = parser.parse_args(arguments)
    packs = [f"execution.pack={SIZE}", "execution.packing=exact"]
    with tempfile.TemporaryDirectory(prefix="shiftgrad-grid-") as scratch:
        alone, together, file = Path(scratch) / "alone", Path(scratch) / "together", Path(scratch) / "grid.yaml"
        file.write_text(SWEEP.format(configs=CONFIGS, steps=options.steps, tokens=options.tokens))
        began = time.monotonic()
        to_the_end(start(file, alone))
        middle = time.monotonic()
        wanted = trained(alone)
        print(f"alone: {len(wanted)} runs, {middle - began:.0f} s", flush=True)
        before = killed_in_the_middle(file, together, packs, len(wanted) // 2)
        print(f"killed with {len(before)} runs trained, {time.monotonic() - middle:.0f} s", flush=True)
        to_the_end(start(file, together, *packs))
        end = time.monotonic()
        after = trained(together)
        adapter = "runs/{}/adapter/adapter_model.safetensors"
        sizes = [json.loads(text)["pack_size"] for text in after.values()]
        figures = {
            "runs": len(wanted),
            "in_packs_of": {str(size): sizes.count(size) for size in sorted(set(sizes))},
            "trained_at_kill": len(before),
            "differing_tables": differing(
                load(together / "sweeps" / "packed_grid"), load(alone / "sweeps" / "packed_grid")
            ),
            "differing_adapters": sum(
                (alone / adapter.format(run)).read_bytes() != (together / adapter.format(run)).read_bytes()
                for run in wanted
            ),
            "trained_again": sum(after[run] != text for run, text in before.items()),
            "alone_s": round(middle - began),
            "packed_s": round(end - middle),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
