"""What measuring leaves in the store, without Ray, and how it is read."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from analysis.manifest import vector_key
from analysis.report import write_report
from analysis.results import Results, load
from analysis.tables import table_key
from engine.collect import find_garbage
from engine.look import status_view
from engine.prepare import Prepared
from engine.run import write_sweep
from engine.store import Store
from engine.tasks import MeasureJob
from engine.work import SweepWork
from tests.engine.test_measure_tasks import BEFORE
from tests.engine.tiny_prepare import TinySweep, tiny_model_folder


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> TinySweep:
    sweep = TinySweep(tmp_path_factory.mktemp("sweep"), tiny_model_folder(tmp_path_factory))
    for name in ("runs", "training", "evaluation"):
        del sweep.raw[name]
    sweep.raw["measure"] = {"before": dict(BEFORE)}
    return sweep


def work_of(prepared: Prepared, folder: Path) -> SweepWork:
    store = Store.open(folder, create=True)
    write_sweep(prepared, store)
    return SweepWork(
        store=store,
        jobs=dict(prepared.jobs),
        device="cpu",
        threads=1,
        zero_stage=0,
        gradient_checkpointing=False,
    )


def do_all(prepared: Prepared, folder: Path) -> Store:
    work = work_of(prepared, folder)
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
    work = work_of(prepared, tmp_path / "store")
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
    work = work_of(prepared, tmp_path / "store")
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
