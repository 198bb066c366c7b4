"""A whole sweep with its store in a bucket, killed on its way: the tables are those of a sweep on a disk."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from analysis.results import Results, load
from tests.engine.test_kills import EXECUTION, RUNS, TIMINGS, run_here, run_to_end
from tests.engine.tiny_sweep import write_tiny_sweep
from tests.object_store import s3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TABLES = ("training", "generations", "scores", "losses", "summary")
CHECKPOINTS = "execution.checkpoint_every_steps=1"


def tables(results: Results) -> dict[str, pd.DataFrame]:
    return {name: results.table(name).drop(columns=TIMINGS, errors="ignore") for name in TABLES}


def adapter(results: Results) -> bytes:
    (run,) = (entry.run_id for entry in results.manifest.runs if entry.kind == "run")
    folder = results.run(run).adapter
    assert folder is not None
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_killed_sweep_in_a_bucket_gives_the_tables_of_one_on_a_disk(tmp_path: Path) -> None:
    write_tiny_sweep(tmp_path, runs=RUNS, extra=f"{EXECUTION}\ntrackers: none")
    code, printed = run_to_end(tmp_path, tmp_path / "disk")
    assert code == 0, printed
    on_disk = load(tmp_path / "disk" / "sweeps" / "tiny")
    with s3() as bucket:
        store = f"{bucket}/results"
        code, printed = run_here(tmp_path, store, "after_publish:checkpoint", [CHECKPOINTS])
        assert code == 3, printed
        code, printed = run_to_end(tmp_path, store, overrides=[CHECKPOINTS])
        assert code == 0, printed
        in_bucket = load(f"{store}/sweeps/tiny")
        for name, table in tables(in_bucket).items():
            pd.testing.assert_frame_equal(table, tables(on_disk)[name])
        assert adapter(in_bucket) == adapter(on_disk)
        assert "resumed after step 1" in in_bucket.run(in_bucket.manifest.runs[1].run_id).log
        code, printed = run_to_end(tmp_path, store)
        assert code == 0, printed
        assert "of 3 jobs were done before" in printed, printed
    assert not (tmp_path / "s3:").exists()
