"""The ``trackers`` section: what may stand there, and what is missing is said before anything starts."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from engine.run import run_sweep
from engine.trackers import MlflowConfig, TensorboardConfig, TrackersConfig, WandbConfig, tracker_faults
from tests.engine.sweep_writing import Files, minimal, only
from tests.engine.tiny_prepare import TinySweep, ids, tiny_model_folder
from trainables.errors import ConfigError

KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def active(files: Files, trackers: Any) -> dict[str, Any]:
    raw = minimal() if trackers is None else minimal(trackers=trackers)
    return files.load(raw).trackers.active()


def test_tensorboard_is_on_without_being_named(files: Files) -> None:
    assert active(files, None) == {"tensorboard": TensorboardConfig()}
    assert set(active(files, {"wandb": {"mode": "offline"}})) == {"tensorboard", "wandb"}
    assert set(active(files, {"tensorboard": {}, "mlflow": {}})) == {"tensorboard", "mlflow"}


@pytest.mark.parametrize("off", ["none", {}, {"tensorboard": "none"}])
def test_everything_can_be_switched_off(files: Files, off: Any) -> None:
    assert active(files, off) == {}


def test_the_command_line_switches_one_and_all(files: Files) -> None:
    raw = minimal(trackers={"wandb": {"mode": "offline"}})
    assert set(files.load(raw, "trackers.wandb=none").trackers.active()) == {"tensorboard"}
    assert set(files.load(raw, "trackers.tensorboard=none").trackers.active()) == {"wandb"}
    assert files.load(raw, "trackers=none").trackers.active() == {}


def test_wandb_mode_disabled_of_the_environment_switches_it_off(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert "wandb" not in active(files, {"wandb": {}})
    assert "wandb" in active(files, {"wandb": {"mode": "offline"}}), "what the file says counts"


@pytest.mark.parametrize(
    ("trackers", "key", "message"),
    [
        ("nome", "trackers", "must be a mapping; got 'nome'"),
        ({"wandbb": {}}, "trackers.wandbb", "did you mean wandb?"),
        ({"wandb": None}, "trackers.wandb", "must be 'none' or a mapping; got null"),
        ({"wandb": {"mode": "offlin"}}, "trackers.wandb.mode", "did you mean offline?"),
        ({"wandb": {"projct": "x"}}, "trackers.wandb.projct", "did you mean project?"),
        ({"tensorboard": False}, "trackers.tensorboard", "must be 'none' or a mapping; got false"),
        ({"mlflow": {"tracking_uri": "mlruns"}}, "trackers.mlflow.tracking_uri", "sqlite:///path/to/mlflow.db"),
        ({"mlflow": {"tracking_uri": "file:///x"}}, "trackers.mlflow.tracking_uri", "no longer keeps runs in a folder"),
    ],
)
def test_faults_of_the_file(files: Files, trackers: Any, key: str, message: str) -> None:
    assert message in only(files.faults(minimal(trackers=trackers)), key)


@pytest.mark.parametrize(
    "trackers",
    [
        {"wandb": {"api_key": KEY}},
        {"mlflow": {"token": KEY}},
        {"mlflow": {"tracking_uri": f"https://me:{KEY}@tracking.example"}},
    ],
)
def test_a_key_in_the_file_is_refused_and_not_repeated(files: Files, trackers: Any) -> None:
    (message,) = files.faults(minimal(trackers=trackers)).values()
    assert "kept with the results" in message
    assert "set WANDB_API_KEY" in message or "set MLFLOW_TRACKING_" in message
    assert KEY not in message


def test_a_missing_key_is_a_fault_that_names_it() -> None:
    wandb = TrackersConfig(wandb=WandbConfig())
    (fault,) = tracker_faults(wandb, {})
    assert fault.key == "trackers.wandb"
    assert "no WANDB_API_KEY in the environment" in fault.message
    assert not tracker_faults(wandb, {"WANDB_API_KEY": KEY})
    assert not tracker_faults(wandb, {"WANDB_MODE": "offline"})
    (fault,) = tracker_faults(wandb, {"WANDB_MODE": "dryrun"})
    assert fault.key == "trackers.wandb.mode"

    mlflow = TrackersConfig(mlflow=MlflowConfig(tracking_uri="https://tracking.example"))
    (fault,) = tracker_faults(mlflow, {"MLFLOW_TRACKING_USERNAME": "me"})
    assert fault.key == "trackers.mlflow"
    assert "no MLFLOW_TRACKING_TOKEN in the environment" in fault.message
    assert not tracker_faults(mlflow, {"MLFLOW_TRACKING_TOKEN": KEY})
    assert not tracker_faults(mlflow, {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": KEY})
    for without in ({"tracking_uri": "http://localhost:5000"}, {"tracking_uri": "sqlite:///x.db"}, {}):
        assert not tracker_faults(TrackersConfig(mlflow=MlflowConfig.model_validate(without)), {})
    opened = MlflowConfig(tracking_uri="https://tracking.example", open_server=True)
    assert not tracker_faults(TrackersConfig(mlflow=opened), {})


@pytest.mark.parametrize(
    ("missing", "key", "command"),
    [
        ("tensorboardX", "trackers.tensorboard", "pip install 'tensorboardX'"),
        ("wandb", "trackers.wandb", "pip install 'shiftgrad[wandb]'"),
        ("mlflow", "trackers.mlflow", "pip install 'shiftgrad[mlflow]'"),
        ("alembic", "trackers.mlflow", "pip install 'shiftgrad[mlflow]'"),
    ],
)
def test_a_missing_package_is_a_fault_that_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, missing: str, key: str, command: str
) -> None:
    find = importlib.util.find_spec
    everything = TrackersConfig(wandb=WandbConfig(mode="offline"), mlflow=MlflowConfig())
    assert not tracker_faults(everything, {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    (fault,) = tracker_faults(everything, {})
    assert fault.key == key
    assert f"the package {missing} is not installed" in fault.message
    assert command in fault.message
    # a folder of that name where Python was started, as W&B leaves one, is no package
    folder = ModuleSpec(missing, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: folder if name == missing else find(name))
    assert tracker_faults(everything, {}) == [fault]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory)


def test_what_is_missing_is_said_with_all_other_faults_and_nothing_starts(model: Path, tmp_path: Path) -> None:
    sweep = TinySweep(tmp_path, model)
    sweep.raw["trackers"] = {"wandb": {"project": "p"}}
    sweep.raw["data"]["train"] = "data/nowhere.jsonl"
    assert set(sweep.faults()) == {"trackers.wandb", "data.train"}
    sweep.raw["execution"] = {"trials": 0}
    assert set(sweep.faults()) == {"trackers.wandb", "data.train", "execution.trials"}
    with pytest.raises(ConfigError, match="no WANDB_API_KEY"):
        run_sweep(sweep.file)
    assert not (tmp_path / "results").exists()


def test_trackers_are_in_no_identity(model: Path, tmp_path: Path) -> None:
    sweep = TinySweep(tmp_path, model)
    plain = ids(sweep.prepare())
    sweep.raw["trackers"] = {"tensorboard": "none", "wandb": {"mode": "offline"}, "mlflow": {}}
    assert ids(sweep.prepare()) == plain
