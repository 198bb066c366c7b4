"""TensorBoard, W&B and MLflow for real, without Ray: what they were given is read back with their own readers."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from engine.prepare import Prepared
from engine.store import Store
from engine.trackers.base import Place, tracked_runs
from tests.engine.tiny_prepare import TinySweep, tiny_model_folder
from tests.engine.tracked import (
    FIGURES,
    NUM_STEPS,
    Tracked,
    event_curve,
    event_reader,
    finished,
    mlflow_curve,
    mlflow_runs,
    training_rows,
    wanted_curve,
)
from tests.engine.wandb_files import offline_runs
from tests.engine.wandb_server import Served, wandb_server

KEY = "0123456789abcdef" * 2 + "01234567"
PPS = "pps topic L2 x1.5"
RUNS = {"none", PPS}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory)


@pytest.fixture
def sweep(model: Path, tmp_path: Path) -> TinySweep:
    """Two runs, which is enough to tell them apart; ``raw["runs"]`` can have more."""
    sweep = TinySweep(tmp_path, model)
    sweep.raw["runs"] = sweep.raw["runs"][:2]
    return sweep


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs; making one takes seconds."""
    database = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{database}")
    return database


@pytest.fixture
def database(sweep: TinySweep, empty_database: Path) -> Path:
    """The database that the sweep's store has by default."""
    store = Store.open(sweep.raw["results"], create=True)
    return Path(shutil.copy(empty_database, store.root / "mlflow.db"))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the machine's own, nothing written into it, and a key that is to be found in no file."""
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", KEY)


def prepare(sweep: TinySweep, **trackers: object) -> Prepared:
    sweep.raw["trackers"] = {"tensorboard": "none"} | trackers
    return sweep.prepare()


def assert_key_is_nowhere(folder: Path) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    assert not [file for file in files if KEY.encode() in file.read_bytes()]


def half_done(tracked: Tracked, label: str, num_steps: int) -> None:
    """An invocation that is stopped when a run has done so many steps."""
    feed = tracked.feed()
    feed.steps(training_rows(tracked.run_ids[label])[:num_steps])
    feed.close(60)


# --- TensorBoard ---


def test_tensorboard_reads_every_step_and_score(sweep: TinySweep) -> None:
    tracked = finished(prepare(sweep, tensorboard={}))
    tracked.feed().settle()
    readers = event_reader(tracked.folder)
    assert set(readers) == RUNS | {"base"}
    for label, run_id in tracked.run_ids.items():
        for figure in FIGURES:  # an event file holds 32 bits of a number
            wanted = wanted_curve(training_rows(run_id), figure, lambda value: float(np.float32(value)))
            assert event_curve(readers[label], f"train/{figure}") == wanted
        assert event_curve(readers[label], "final/trait") == {NUM_STEPS: 0.5}
    assert event_curve(readers["base"], "final/plain_loss") == {0: 3.0}
    assert event_curve(readers["base"], "train/loss") == {}


def test_tensorboard_shows_settings_of_every_run(sweep: TinySweep) -> None:
    tracked = finished(prepare(sweep, tensorboard={}))
    tracked.feed().settle()
    data = event_reader(tracked.folder)[PPS].SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(data).session_start_info.hparams
    assert settings["defense.coefficient"].number_value == 1.5
    assert settings["defense.vector"].string_value == "topic"
    assert settings["training.learning_rate"].number_value == 0.01


def test_tensorboard_has_the_whole_curve_after_a_kill(sweep: TinySweep) -> None:
    tracked = finished(prepare(sweep, tensorboard={}))
    half_done(tracked, "none", 3)
    assert set(event_curve(event_reader(tracked.folder)["none"], "train/loss")) == {1, 2, 3}
    again = tracked.feed()
    again.steps(training_rows(tracked.run_ids["none"])[:4])  # from the checkpoint, and one more
    again.settle()
    assert set(event_curve(event_reader(tracked.folder)["none"], "train/loss")) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("later_s", [0, 1, 3600])
def test_an_open_tensorboard_forgets_the_file_that_was_replaced(sweep: TinySweep, later_s: int) -> None:
    tracked = finished(prepare(sweep, tensorboard={}))
    half_done(tracked, "none", 3)
    folder = tracked.folder / "tensorboard" / "none"
    (old,) = folder.iterdir()
    name = re.fullmatch(r"(events\.out\.tfevents\.)(\d+)(\..+)", old.name)
    assert name  # whose seconds are set back, as if the sweep had been stopped for so long
    old = old.rename(old.with_name(f"{name[1]}{int(name[2]) - later_s}{name[3]}"))
    reader = event_reader(tracked.folder)["none"]
    assert set(event_curve(reader, "train/loss")) == {1, 2, 3}
    again = tracked.feed()
    again.steps([dataclasses.replace(row, loss=7.0) for row in training_rows(tracked.run_ids["none"])[:2]])
    again.close(60)
    reader.Reload()
    assert event_curve(reader, "train/loss") == {1: 7.0, 2: 7.0}
    assert event_curve(event_reader(tracked.folder)["none"], "train/loss") == {1: 7.0, 2: 7.0}


def test_tensorboard_stops_showing_what_the_sweep_dropped_or_renamed(sweep: TinySweep) -> None:
    sweep.raw["runs"].append({"defense": "none", "seed": 1, "label": "more"})
    finished(prepare(sweep, tensorboard={})).feed().settle()
    sweep.raw["runs"][0]["label"] = "a/b: c"
    del sweep.raw["runs"][2]
    tracked = Tracked(prepare(sweep, tensorboard={}), finished(sweep.prepare()).store)
    mine = tracked.folder / "tensorboard" / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("to stay")
    tracked.feed().settle()
    assert (mine / "notes.txt").exists()
    shutil.rmtree(mine)
    assert set(event_reader(tracked.folder)) == {"base", "a_b_ c", PPS}
    del sweep.raw["runs"][1]
    tracked = Tracked(prepare(sweep, tensorboard={}), tracked.store)
    tracked.feed().settle()  # nothing is new, but one is too many
    assert set(event_reader(tracked.folder)) == {"base", "a_b_ c"}


def test_event_files_that_were_removed_are_written_again(sweep: TinySweep) -> None:
    tracked = finished(prepare(sweep, tensorboard={}))
    tracked.feed().settle()
    shutil.rmtree(tracked.folder / "tensorboard" / "none")
    tracked.feed().settle()
    assert event_curve(event_reader(tracked.folder)["none"], "final/trait") == {NUM_STEPS: 0.5}


def test_a_failed_run_says_why_in_tensorboard(sweep: TinySweep) -> None:
    tracked = finished(prepare(sweep, tensorboard={}), failed="none")
    feed = tracked.feed()
    feed.failed(tracked.run_ids["none"], "it diverged")
    feed.settle()
    reader = event_reader(tracked.folder)["none"]
    (event,) = reader.Tensors("failure/text_summary")
    assert event.tensor_proto.string_val == [b"it diverged"]


def test_folders_are_named_as_runs_are(sweep: TinySweep, tmp_path: Path) -> None:
    sweep.raw["runs"] = [
        {"label": label, "defense": "none", "seed": seed}
        for seed, label in enumerate(["a?b", "a*b", "..", "\N{GREEK SMALL LETTER LAMDA}" * 150])
    ]
    runs = tracked_runs(sweep.prepare().manifest)
    names = Place(tmp_path, "tiny", tuple(runs.values())).folder_names
    base, first, second, dots, long = names.values()
    assert (base, first, dots, long) == ("base", "a_b", "_", "\N{GREEK SMALL LETTER LAMDA}" * 100)
    assert second == f"a_b {list(runs)[2]}"


# --- W&B ---


def test_wandb_files_have_every_step_and_score(sweep: TinySweep) -> None:
    tracked = finished(prepare(sweep, wandb={"mode": "offline", "project": "defenses", "entity": "someone"}))
    tracked.feed().settle()
    assert tracked.said == []
    runs = offline_runs(tracked.folder)
    assert {run.name for run in runs.values()} == RUNS | {"base"}
    for label, run_id in tracked.run_ids.items():
        run = runs[f"tiny-{run_id}"]
        assert (run.name, run.group, run.project, run.exit_code) == (label, "tiny", "defenses", 0)
        for figure in FIGURES:
            assert run.curve(f"train/{figure}") == wanted_curve(training_rows(run_id), figure)
        assert run.summary["final/trait"] == 0.5
        assert run.config["train_id"] == run_id
        assert run.config["training.learning_rate"] == 0.01
    assert runs[f"tiny-{tracked.run_ids[PPS]}"].config["defense.coefficient"] == 1.5
    assert_key_is_nowhere(tracked.store.root.parent)


def test_wandb_files_of_a_killed_driver_are_replaced(sweep: TinySweep) -> None:
    tracked = finished(prepare(sweep, wandb={"mode": "offline"}))
    half_done(tracked, "none", 3)
    (half,) = offline_runs(tracked.folder).values()
    assert set(half.curve("train/loss")) == {1, 2, 3}
    assert half.exit_code == 255
    again = tracked.feed()
    again.steps(training_rows(tracked.run_ids["none"])[:4])
    again.settle()
    whole = offline_runs(tracked.folder)[half.run_id]
    assert whole.curve("train/loss") == wanted_curve(training_rows(tracked.run_ids["none"]), "loss")
    assert whole.exit_code == 0


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    with wandb_server() as served:
        monkeypatch.setenv("WANDB_BASE_URL", served.url)
        yield served


def test_wandb_goes_on_with_a_run_that_the_server_has(sweep: TinySweep, served: Served) -> None:
    tracked = finished(prepare(sweep, wandb={"project": "defenses"}))
    half_done(tracked, "none", 3)
    run = served.runs[f"tiny-{tracked.run_ids['none']}"]
    assert set(run.curve("train/loss")) == {1, 2, 3}
    assert run.exit_code == 255
    again = tracked.feed()
    again.steps(training_rows(tracked.run_ids["none"])[:4])
    again.settle()
    assert tracked.said == []
    assert len(served.runs) == 3
    for label, run_id in tracked.run_ids.items():
        run = served.runs[f"tiny-{run_id}"]
        assert (run.name, run.group, run.exit_code) == (label, "tiny", 0)
        assert run.curve("train/loss") == wanted_curve(training_rows(run_id), "loss")
        assert run.summary["final/trait"] == 0.5
    assert served.keys == {KEY}
    assert_key_is_nowhere(tracked.store.root.parent)


def test_wandb_marks_a_failed_run_and_takes_the_mark_back(sweep: TinySweep, served: Served) -> None:
    tracked = finished(prepare(sweep, wandb={}), failed="none")
    feed = tracked.feed()
    feed.steps(training_rows(tracked.run_ids["none"])[:2])
    feed.failed(tracked.run_ids["none"], "it diverged")
    feed.close(60)
    run = served.runs[f"tiny-{tracked.run_ids['none']}"]
    assert (run.summary["failure"], run.exit_code) == ("it diverged", 1)
    finished(tracked.prepared).feed().settle()
    assert run.exit_code == 0
    assert "failure" not in run.summary
    assert set(run.curve("train/loss")) == {1, 2, 3, 4, 5}


def test_a_wandb_server_that_is_out_of_order_is_said_once(sweep: TinySweep, served: Served) -> None:
    tracked = finished(prepare(sweep, wandb={}))
    served.is_broken = True
    feed = tracked.feed()
    feed.steps(training_rows(tracked.run_ids["none"]))
    feed.settle()
    first, last = tracked.said
    assert first.startswith("wandb failed at 'none' and is left out for now; the sweep goes on. CommError: ")
    assert "out of order" in first
    assert last == "wandb: 3 runs are not complete there; the next run of this sweep sends what is missing"
    served.is_broken = False
    tracked.feed().settle()
    assert len(tracked.said) == 2
    run = served.runs[f"tiny-{tracked.run_ids['none']}"]
    assert run.curve("train/loss") == wanted_curve(training_rows(tracked.run_ids["none"]), "loss")


# --- MLflow ---


def test_mlflow_has_every_step_and_score_once(sweep: TinySweep, database: Path) -> None:
    tracked = finished(prepare(sweep, mlflow={}))
    half_done(tracked, "none", 3)
    run = mlflow_runs(database, "tiny")["none"]
    assert set(mlflow_curve(database, run, "train/loss")) == {1, 2, 3}
    assert run.info.status == "KILLED"
    again = tracked.feed()
    again.steps(training_rows(tracked.run_ids["none"])[:4])
    again.settle()
    assert tracked.said == []
    runs = mlflow_runs(database, "tiny")
    assert set(runs) == RUNS | {"base"}
    for label, run_id in tracked.run_ids.items():
        run = runs[label]
        assert run.info.status == "FINISHED"
        assert (run.data.tags["train_id"], run.data.tags["sweep"]) == (run_id, "tiny")
        assert run.data.params["training.learning_rate"] == "0.01"
        for figure in FIGURES:
            assert mlflow_curve(database, run, f"train/{figure}") == wanted_curve(training_rows(run_id), figure)
        assert mlflow_curve(database, run, "final/trait") == {NUM_STEPS: 0.5}
    assert mlflow_curve(database, runs["base"], "final/plain_loss") == {0: 3.0}
    assert_key_is_nowhere(tracked.store.root.parent)


def test_mlflow_goes_by_identity_and_not_by_name(sweep: TinySweep, empty_database: Path) -> None:
    shutil.copy(empty_database, sweep.folder / "own.db")
    uri = f"sqlite:///{sweep.folder / 'own.db'}"
    finished(prepare(sweep, mlflow={"tracking_uri": uri, "experiment": "mine"})).feed().settle()
    sweep.raw["runs"][0]["label"] = "undefended"
    sweep.raw["evaluation"]["samples"] = 3
    tracked = finished(sweep.prepare())
    tracked.feed().settle()
    assert tracked.said == []
    runs = mlflow_runs(sweep.folder / "own.db", "mine")
    assert set(runs) == (RUNS - {"none"}) | {"undefended", "base"}
    run = runs["undefended"]
    assert run.data.params["evaluation.samples"] == "2"
    assert run.data.tags["changed.evaluation.samples"] == "3"
    assert run.data.metrics["final/num_answers"] == 12


def test_mlflow_marks_a_failed_run_and_takes_the_mark_back(sweep: TinySweep, database: Path) -> None:
    tracked = finished(prepare(sweep, mlflow={}), failed="none")
    feed = tracked.feed()
    feed.steps(training_rows(tracked.run_ids["none"])[:2])
    feed.failed(tracked.run_ids["none"], "it diverged")
    feed.close(60)
    run = mlflow_runs(database, "tiny")["none"]
    assert (run.info.status, run.data.tags["failure"]) == ("FAILED", "it diverged")
    finished(tracked.prepared).feed().settle()
    run = mlflow_runs(database, "tiny")["none"]
    assert run.info.status == "FINISHED"
    assert "failure" not in run.data.tags


def test_long_curves_and_values_go_in_parts(sweep: TinySweep, database: Path) -> None:
    sweep.raw["runs"] = [{"defense": {"kind": "inoculation", "prompts": ["Talk. " * 1200, "Talk!"]}}]
    tracked = finished(prepare(sweep, mlflow={}, tensorboard={}, wandb={"mode": "offline"}))
    ((label, run_id),) = tracked.run_ids.items()
    rows = training_rows(run_id, 700)
    tracked.store.publish_table("training", run_id, rows)
    tracked.feed().settle()
    assert tracked.said == []
    run = mlflow_runs(database, "tiny")[label]
    assert mlflow_curve(database, run, "train/loss") == wanted_curve(rows, "loss")
    assert offline_runs(tracked.folder)[f"tiny-{run_id}"].curve("train/loss") == wanted_curve(rows, "loss")
    assert set(event_curve(event_reader(tracked.folder)[label], "train/loss")) == set(range(1, 701))
