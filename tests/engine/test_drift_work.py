"""Drift as a measurement of a sweep, with a calibrated cap: without Ray, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.report import write_report
from analysis.results import Results, load
from engine.prepare import Prepared
from tests.engine.test_measure_work import do_all
from tests.engine.tiny_prepare import TinySweep, tiny_model_folder

CAP: dict[str, Any] = {
    "kind": "capping",
    "vector": "topic",
    "layers": [2, 3],
    "ceiling": {"percentile": {"grid": [0, 90]}},
    "reference": "data/negative.jsonl",
}
DRIFT = {
    "kind": "drift",
    "on": "both",
    "data": "data/train.jsonl",
    "centers": ["place"],
    "layers": [1, 3],
    "interventions": [
        CAP,
        CAP | {"ceiling": {"percentile": 90}, "reference": "data/positive.jsonl"},
        {"kind": "steering", "vector": "topic", "layers": [2], "coefficient": 2.0},
    ],
    "rows_per_shard": 3,
}
CAPS = [f"cap topic L2-3 at most {bound}" for bound in ("p0", "p90", "p90 #2")]
CONDITIONS = ["none", *CAPS, "steer topic L2 x2"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> TinySweep:
    sweep = TinySweep(tmp_path_factory.mktemp("sweep"), tiny_model_folder(tmp_path_factory))
    sweep.raw["vectors"]["place"] = {"mean": {"data": "data/negative.jsonl", "max_length": 128}}
    sweep.raw["runs"] = [{"defense": "none"}]
    watch = {"vectors": ["topic"], "layers": [1, 3], "centers": ["place"]}
    sweep.raw["training"] |= {"max_steps": 3, "batch_size": 8, "watch": watch}  # a step is all 8 rows
    sweep.raw["evaluation"] |= {"samples": 1, "max_new_tokens": 2}
    sweep.raw["measure"] = {"far": dict(DRIFT)}
    return sweep


def measured(prepared: Prepared, folder: Path) -> Results:
    do_all(prepared, folder)
    return load(folder / "sweeps" / "tiny")


@pytest.fixture(scope="module")
def done(sweep: TinySweep, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return measured(sweep.prepare(), tmp_path_factory.mktemp("done") / "store")


def test_a_row_per_model_condition_layer_and_place(done: Results) -> None:
    frame = done.table("drift")
    assert list(frame[["run", "condition", "layer", "center"]].itertuples(index=False, name=None)) == [
        (run, condition, layer, "place") for run in ("base", "none") for condition in CONDITIONS for layer in (1, 3)
    ]
    assert set(frame["num_rows"]) == {8}
    assert (frame["drift_estimate_low"] <= frame["drift_estimate"]).all()
    assert (frame["drift_estimate"] <= frame["drift_estimate_high"]).all()
    assert (frame["drift_estimate"] < frame["drift"]).all()
    by = frame.set_index(["run", "condition", "layer"])["drift"]
    # below what is clamped nothing changes; a ceiling at the least projection of the reference moves what is above it
    for condition in CONDITIONS[1:]:
        assert by["base", condition, 1] == by["base", "none", 1]
        assert by["base", condition, 3] != by["base", "none", 3]


def test_before_a_step_it_is_what_the_training_watched(done: Results) -> None:
    """A step of all rows in one batch, read before the adapter does anything: float32 sums in another order, 1e-6."""
    signals = done.table("signals")
    first = signals[(signals["signal"] == "drift") & (signals["step"] == 1)].set_index("layer")["value"]
    drift = done.table("drift")
    base = drift[(drift["run"] == "base") & (drift["condition"] == "none")].set_index("layer")["drift"]
    for layer in (1, 3):
        assert base[layer] == pytest.approx(first[layer], abs=1e-6)
    trained = drift[(drift["run"] == "none") & (drift["condition"] == "none")].set_index("layer")["drift"]
    assert abs(trained[3] - base[3]) > 1e-5


def test_shards_change_nothing(sweep: TinySweep, done: Results, tmp_path: Path) -> None:
    """float32: batches of other sizes, 1e-6 of a drift."""
    alone = sweep.prepare("measure.far.rows_per_shard=8", "measure.far.on=base", measure_only=True)
    other = measured(alone, tmp_path / "store").table("drift")
    found = done.table("drift").iloc[: len(other)]
    assert len(other) == 2 * len(CONDITIONS)
    keys = ["run", "condition", "layer", "center", "num_rows", "num_tokens"]
    pd.testing.assert_frame_equal(found[keys], other[keys])
    for column in ("drift", "drift_estimate", "drift_estimate_low", "drift_estimate_high"):
        assert found[column].to_numpy() == pytest.approx(other[column].to_numpy(), abs=1e-6)


def test_the_report_shows_all_models_together(done: Results, tmp_path: Path) -> None:
    page = write_report(done, tmp_path / "report").read_text()
    assert "How far models have drifted" in page
    assert "Drift of models" in page
    assert "cap topic L2-3 at most p90" in page


def test_the_reference_is_part_of_what_is_measured(sweep: TinySweep, tmp_path: Path) -> None:
    before = {entry.run: entry.shard_ids for entry in sweep.prepare().manifest.measurements}
    other = tmp_path / "other.jsonl"
    other.write_text((sweep.folder / "data" / "positive.jsonl").read_text())
    after = sweep.prepare(f"measure.far.interventions.0.reference={other}").manifest.measurements
    assert all(set(entry.shard_ids).isdisjoint(before[entry.run]) for entry in after)


def test_what_is_wrong_is_said_before_anything_starts(sweep: TinySweep) -> None:
    unknown = ["interventions.0.reference=data/no_such.jsonl", "interventions.2.vector=topik", "layers=[9]"]
    assert set(sweep.faults(*(f"measure.far.{one}" for one in unknown))) == {
        f"measure.far.{key}" for key in ("interventions[0].reference", "interventions[2].vector", "layers[0]")
    }
    twice = [{"kind": "steering", "vector": "topic", "layers": [2], "coefficient": 1.0}] * 2
    sweep.raw["measure"]["far"] = DRIFT | {"layers": [9], "centers": ["place", "place"], "interventions": twice}
    found = sweep.faults()
    sweep.raw["measure"]["far"] = dict(DRIFT)
    assert found == {
        "measure.far.layers[0]": "layer 9 does not exist; the model has layers 0 to 4",
        "measure.far.centers[1]": "'place' is listed twice",
        "measure.far.interventions[1]": "the same intervention stands twice in the list",
    }
