"""What the trial of a pack leaves in the store and says, without Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import engine.train_work
from analysis.manifest import adapter_key, run_key
from engine.pack_work import told
from engine.prepare import Prepared
from tests.engine.tiny_prepare import TinySweep, entries, tiny_model_folder
from tests.engine.tiny_work import work_in

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    sweep = TinySweep(tmp_path_factory.mktemp("sweep"), tiny_model_folder(tmp_path_factory))
    bursting = {"learning_rate": 1e30, "schedule": "constant", "max_gradient_norm": None}
    sweep.raw["runs"] = [
        {"defense": "none", "label": "long", "training": {"max_steps": 3}},
        {"defense": {"kind": "inoculation", "prompts": "topic"}, "label": "short", "training": {"lora": {"rank": 3}}},
        {"defense": "none", "label": "bursting", "training": bursting},
    ]
    return sweep.prepare()


def ids_of(prepared: Prepared, *labels: str) -> list[str]:
    return [entries(prepared)[label].run_id for label in labels]


def collecting(said: list[dict[str, Any]]) -> Callable[..., None]:
    return lambda **figures: said.append(figures)


def test_every_run_of_a_pack_is_committed_for_itself(prepared: Prepared, tmp_path: Path) -> None:
    work = work_in(prepared, tmp_path / "pack")
    long, short, bursting = members = ids_of(prepared, "long", "short", "bursting")
    said: list[dict[str, Any]] = []
    assert work.train_pack(members, "smaller than meant", collecting(said)) == {}
    told_of = [one for figures in said if (one := told(figures)) is not None]
    failures = [one for one in told_of if one[1] is not None]
    assert [one for one in told_of if one[1] is None] == [(short, None), (long, None)], "in the order of their ends"
    assert [(job, str(reason).partition(", step")[0]) for job, reason in failures] == [
        (bursting, f"TrainingError: run {bursting}")
    ]
    assert not work.store.exists(run_key(bursting))
    for run_id in (long, short):
        record = json.loads(work.store.read(run_key(run_id)))
        assert (record["pack_size"], record["packing"], record["pack_note"]) == (3, "exact", "smaller than meant")
        assert record["placement"]["pack"] == members
        alone = work_in(prepared, tmp_path / "alone")
        alone.run(run_id, collecting([]))
        paths = [one.store.path(adapter_key(run_id)) / ADAPTER for one in (work, alone)]
        assert paths[0].read_bytes() == paths[1].read_bytes()
        assert json.loads(alone.store.read(run_key(run_id)))["packing"] is None

    before = {run_id: work.store.read(run_key(run_id)) for run_id in (long, short)}
    said.clear()
    work.train_pack([long, short], "", collecting(said))
    assert [told(figures) for figures in said] == [(long, None), (short, None)], "nothing is trained twice"
    assert {run_id: work.store.read(run_key(run_id)) for run_id in before} == before


def test_a_lack_of_memory_is_told_and_not_raised(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise MemoryError("no more")

    monkeypatch.setattr(engine.train_work, "train_pack", fails)
    work = work_in(prepared, tmp_path)
    members = ids_of(prepared, "long", "short")
    assert work.train_pack(members, "", collecting([])) == {
        "pack_out_of_memory": "out of memory: no more",
        "pack_tried": 2,
    }
    assert "MemoryError" in work.store.read(f"runs/{members[0]}/log.txt").decode()

    def breaks(*_: Any, **__: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(engine.train_work, "train_pack", breaks)
    with pytest.raises(RuntimeError, match="something else"):
        work.train_pack(members, "", collecting([]))


def test_as_many_runs_are_trained_as_fit(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.pack_work.num_fitting", lambda runs, *_, **__: len(runs) - 1)
    monkeypatch.setattr("trainables.pack_memory.Measured.num_fitting", lambda *_: None)
    work = work_in(prepared, tmp_path, auto_pack=True)
    long, short = ids_of(prepared, "long", "short")
    assert work.train_pack([long, short], "", collecting([])) == {"pack_fits": 1}
    assert work.store.exists(run_key(long))
    assert not work.store.exists(run_key(short))
