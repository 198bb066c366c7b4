"""What was proved of a sweep's rows is not proved again, and whatever could change a proof makes it anew."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import engine.proved
import engine.row_proofs
from engine.prepare import Prepared
from engine.proved import Proved, proved_key
from engine.run import write_sweep
from engine.store import Store
from tests.engine.tiny_prepare import TinySweep, add_long_question, tiny_model_folder
from trainables.base_model import ResolvedBase, load_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory)


@pytest.fixture
def sweep(tmp_path: Path, model: Path) -> TinySweep:
    return TinySweep(tmp_path / "sweep", model)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[ResolvedBase]:
    """Grows by one with every tokenizer that is loaded."""
    calls: list[ResolvedBase] = []

    def load(base: ResolvedBase) -> Any:
        calls.append(base)
        return load_tokenizer(base)

    monkeypatch.setattr(engine.row_proofs, "load_tokenizer", load)
    return calls


def kept(sweep: TinySweep, prepared: Prepared) -> Store:
    """The store, with what was prepared written into it as a run would."""
    store = Store.open(sweep.folder / "results", create=True)
    write_sweep(prepared, store)
    return store


def test_nothing_is_proved_twice(sweep: TinySweep, loaded: list[ResolvedBase]) -> None:
    sweep.raw["evaluation"]["system_prompt"] = "Be brief."
    first = sweep.prepare()
    assert len(loaded) == 1
    kept(sweep, first)
    again = sweep.prepare()
    assert len(loaded) == 1
    assert (again.costs, again.manifest, again.proved) == (first.costs, first.manifest, first.proved)
    sweep.raw["training"]["learning_rate"] = 0.002
    assert sweep.prepare().costs == first.costs, "rows do not depend on how they are trained on"
    assert len(loaded) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda sweep: sweep.replace("data/train.jsonl", "Tea.", "Coffee."),
        lambda sweep: sweep.replace("data/plain_answers.jsonl", "Long walks.", "Short walks."),
        lambda sweep: sweep.raw["data"].update(max_length=95),
        lambda sweep: sweep.raw["data"].update(loss_on="all"),
        lambda sweep: sweep.raw["data"].update(allow_truncated_away=True),
        lambda sweep: sweep.raw["evaluation"].update(system_prompt="Be brief."),
        lambda sweep: sweep.replace("model/tokenizer_config.json", "{", '{"added": 1, '),
    ],
)
def test_what_was_never_proved_is_proved(sweep: TinySweep, loaded: list[ResolvedBase], change: Any) -> None:
    kept(sweep, sweep.prepare())
    change(sweep)
    sweep.prepare()
    assert len(loaded) == 2


@pytest.mark.parametrize("part", ["chat_data", "chat_encoder", "sample", "version"])
def test_other_code_proves_anew(
    sweep: TinySweep, loaded: list[ResolvedBase], part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept(sweep, sweep.prepare())
    if part == "version":
        monkeypatch.setattr("importlib.metadata.version", lambda name: f"another {name}")
    else:
        changed = tmp_path / "changed.py"
        module = getattr(engine.proved, part)
        changed.write_text(Path(str(module.__file__)).read_text() + "# changed\n")
        monkeypatch.setattr(module, "__file__", str(changed))
    engine.proved._code.cache_clear()
    try:
        sweep.prepare()
    finally:
        engine.proved._code.cache_clear()
    assert len(loaded) == 2


def test_a_fault_is_found_every_time(sweep: TinySweep) -> None:
    kept(sweep, sweep.prepare())
    add_long_question(sweep)
    for _ in range(2):
        assert "1 of 9 rows" in sweep.faults()["data.train"]


@pytest.mark.parametrize("content", [b"[]", b"{", b'"text"'])
def test_a_damaged_record_is_no_record(sweep: TinySweep, loaded: list[ResolvedBase], content: bytes) -> None:
    first = sweep.prepare()
    kept(sweep, first).publish(proved_key(sweep.raw["name"]), content)
    assert sweep.prepare().costs == first.costs
    assert len(loaded) == 2


def test_a_tokenizer_that_may_be_another_next_time_is_not_kept() -> None:
    """A hub id whose commit is not known; a folder counts by its content, an embedded model by its package."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    for model, revision, source, pinned in [
        ("someone/model", "main", "someone/model", False),
        ("someone/model", commit, "someone/model", True),
        ("folder", "a" * 64, "/somewhere", True),
        ("embedded:x", "x==1", "embedded:x", True),
    ]:
        base = ResolvedBase(model=model, revision=revision, dtype="float32", source=source)
        proved = Proved()
        proved.keep(base, "rows", 1, counts=(2, 3))
        assert bool(proved.kept) is pinned
        assert Proved(proved.kept).recall(base, "rows", 1) == ([2, 3] if pinned else None)
        assert Proved(proved.kept).recall(base, "rows", 2) is None


def test_an_invocation_with_nothing_to_do_needs_no_heavy_library() -> None:
    """Seconds each: what only trials, judges and reports use is imported where it is used."""
    heavy = ("ray", "transformers", "peft", "deepspeed", "openai", "matplotlib", "datasets")
    code = f"import sys, engine.run, engine.show; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
