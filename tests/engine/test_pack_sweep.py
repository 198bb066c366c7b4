"""A whole sweep in packs, by Ray, whose driver is killed in the middle, against the same sweep without packs."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pandas as pd
import pytest

from analysis.results import Results
from tests.engine.test_kills import TIMINGS, results_of, run_to_end, start
from tests.engine.tiny_sweep import write_tiny_sweep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Runs of three lengths, two ranks and two rates, and one that cannot go on after its first step.
RUNS = """\
  - defense: none
    training: {max_steps: {grid: [3, 40]}}
  - defense: {kind: pps, vector: topic, layer: 2, coefficient: 1.5}
    training: {max_steps: 40, lora: {rank: {grid: [2, 3]}}}
  - defense: {kind: inoculation, prompts: topic}
    training: {max_steps: 6, learning_rate: {grid: [1.0e-2, 3.0e-3]}}
  - defense: {kind: gradient_edit, vector: topic, mode: attenuate, layers: [1]}
    training: {max_steps: 40}
  - defense: none
    label: bursting
    training: {max_steps: 5, learning_rate: 1.0e+30, schedule: constant, max_gradient_norm: null}
"""
EXECUTION = "execution: {trials: 2, max_retries: 0, checkpoint_every_steps: 1}"
PACK_COLUMNS = ["pack_size", "packing", "pack_note"]
IN_PACKS = ["execution.pack=4", "execution.packing=exact"]


def run_json(store: Path) -> dict[str, bytes]:
    """Bytes of run.json of every run that is done."""
    return {path.parent.name: path.read_bytes() for path in store.glob("runs/*/run.json")}


def kill_in_the_middle(folder: Path, store: Path) -> dict[str, bytes]:
    """Start the sweep in packs and kill its driver once a member of a pack is done and another is not."""
    driver = start(folder, store, overrides=IN_PACKS)
    try:
        for _ in range(2400):
            done = run_json(store)
            if done:
                break
            assert driver.poll() is None, driver.communicate()[0]
            time.sleep(0.05)
        driver.send_signal(signal.SIGKILL)
    finally:
        driver.kill()
        driver.communicate(timeout=60)
    return done


def logs(results: Results) -> dict[str, str]:
    return {
        entry.label: (results.root / "runs" / entry.run_id / "log.txt").read_text()
        for entry in results.manifest.runs
        if entry.kind == "run"
    }


def test_packs_and_a_kill_of_the_driver_change_no_table(tmp_path: Path) -> None:
    write_tiny_sweep(tmp_path, runs=RUNS, extra=EXECUTION)
    alone, together = tmp_path / "alone", tmp_path / "together"
    code, printed = run_to_end(tmp_path, alone)
    assert code == 3, printed
    before = kill_in_the_middle(tmp_path, together)
    assert 0 < len(before) < 7
    code, printed = run_to_end(tmp_path, together, overrides=IN_PACKS)
    assert code == 3, printed
    found, wanted = results_of(together), results_of(alone)
    for name in ("training", "generations", "scores", "losses", "summary"):
        one, other = (results.table(name).drop(columns=TIMINGS, errors="ignore") for results in (found, wanted))
        pd.testing.assert_frame_equal(one, other)
    ignored = [*TIMINGS, *PACK_COLUMNS, "log_tail"]
    runs, expected = (results.runs().drop(columns=ignored, errors="ignore") for results in (found, wanted))
    pd.testing.assert_frame_equal(runs, expected)

    rows = found.runs().set_index("run")
    assert rows.loc["bursting", "status"] == "failed"
    assert "step 2: the " in str(rows.loc["bursting", "reason"])
    done = rows[rows["status"] == "done"].query("kind == 'run'")
    assert len(done) == 7
    assert set(done["packing"].dropna()) == {"exact"}
    assert done["pack_size"].max() == 4
    after = run_json(together)
    for run_id in after:
        adapters = [store / "runs" / run_id / "adapter" / "adapter_model.safetensors" for store in (alone, together)]
        assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert {name: after[name] for name in before} == before, "what was done is not trained again"
    assert any("resumed after step" in log for log in logs(found).values()), "from the checkpoints of the killed pack"
    assert all(json.loads(text)["placement"]["pack"] for text in after.values())
