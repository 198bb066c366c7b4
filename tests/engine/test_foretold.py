"""Predictions beside what runs then showed: in tables, in the report and on the terminal. Without Ray."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from analysis.cross_trait import cross_trait
from analysis.foretold import foretold, how_it_held, ranking, runs_of
from analysis.measured_rows import GradientRow, PredictionRow
from analysis.report import write_report
from analysis.results import Results, load
from analysis.rows import LossRow, ScoreRow
from analysis.steering_strength import scores_by_coefficient
from engine.predict_view import predict_view
from tests.engine.finished import write_finished
from tests.engine.test_measure_work import CANDIDATES, PREDICTION
from tests.engine.tiny_prepare import TinySweep, tiny_model_folder


@pytest.fixture
def foreseen(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Candidates on two data sets with their runs, on the second of one vector alone. Shifts and scores are made up:
    every run scores 0.5 but for one, which scores 0."""
    sweep = TinySweep(tmp_path / "a sweep", tiny_model_folder(tmp_path_factory))
    other = {"data": {"train": "data/negative.jsonl"}}
    sweep.raw["runs"] = [{"defense": "none"}, {"defense": CANDIDATES}, {"defense": "none"} | other]
    sweep.raw["runs"].append({"defense": {**CANDIDATES, "vector": "topic"}} | other)
    prediction = PREDICTION | {"candidates": [CANDIDATES]}
    sweep.raw["measure"] = {"first": prediction, "second": prediction | {"data": "data/negative.jsonl"}}
    prepared = sweep.prepare()
    store = write_finished(prepared)
    for entry, sign in zip(prepared.manifest.measurements, (1, -1), strict=True):
        assert entry.merge_id is not None
        labels = {label: key for key, label in entry.names.items()}
        rows = [
            PredictionRow(
                measure_id=entry.merge_id,
                condition=labels[label],
                layer=layer,
                vector=labels["topic"],
                num_rows=4,
                cosine_without=-0.1,
                cosine_with=sign * shift - 0.1,
                shift=sign * shift,
                shift_error=0.01,
                flipped_share=0.5,
                loss_without=3.0,
                loss_with=2.0,
                loss_gap=1.0,
                projection_difference=None,
            )
            for label, shift in SHIFTS.items()
            for layer in (2, 4)
        ]
        store.publish_table("predictions", entry.merge_id, rows)
        for number, shard in enumerate(entry.shard_ids):
            read = [(key, row) for key in ("none", *(labels[name] for name in SHIFTS)) for row in (number, number + 2)]
            cosines = [
                GradientRow(
                    measure_id=shard,
                    row=row,
                    condition=key,
                    layer=layer,
                    vector=labels["topic"],
                    num_tokens=5,
                    cosine=-0.1,
                    positive_share=0.0,
                    gradient_norm=1.0,
                )
                for key, row in read
                for layer in (2, 4)
            ]
            store.publish_table("gradients", shard, cosines)
            nats = [
                LossRow(measure_id=shard, row=r, condition=c, num_tokens=5, loss_sum=5, loss_mean=1) for c, r in read
            ]
            store.publish_table("losses", shard, nats)
    wanted = {"defense": "pps topic L2 x1.5", "data.train": "data/train.jsonl"}
    (defended,) = (run for run in prepared.manifest.runs if wanted.items() <= run.config.items())
    judge_id = defended.judge_ids["trait"]
    scores = store.read_table("scores", judge_id).to_pylist()
    store.publish_table("scores", judge_id, [ScoreRow(**{**score, "value": 0.0}) for score in scores])
    return load(store.path("sweeps/tiny/manifest.json").parent)


SHIFTS = dict(
    zip([f"pps {v} L2 x{c}" for v in ("topic", "random") for c in (0.5, 1.5)], (0.2, 0.3, -0.1, 0.1), strict=True)
)


def test_predictions_stand_beside_what_runs_showed(foreseen: Results) -> None:
    """A run on other data is no outcome of a candidate, and neither is one that starts from another base."""
    frame = foretold(foreseen)
    first = frame[frame["measurement"] == "first"]
    assert len(first) == 8
    assert not first["trained"].str.contains("negative").any()
    assert set(first["metric"]) == {"trait"}, "none is named, and degeneration is no trait"
    assert first.groupby("condition")["outcome"].first().to_dict() == dict.fromkeys(SHIFTS, 0.0) | {
        "pps topic L2 x1.5": 0.5
    }
    ranked = ranking(frame)
    assert list(ranked["condition"])[:4] == sorted(SHIFTS, key=lambda label: -SHIFTS[label])
    held = how_it_held(frame)
    assert list(held["num_candidates"])[:3] == [6, 6, 6]
    seeds = pd.concat([frame, frame.assign(trained=frame["trained"] + " seed=1")])
    pd.testing.assert_frame_equal(how_it_held(seeds), held)  # seeds are no further candidates
    entry = foreseen.manifest.measurements[0]
    assert len(runs_of(foreseen.manifest, entry, "none")) == 1
    going_on = [
        run.model_copy(update={"config": {**run.config, "start_from.run": "x"}}) for run in foreseen.manifest.runs[1:]
    ]
    continued = foreseen.manifest.model_copy(update={"runs": (foreseen.manifest.runs[0], *going_on)})
    assert runs_of(continued, entry, "none") == []
    base, *runs = foreseen.manifest.runs
    another = base.model_copy(update={"config": {**base.config, "base.model": "another"}})
    assert runs_of(foreseen.manifest.model_copy(update={"runs": (another, *runs)}), entry, "none") == []


@pytest.mark.usefixtures("without_drawing")
def test_across_traits_every_candidate_stands_on_every_data(foreseen: Results, tmp_path: Path) -> None:
    table = cross_trait(foretold(foreseen), layer=4)
    shifts = table.pivot_table(index="candidate", columns="measurement", values="shift", sort=False)
    assert shifts["first"].to_dict() == pytest.approx({"none": 0.0} | SHIFTS)
    assert shifts["second"].to_dict() == pytest.approx(
        {"none": 0.0} | {label: -shift for label, shift in SHIFTS.items()}
    )
    scores = table.set_index(["candidate", "measurement"])["score"]
    assert scores.dropna().to_dict() == {
        ("none", "first"): 0.5,
        ("none", "second"): 0.5,
        ("pps topic L2 x0.5", "first"): 0.5,
        ("pps topic L2 x0.5", "second"): 0.5,
        ("pps topic L2 x1.5", "first"): 0.0,
        ("pps topic L2 x1.5", "second"): 0.5,
        ("pps random L2 x0.5", "first"): 0.5,
        ("pps random L2 x1.5", "first"): 0.5,
    }
    one = foretold(foreseen).query("measurement == 'first'")
    assert cross_trait(one).empty, "all of one data"
    of_a_run = foretold(foreseen).assign(run="a run", shift=9.0)
    both = pd.concat([foretold(foreseen), of_a_run])
    assert list(dict.fromkeys(cross_trait(both)["measurement"])) == [
        "first",
        "first of a run",
        "second",
        "second of a run",
    ]
    assert set(ranking(both).query("run == 'a run'")["shift"]) == {9.0}, "models are not averaged"

    entry = foreseen.manifest.measurements[0]
    of_topic = scores_by_coefficient(foreseen, entry).query("series == 'pps topic L2'")
    assert of_topic[["coefficient", "value"]].to_numpy().tolist() == [[0, 0.5], [0.5, 0.5], [1.5, 0]]
    page = write_report(foreseen, tmp_path / "report").read_text()
    for title in (
        "Loss and cosine over coefficients and what runs with them scored",
        "Across traits: the cosine over layers",
        "Across traits: foreseen and found",
        "How well the predictions held",
    ):
        assert title in page
    assert (tmp_path / "report" / "cross_trait_matrix.pdf").exists()

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(predict_view(foretold(foreseen), foreseen.manifest.runs))
    text = console.export_text()
    assert "across traits" in text
    assert "how well the scores foretold" in text
    assert "train=" not in text, "the title says which data it is"


def test_predictions_of_two_models_under_one_name_keep_their_own_outcomes(foreseen: Results, tmp_path: Path) -> None:
    shutil.copytree(foreseen.root, tmp_path / "store")
    file = tmp_path / "store" / "sweeps" / "tiny" / "manifest.json"
    manifest = foreseen.manifest
    run = next(entry for entry in manifest.runs if entry.kind == "run")
    of_run = manifest.measurements[0].model_copy(update={"run": run.label, "run_id": run.run_id, "merge_id": None})
    for measurements in ((*manifest.measurements, of_run), (of_run, *manifest.measurements)):
        file.write_text(manifest.model_copy(update={"measurements": measurements}).model_dump_json(), encoding="utf-8")
        pd.testing.assert_frame_equal(foretold(load(file.parent)), foretold(foreseen))
