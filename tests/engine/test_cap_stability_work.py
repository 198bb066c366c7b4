"""How steady a ceiling is, as a measurement of a sweep: without Ray, in one process."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from analysis.cap_stability import stability_rows
from analysis.measurements import CapStabilityMeasurement
from analysis.references import token_projections
from analysis.report import write_report
from analysis.results import Results, load
from analysis.vectors import Vector
from engine.measure_jobs import MeasureJob
from engine.prepare import Prepared
from tests.engine.test_measure_work import do_all
from tests.engine.tiny_prepare import TinySweep, measuring_alone
from tests.engine.tiny_work import work_in

STABILITY = {
    "kind": "cap_stability",
    "data": "data/train.jsonl",
    "vectors": ["topic"],
    "layers": [2, 3],
    "ceiling": {"percentile": 90},
    "calibration_rows": [1, 3],
    "strengths": [1.0, 4.0],
    "shifts": [0.0, 1.0],
    "draws": 5,
}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> TinySweep:
    return measuring_alone(tmp_path_factory, steady=STABILITY)


def measured(prepared: Prepared, folder: Path) -> Results:
    do_all(prepared, folder)
    return load(folder / "sweeps" / "tiny")


def test_the_table_is_that_of_all_rows_together_however_they_are_dealt_out(sweep: TinySweep, tmp_path: Path) -> None:
    prepared = sweep.prepare()
    found = measured(prepared, tmp_path / "one").table("cap_stability")
    assert len(found) == 2 * 2 * 2 * 2
    assert set(found["vector"]) == {"topic"}
    other = measured(sweep.prepare("measure.steady.rows_per_shard=1"), tmp_path / "two").table("cap_stability")
    names = [name for name in found.columns if name != "measure_id"]
    pd.testing.assert_frame_equal(found[names], other[names])

    work = work_in(prepared, tmp_path / "one")
    job = next(one for one in prepared.jobs.values() if isinstance(one, MeasureJob))
    config = job.measurement
    assert isinstance(config, CapStabilityMeasurement)
    (vector_id,) = config.vectors
    values = Vector.read(work.store.path(f"vectors/{vector_id}.safetensors")).values
    base = work.loaded(job.base)
    rows = [token_projections(base, [messages], values, [2], 128)[2] for messages in work.rows(job.content)]
    by_hand = stability_rows(
        rows,
        float(values[2].norm()),
        config.ceiling,
        calibration_rows=[1, 3],
        shifts=[0.0, 1.0],
        strengths=[1.0, 4.0],
        draws=5,
        measure_id="",
        vector="topic",
        layer=2,
    )
    at_two = found[found["layer"] == 2]
    assert [row.ceiling for row in by_hand] == list(at_two["ceiling"])


def test_the_report_shows_it(sweep: TinySweep, tmp_path: Path) -> None:
    results = measured(sweep.prepare(), tmp_path / "store")
    page = write_report(results, tmp_path / "report").read_text()
    for heading in (
        "A ceiling over the rows that it is calibrated on",
        "A ceiling under shifted activations, calibrated on 3 rows",
        "Ceilings, and what they do under an attack of strength 4",
    ):
        assert heading in page


def test_what_is_wrong_is_said_before_anything_starts(sweep: TinySweep) -> None:
    overrides = [
        "measure.steady.layers=[9]",
        "measure.steady.strengths=[0]",
        "measure.steady.calibration_rows=[0]",
        "measure.steady.on=runs",
    ]
    keys = set(sweep.faults(*overrides[1:]))
    assert keys == {f"measure.steady.{key}" for key in ("strengths[0]", "calibration_rows[0]", "on")}
    assert sweep.faults("measure.steady.samples=4", "measure.steady.calibration_rows=[3, 4]") == {
        "measure.steady.calibration_rows[1]": "4 of the 4 rows that are read leave none to hold out; allowed: 1 to 3"
    }
    sweep.prepare(smoke=True)
    assert sweep.faults(overrides[0]) == {
        "measure.steady.layers[0]": "layer 9 does not exist; the model has layers 0 to 4"
    }
