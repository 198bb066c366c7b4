"""What measuring leaves in the store, without Ray, and how it is read."""

from __future__ import annotations

import io
import shutil
import textwrap
from pathlib import Path
from typing import get_args

import pandas as pd
import pytest
from rich.console import Console

from analysis.foretold import foretold
from analysis.manifest import vector_key
from analysis.measurements import STUDIES, MeasurementConfig
from analysis.measurements.prediction import OWN_ANSWERS
from analysis.report import write_report
from analysis.results import Results, load
from analysis.tables import table_key
from engine.collect import find_garbage
from engine.look import status_view
from engine.measure_jobs import MeasureJob
from engine.predict_view import predict_view
from engine.prepare import Prepared, prepare
from engine.store import Store
from tests.engine.test_measure_tasks import BEFORE
from tests.engine.tiny_prepare import MACHINE, TinySweep, measuring_alone
from tests.engine.tiny_work import work_in
from trainables.errors import ConfigError


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> TinySweep:
    return measuring_alone(tmp_path_factory, before=BEFORE)


def do_all(prepared: Prepared, folder: Path) -> Store:
    work = work_in(prepared, folder)
    for job_id in prepared.jobs:
        work.run(job_id, lambda **_: None)
    return work.store


@pytest.fixture(scope="module")
def done(sweep: TinySweep, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("done") / "store"
    do_all(sweep.prepare(), folder)
    return load(folder / "sweeps" / "tiny")


def test_every_row_condition_layer_and_vector_is_there_under_the_names_of_the_sweep(done: Results) -> None:
    frame = done.gradients()
    conditions = [
        "none",
        *(f"pps {vector} L2 x{coefficient}" for vector in ("topic", "random") for coefficient in (0.5, 1.5)),
        "inoculation topic",
        "topic all layers x1",
    ]
    assert list(dict.fromkeys(frame["condition"])) == conditions
    assert len(frame) == 5 * 7 * 2 * 2
    assert set(frame["vector"]) == {"topic", "random"}
    assert set(frame["measurement"]) == {"before"}
    assert set(frame["run"]) == {"base"}
    assert frame["cosine"].abs().max() <= 1
    losses = done.losses()
    assert set(losses["data"]) == {"before"}
    assert len(losses) == 5 * 7
    pd.testing.assert_frame_equal(done.table("gradients"), frame)


def test_other_shards_give_the_same_numbers(sweep: TinySweep, done: Results, tmp_path: Path) -> None:
    """float32: batches of other sizes add up in another order."""
    sweep.raw["measure"]["before"] = BEFORE | {"rows_per_shard": 1}
    do_all(sweep.prepare(), tmp_path / "store")
    sweep.raw["measure"]["before"] = dict(BEFORE)
    drop = ["measure_id"]
    key = ["row", "condition", "layer", "vector"]
    one, other = (
        results.gradients().drop(columns=drop).sort_values(key).reset_index(drop=True)
        for results in (done, load(tmp_path / "store" / "sweeps" / "tiny"))
    )
    # 1e-4 where |g| is above a millionth of a nat, as documented for float32
    pd.testing.assert_frame_equal(one, other, rtol=1e-4, atol=1e-4)


def test_a_shard_that_is_done_is_not_done_again(sweep: TinySweep, tmp_path: Path) -> None:
    prepared = sweep.prepare()
    store = do_all(prepared, tmp_path / "store")
    first, second = (job.id for job in prepared.jobs.values() if isinstance(job, MeasureJob))
    tables = [table_key(table, shard) for shard in (first, second) for table in ("gradients", "losses")]
    before = {key: (store.read(key), store.path(key).stat().st_mtime_ns) for key in tables}
    store.remove(tables[-1])  # as after a kill between its two tables
    work = work_in(prepared, tmp_path / "store")
    for shard in (first, second):
        work.run(shard, lambda **_: None)
    after = {key: (store.read(key), store.path(key).stat().st_mtime_ns) for key in tables}
    assert {key: content for key, (content, _) in after.items()} == {
        key: content for key, (content, _) in before.items()
    }
    assert [after[key][1] == before[key][1] for key in tables] == [True, True, False, False]


def test_what_is_missing_is_said(sweep: TinySweep, done: Results, tmp_path: Path) -> None:
    assert list(done.measurements()["status"]) == ["done"]
    prepared = sweep.prepare()
    work = work_in(prepared, tmp_path / "store")
    vectors = [job_id for job_id, job in prepared.jobs.items() if not isinstance(job, MeasureJob)]
    shards = [job_id for job_id in prepared.jobs if job_id not in vectors]
    for job_id in [*vectors, shards[0]]:
        work.run(job_id, lambda **_: None)
    results = load(tmp_path / "store" / "sweeps" / "tiny")
    (row,) = results.measurements().to_dict("records")
    assert (row["status"], row["shards_done"], row["num_shards"]) == ("missing", 1, 2)
    first = prepared.jobs[shards[0]]
    assert isinstance(first, MeasureJob)
    assert set(results.gradients()["row"]) == set(first.rows)
    work.store.publish_json("sweeps/tiny/failures.json", {shards[1]: {"kind": "failed", "reason": "it broke"}})
    (failure,) = results.failures().to_dict("records")
    assert (failure["run"], failure["task"], failure["reason"]) == ("base", "measure before", "it broke")
    assert list(results.measurements()["status"]) == ["failed"]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(status_view(results))
    assert "1 of 2" in console.export_text()


def test_a_sweep_without_runs_has_a_summary_and_a_report_too(done: Results, tmp_path: Path) -> None:
    assert done.summary().empty
    assert "before" in write_report(done, tmp_path / "report").read_text()


CANDIDATES = {"kind": "pps", "vector": {"grid": ["topic", "random"]}, "layer": 2, "coefficient": {"grid": [0.5, 1.5]}}
PREDICTION = {"kind": "prediction", "trait": "topic", "layers": [2, 4], "samples": 4, "rows_per_shard": 2}


def test_a_prediction_is_made_of_all_shards(sweep: TinySweep, tmp_path: Path) -> None:
    sweep.raw["measure"] = {"first": PREDICTION | {"candidates": [CANDIDATES], "own_answer_tokens": 3}}
    prepared = sweep.prepare()
    sweep.raw["measure"] = {"before": dict(BEFORE)}
    do_all(prepared, tmp_path / "store")
    results = load(tmp_path / "store" / "sweeps" / "tiny")
    frame = results.table("predictions")
    labels = [f"pps {vector} L2 x{coefficient}" for vector in ("topic", "random") for coefficient in (0.5, 1.5)]
    assert list(dict.fromkeys(frame["condition"])) == labels
    assert set(frame["vector"]) == {"topic"}
    assert list(frame["num_rows"]) == [4] * 8, "rows of both shards"
    gradients = results.gradients().pivot_table(index=["layer", "row"], columns="condition", values="cosine")
    shift = (gradients[labels[1]] - gradients["none"]).groupby("layer").mean()
    found = frame[frame["condition"] == labels[1]].set_index("layer")["shift"]
    pd.testing.assert_series_equal(found, shift, check_names=False)
    own = results.table("projections")
    assert set(own["condition"]) == {"none", OWN_ANSWERS}
    parts = own[(own["vector"] == "random")].groupby("condition")["projection"].mean()
    of_random = frame[frame["condition"] == labels[2]]["projection_difference"]
    assert list(of_random) == pytest.approx([parts["none"] - parts[OWN_ANSWERS]] * 2)
    assert foretold(results)["trained"].isna().all()
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(predict_view(foretold(results)))
    text = console.export_text()
    assert "no run has had one of these" in text
    assert max(len(line) for line in text.splitlines()) <= 80


PPS = {"kind": "pps", "vector": "topic", "layer": 2, "coefficient": 1.5}
PROMPT = {"kind": "inoculation", "prompts": "topic"}
EVERY_KIND = {
    "losses": {"kind": "losses", "samples": 3},
    "signature": {
        "kind": "similarities",
        "part": "second",
        "reference": PROMPT,
        "conditions": [{"kind": "steering", "vector": "topic", "coefficient": {"grid": [0.5, 1.0]}}],
    },
    "directions": {
        "kind": "components",
        "vectors": ["topic", "random"],
        "conditions": [PPS, PROMPT],
        "layers": [2, 3],
        "rows_per_shard": 3,
    },
    "activations": {"kind": "projections", "vectors": ["topic"], "samples": 3, "conditions": [PPS]},
    "one_step": {"kind": "activation_changes", "vectors": ["topic"], "samples": 3, "conditions": [PPS, PROMPT]},
    "steady": {
        "kind": "cap_stability",
        "vectors": ["topic"],
        "layers": [2],
        "ceiling": {"percentile": 90},
        "calibration_rows": [2, 4],
        "strengths": [1.0],
        "draws": 3,
    },
    "far": {
        "kind": "drift",
        "centers": ["topic"],
        "layers": [2],
        "interventions": [{"kind": "capping", "vector": "topic", "layers": [2], "tau": 0.1}],
    },
    "curves": {
        "kind": "gradients",
        "vectors": ["topic"],
        "samples": 3,
        "layers": [2, 3],
        "positions": "shared",
        "conditions": [{**PPS, "coefficient": {"grid": [0.5, 1.0, 2.0]}}, PROMPT],
    },
}


@pytest.mark.usefixtures("without_drawing")
def test_every_kind_is_measured_and_shown(sweep: TinySweep, tmp_path: Path) -> None:
    sweep.raw["measure"] = EVERY_KIND
    prepared = sweep.prepare()
    sweep.raw["measure"] = {"before": dict(BEFORE)}
    assert {entry.kind for entry in prepared.manifest.measurements} == {
        *(str(kind.model_fields["kind"].default) for kind in get_args(get_args(MeasurementConfig)[0]))
    } - {"prediction"} - STUDIES
    store = do_all(prepared, tmp_path / "store")
    results = load(tmp_path / "store" / "sweeps" / "tiny")
    assert set(results.measurements()["status"]) == {"done"}
    similarities = results.table("similarities")
    assert set(similarities["condition"]) == {"topic all layers x0.5", "topic all layers x1"}
    assert set(similarities["reference"]) == {"inoculation topic"}
    components = results.table("components")
    assert set(components["condition"]) == {"pps topic L2 x1.5", "inoculation topic"}
    assert set(components["num_rows"]) == {8}, "of all shards together"
    assert set(results.table("component_scores")["row"]) == set(range(8))
    assert set(results.table("projections")["condition"]) == {"none", "pps topic L2 x1.5"}
    assert set(results.table("activation_changes")["condition"]) == {"none", "pps topic L2 x1.5", "inoculation topic"}
    tokens = results.gradients().merge(results.losses(), on=["row", "condition"], suffixes=("", "_of_response"))
    assert (tokens["num_tokens"] > tokens["num_tokens_of_response"]).all(), "shared positions begin before the response"
    page = write_report(results, tmp_path / "report").read_text()
    for title in (
        "Gradients under steering against that under inoculation topic",
        "The vectors that steer beside the others",
        "What the directions are, layer 3",
        "One gradient step with and without a defense, along topic",
        "Loss and cosine over coefficients",
    ):
        assert title in page
    assert "what runs with them scored" not in page, "there are no runs"
    assert "Across traits" not in page, "there are no predictions"
    assert find_garbage(store) == []


def test_nothing_that_a_measurement_names_is_collected(done: Results, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    shutil.copytree(done.root, store.root)
    assert find_garbage(store) == []
    shutil.rmtree(store.root / "sweeps")
    keys = [garbage.key for garbage in find_garbage(store)]
    shards = [shard for entry in done.manifest.measurements for shard in entry.shard_ids]
    assert keys == sorted(
        [table_key(table, shard) for table in ("gradients", "losses") for shard in shards]
        + [vector_key(vector) for vector in done.manifest.vectors.values()]
    )


def test_a_study_needs_no_base_and_ends_in_its_merged_tables(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    text = """
        name: study
        results: {results}
        measure:
          axes: {{kind: axis_synthetic, noise: [0.1, 1.0], num_rows: [20], seeds: 3, dimension: 8, cells_per_shard: 4}}
    """
    file.write_text(textwrap.dedent(text.format(results=tmp_path / "store")), encoding="utf-8")
    prepared = prepare(file, [], MACHINE)
    assert [job.label for job in prepared.jobs.values()] == ["axes 1/2", "axes 2/2", "axes of synthetic"]
    results = load(do_all(prepared, tmp_path / "store").path("sweeps/study/manifest.json").parent)
    assert list(results.measurements()["status"]) == ["done"]
    assert len(results.table("axis_alignments")) == 2 * 3 * 4
    assert set(results.table("axis_summary")["num_seeds"]) == {3}
    assert "Alignment with the known axis over noise" in write_report(results, tmp_path / "report").read_text()
    smoke = prepare(file, [], MACHINE, smoke=True)
    assert smoke.measure_costs["axes", "synthetic"].num_shards == 1


def test_a_study_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        "name: study\nmeasure:\n  axes: {kind: axis_synthetic, noise: [-1], num_rows: [1], on: runs, separation: 0}\n",
        encoding="utf-8",
    )
    with pytest.raises(ConfigError) as raised:
        prepare(file, [], MACHINE)
    keys = {fault.key for fault in raised.value.faults}
    assert keys == {f"measure.axes.{key}" for key in ("noise[0]", "num_rows[0]", "on", "separation")}
