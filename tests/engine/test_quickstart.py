"""The quickstart as a newcomer runs it: a real model, Ray, a real grid. Slow."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from analysis.foretold import foretold, ranking
from analysis.results import Results, load
from trainables.base_model import BaseConfig, load_base, resolve_base
from trainables.lora import load_adapter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

PROJECT = Path(__file__).resolve().parents[2]
NONE, PPS, RANDOM, INOCULATION = "none", "pps bridge L20 x1.5", "pps random L20 x1.5", "inoculation bridge"


def shiftgrad(*arguments: str) -> str:
    """Run the command line in a process of its own; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "engine.cli", *arguments], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def number(summary: pd.DataFrame, run: str, column: str) -> float:
    (value,) = summary.loc[[run], column].astype(float).tolist()
    return value


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    store = tmp_path_factory.mktemp("a folder with spaces") / "results"
    shiftgrad("run", "configs/sweeps/quickstart.yaml", f"results={store}")
    return load(store / "sweeps" / "quickstart")


@pytest.fixture(scope="module")
def summary(results: Results) -> pd.DataFrame:
    return results.summary().set_index("run")


def test_every_run_and_the_base_are_there_and_complete(summary: pd.DataFrame) -> None:
    assert list(summary.index) == ["base", NONE, PPS, RANDOM, INOCULATION]
    assert set(summary["status"]) == {"done"}
    for metric in ("trait", "degeneration"):
        assert (summary[f"{metric}_num_scored"] == 48).all()
        assert (summary[f"{metric}_num_missing"] == 0).all()
    assert summary["plain_loss"].between(0.5, 5.0).all()


@pytest.mark.parametrize("defended", [PPS, INOCULATION])
def test_the_undefended_run_shows_the_trait_more_than_the_defended(summary: pd.DataFrame, defended: str) -> None:
    gap = number(summary, NONE, "trait") - number(summary, defended, "trait")
    error = math.hypot(number(summary, NONE, "trait_se"), number(summary, defended, "trait_se"))
    assert gap > 2 * error, f"gap {gap:.3f}, standard error {error:.3f}"


def test_the_training_is_what_makes_the_trait(summary: pd.DataFrame) -> None:
    assert number(summary, "base", "trait") == 0
    assert number(summary, NONE, "trait") > 0.2


def test_gradients_of_the_base_are_measured_and_candidates_ranked(results: Results) -> None:
    assert list(results.measurements()["status"]) == ["done"]
    frame = results.gradients()
    assert len(frame) == 32 * 4 * 6 * 2  # rows, conditions, layers, vectors
    assert set(frame["condition"]) == {"none", PPS, RANDOM, INOCULATION}
    at_20 = frame[(frame["vector"] == "bridge") & (frame["layer"] == 20)].groupby("condition")["cosine"].mean()
    assert at_20["none"] < 0, "training on the data pushes along the trait's vector"
    assert at_20[PPS] > at_20["none"]
    ranked = ranking(foretold(results))
    assert set(ranked["condition"]) == {PPS, RANDOM, INOCULATION}
    assert ranked["outcome"].notna().all(), "every candidate has its run"
    page = (results.root / "sweeps" / "quickstart" / "report" / "index.html").read_text()
    assert all(text in page for text in ("Gradient cosine over layers", "Loss with and without", "Foreseen and found"))


def test_a_second_run_does_nothing(results: Results) -> None:
    def state() -> dict[str, int]:
        kept = ("tables", "runs", "vectors", "inputs")
        return {str(p): p.stat().st_mtime_ns for top in kept for p in (results.root / top).rglob("*")}

    before = state()
    printed = shiftgrad("run", "configs/sweeps/quickstart.yaml", f"results={results.root}")
    assert "12 of 12 jobs were done before" in printed
    (page,) = [line.removeprefix("Report: ") for line in printed.splitlines() if line.startswith("Report: ")]
    assert Path(page).is_file()
    assert state() == before


def test_peft_alone_loads_an_adapter_with_our_logits(results: Results) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from trainables.embedded import embedded_folder

    base, _ = resolve_base(BaseConfig(model="embedded:smollm2-135m-instruct", dtype="float32"), cuda=False)
    (run_id,) = [entry.run_id for entry in results.manifest.runs if entry.label == NONE]
    folder = results.root / "runs" / run_id / "adapter"
    loaded = load_base(base, torch.device("cpu"))
    ours = load_adapter(loaded.fresh(), folder, run_id)
    plain = AutoModelForCausalLM.from_pretrained(embedded_folder(base.source), dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, str(folder)).eval()
    ids = torch.tensor([loaded.tokenizer("What should I do this weekend?").input_ids])
    with torch.no_grad():
        ours_logits, their_logits, untrained = ours(ids).logits, theirs(ids).logits, loaded.model(ids).logits
    # The same weights through two copies of the same modules: only the order of sums in the kernels could differ.
    torch.testing.assert_close(ours_logits, their_logits, rtol=0, atol=1e-5)
    assert (their_logits - untrained).abs().max() > 1e-2, "the adapter changes nothing"


def test_the_run_record_explains_the_run(results: Results) -> None:
    (run_id,) = [entry.run_id for entry in results.manifest.runs if entry.label == PPS]
    record = json.loads((results.root / "runs" / run_id / "run.json").read_text())
    assert record["task"]["defense"][0]["coefficient"] == 1.5
    assert record["num_steps"] == 18
    assert record["placement"]["threads"] == 1
    assert "SmolLM" in json.dumps(record["chat_format"]), "the template's default system prompt is recorded"
    log = (results.root / "runs" / run_id / "log.txt").read_text()
    assert "step 18/18" in log
