"""The sweep files of the training methods are sound, and mean the runs that they say."""

from __future__ import annotations

from pathlib import Path

import pytest

import engine.row_proofs
from engine.prepare import prepare
from tests.engine.tiny_prepare import MACHINE
from tests.tiny import tiny_tokenizer

SWEEPS = Path(__file__).resolve().parents[2] / "configs" / "sweeps"
FROZEN = ("epochs", "batch_size", "micro_batch_size", "learning_rate", "schedule")


@pytest.mark.parametrize(
    ("name", "num_runs", "some"),
    [
        ("gradient_edits", 3 * 7 + 2, "pps bridge L20 x1.5 + neutralize random"),
        ("inoculation_bank", 1 + 4 + 4 + 3 + 2, "inoculation random_sentences"),
        ("lora_rank", 4 * 4, None),
        ("penalties", 1 + 6 + 3 + 1 + 2 + 1, "block bridge"),
        ("pre_post", 2 + 4 + 4 + 8, "pps bridge L20 x1.5 after heavy train=medium"),
        ("capping", (5 + 1 + 1) * 6, None),
    ],
)
def test_the_file_is_sound(name: str, num_runs: int, some: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.row_proofs, "load_tokenizer", lambda _: tiny_tokenizer())
    prepared = prepare(SWEEPS / f"{name}.yaml", [], MACHINE)
    quickstart = prepare(SWEEPS / "quickstart.yaml", [], MACHINE)
    runs = [entry for entry in prepared.manifest.runs if entry.kind == "run"]
    assert len(runs) == num_runs
    assert some is None or some in [entry.label for entry in runs]
    (settings,) = {
        tuple(entry.config[f"training.{field}"] for field in FROZEN)
        for entry in (*runs, *(entry for entry in quickstart.manifest.runs if entry.kind == "run"))
    }
    assert settings == (2.0, 8, 2, 1e-3, "linear"), "those of the quickstart, for every defense"
    undefended = {entry.run_id for entry in quickstart.manifest.runs if entry.label == "none"}
    shares_data = name != "pre_post"
    assert bool(undefended & {entry.run_id for entry in runs}) is shares_data, "with the quickstart: not trained twice"


def test_the_sweeps_of_axes_and_capping_are_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.row_proofs, "load_tokenizer", lambda _: tiny_tokenizer())
    study = prepare(SWEEPS / "axis_synthetic.yaml", [], MACHINE)
    assert sum(cost.num_shards for cost in study.measure_costs.values()) == 7 * 5 * 20 / 10
    combined = prepare(SWEEPS / "combined_strategies.yaml", [], MACHINE)
    runs = [entry for entry in combined.manifest.runs if entry.kind == "run"]
    assert len(runs) == 5 * 4 * 2 + 5 * 2
    assert len({entry.run_id for entry in runs}) == 5
    assert {len(entry.judge_ids) for entry in runs} == {2, 3}  # the questions with known answers have one more
