"""Reading a sweep: a small store made by hand, with a base, a done run, a failed one, a skipped and a missing one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import analysis
from analysis.manifest import Manifest, RunEntry
from analysis.results import READERS, Results
from analysis.rows import LossRow, ScoreRow
from analysis.statistics import clustered_mean, ratio
from analysis.summary_columns import repeated_columns
from analysis.tables import TABLES, table_key, to_parquet_bytes
from trainables.errors import ConfigError, StoreError
from trainables.rows import GenerationRow, TrainingRow

BASE, DONE, FAILED, SKIPPED, MISSING = "base", "none, seed 0", "pps", "child", "inoculation"
TASKS = ["train", "sample", "judge", "loss"]
LABELS = [DONE, BASE, FAILED, SKIPPED, MISSING]
RECORD = {
    "status": "done",
    "seconds_training": 12.5,
    "num_steps": 18,
    "num_tokens": 9000,
    "train_loss_last_epoch": 2.25,
    "started_utc": "2030-01-01T00:00:00Z",
    "finished_utc": "2030-01-01T00:00:12Z",
    "versions": {"torch": "2"},
}


def task_id(what: str, label: str) -> str:
    return f"{TASKS.index(what)}{LABELS.index(label)}".ljust(12, "0")


def entry(label: str, **changes: Any) -> RunEntry:
    values: dict[str, Any] = {
        "label": label,
        "kind": "base" if label == BASE else "run",
        "run_id": task_id("train", label),
        "sample_id": task_id("sample", label),
        "judge_ids": {"trait": task_id("judge", label)},
        "plain_loss_id": task_id("loss", label),
        "config": {} if label == BASE else {"defense": label, "training.learning_rate": 1e-3, "seed": 0},
    }
    return RunEntry(**values | changes)


def rows_of(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """The rows by the label of their run."""
    return {row["run"]: {str(name): value for name, value in row.items()} for row in frame.to_dict("records")}


def write(root: Path, key: str, content: bytes | Any) -> None:
    path = root / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def write_table(root: Path, table: str, identity: str, rows: list[Any]) -> None:
    write(root, table_key(table, identity), to_parquet_bytes(table, rows))


def write_answers(root: Path, label: str, answers: list[tuple[str, int]]) -> None:
    rows = [
        GenerationRow(
            sample_id=task_id("sample", label),
            question_id=question,
            sample_index=index,
            question=f"Question {question}?",
            system_prompt=None,
            answer=f"{label} {question} {index}",
            num_tokens=3,
            finish_reason="stop",
        )
        for question, index in answers
    ]
    write_table(root, "generations", task_id("sample", label), rows)


def write_scores(root: Path, label: str, scores: list[tuple[str, int, float | None, str]]) -> None:
    rows = [
        ScoreRow(
            judge_id=task_id("judge", label),
            sample_id=task_id("sample", label),
            question_id=question,
            sample_index=index,
            value=value,
            status=status,
            judge="rule",
            reply=None,
        )
        for question, index, value, status in scores
    ]
    write_table(root, "scores", task_id("judge", label), rows)


def write_losses(root: Path, label: str, losses: list[tuple[str, float, int]]) -> None:
    rows = [
        LossRow(
            measure_id=task_id("loss", label),
            row=index,
            condition=condition,
            num_tokens=tokens,
            loss_sum=total,
            loss_mean=total / tokens,
        )
        for index, (condition, total, tokens) in enumerate(losses)
    ]
    write_table(root, "losses", task_id("loss", label), rows)


def write_manifest(root: Path, *entries: RunEntry) -> Path:
    manifest = Manifest(name="small", runs=entries, vectors={"bridge": "abcdef012345"})
    write(root, "sweeps/small/manifest.json", manifest.model_dump(mode="json"))
    return root / "sweeps" / "small"


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """The base and one run are done; one run's training failed, one was skipped, one was not reached."""
    root = tmp_path
    write_answers(root, DONE, [("q1", 0), ("q1", 1), ("q2", 0), ("q2", 1), ("q3", 0)])
    write_scores(
        root,
        DONE,
        [("q1", 0, 1.0, "ok"), ("q1", 1, 1.0, "ok"), ("q2", 0, 0.0, "ok"), ("q2", 1, None, "refused")],
    )
    write_losses(root, DONE, [("none", 4.0, 2), ("none", 2.0, 4), ("steered", 99.0, 1)])
    write(root, f"runs/{task_id('train', DONE)}/run.json", RECORD)
    step: dict[str, Any] = {
        "gradient_norm": 1.0,
        "learning_rate": 1e-3,
        "num_tokens": 10,
        "num_loss_tokens": 5,
        "seconds": 0.5,
    }
    rows = [TrainingRow(train_id=task_id("train", DONE), step=n, epoch=n / 2, loss=3.0 / n, **step) for n in (1, 2)]
    write_table(root, "training", task_id("train", DONE), rows)
    write_answers(root, BASE, [("q1", 0), ("q2", 0)])
    write_scores(root, BASE, [("q1", 0, 0.0, "ok"), ("q2", 0, 0.0, "ok")])
    write_losses(root, BASE, [("none", 3.0, 3), ("none", 3.0, 3)])
    failures = {
        task_id("train", FAILED): {"kind": "error", "reason": "loss is not finite at step 3", "log_tail": ["a", "b"]},
        task_id("sample", FAILED): {"kind": "skipped", "reason": "its training failed", "log_tail": []},
        task_id("train", SKIPPED): {"kind": "skipped", "reason": "its parent failed", "log_tail": []},
        task_id("sample", DONE): {"kind": "error", "reason": "long ago", "log_tail": []},
        "abcdef012345": {"kind": "error", "reason": "no such file", "log_tail": []},
        "ffffffffffff": {"kind": "error", "reason": "of a dropped run", "log_tail": []},
    }
    write(root, "sweeps/small/failures.json", failures)
    return write_manifest(root, *(entry(label) for label in LABELS))


def test_the_summary_has_every_row_and_the_base_first(sweep: Path) -> None:
    summary = analysis.load(sweep).summary()
    assert summary["run"].tolist() == [BASE, DONE, FAILED, SKIPPED, MISSING]
    assert summary["kind"].tolist() == ["base", "run", "run", "run", "run"]
    assert summary["status"].tolist() == ["done", "done", "failed", "skipped", "missing"]
    assert summary.columns.tolist() == [
        "run",
        "kind",
        "status",
        "trait",
        "trait_se",
        "trait_low",
        "trait_high",
        "trait_num_scored",
        "trait_num_missing",
        "trait_missing_by_status",
        "trait_vs_undefended",
        "trait_vs_undefended_se",
        "trait_vs_undefended_low",
        "trait_vs_undefended_high",
        "trait_vs_undefended_num_questions",
        "plain_loss",
        "plain_loss_se",
        "plain_loss_low",
        "plain_loss_high",
        "plain_loss_vs_undefended",
        "plain_loss_vs_undefended_se",
        "plain_loss_vs_undefended_low",
        "plain_loss_vs_undefended_high",
        "plain_loss_vs_undefended_num_rows",
        "train_loss",
        "num_answers",
        "undefended",
        "undefended_problem",
    ]


def test_the_summary_counts_what_its_means_rest_on(sweep: Path) -> None:
    row = rows_of(analysis.load(sweep).summary())[DONE]
    # values 1, 1 | 0: residuals 1/3, 1/3 | -2/3, cluster sums 2/3 and -2/3, sqrt(2 * 8/9) / 3
    assert row["trait"] == pytest.approx(2 / 3)
    assert row["trait_se"] == pytest.approx(4 / 9)
    assert (row["trait_num_scored"], row["trait_num_missing"], row["num_answers"]) == (3, 2, 5)
    assert row["trait_missing_by_status"] == {"refused": 1, "not_judged": 1}
    # the steered row is not a plain loss: 6 nats over 6 tokens, residuals 2 and -2, sqrt(2 * 8) / 6
    assert row["plain_loss"] == pytest.approx(1.0)
    assert row["plain_loss_se"] == pytest.approx(2 / 3)
    assert row["train_loss"] == 2.25
    rate = clustered_mean([1, 1, 0], ["q1", "q1", "q2"], bounds=(0, 1))
    assert (row["trait_low"], row["trait_high"]) == (rate.low, rate.high)
    loss = ratio([4, 2], [2, 4])
    assert (row["plain_loss_low"], row["plain_loss_high"]) == (loss.low, loss.high)


def test_the_base_has_a_rate_of_zero_and_no_training(sweep: Path) -> None:
    row = rows_of(analysis.load(sweep).summary())[BASE]
    assert (row["trait"], row["trait_se"], row["trait_num_missing"]) == (0.0, 0.0, 0)
    # two questions without the behavior say next to nothing
    assert (row["trait_low"], row["trait_high"]) == pytest.approx((0.0, 1 - 0.025**0.5))
    assert row["undefended_problem"] == "a base is not trained"
    assert row["trait_missing_by_status"] == {}
    assert row["plain_loss"] == 1.0
    assert math.isnan(row["train_loss"])


@pytest.mark.parametrize("label", [FAILED, SKIPPED, MISSING])
def test_a_run_without_results_has_no_number_at_all(sweep: Path, label: str) -> None:
    row = rows_of(analysis.load(sweep).summary())[label]
    assert row.pop("trait_missing_by_status") == {}
    assert row.pop("undefended_problem") == "the sweep has no undefended run"
    given = {name for name, value in row.items() if not pd.isna(value)}
    assert given == {"run", "kind", "status"}


def test_a_metric_whose_judgements_are_all_missing_is_nan_not_zero(tmp_path: Path) -> None:
    write_answers(tmp_path, DONE, [("q1", 0), ("q2", 0)])
    sweep = write_manifest(tmp_path, entry(DONE))
    row = rows_of(analysis.load(sweep).summary())[DONE]
    assert math.isnan(row["trait"])
    assert (row["trait_num_scored"], row["trait_num_missing"]) == (0, 2)
    assert row["trait_missing_by_status"] == {"not_judged": 2}
    write_scores(tmp_path, DONE, [("q1", 0, None, "refused"), ("q2", 0, 1.0, "low_mass")])
    row = rows_of(analysis.load(sweep).summary())[DONE]
    assert math.isnan(row["trait"])
    assert row["trait_missing_by_status"] == {"refused": 1, "low_mass": 1}


def test_a_metric_that_is_not_asked_of_a_run_is_not_missing_there(tmp_path: Path) -> None:
    write_answers(tmp_path, DONE, [("q1", 0)])
    write_answers(tmp_path, FAILED, [("q1", 0)])
    write_scores(tmp_path, FAILED, [("q1", 0, 1.0, "ok")])
    sweep = write_manifest(tmp_path, entry(DONE, judge_ids={}), entry(FAILED))
    summary = rows_of(analysis.load(sweep).summary())
    assert pd.isna(summary[DONE]["trait_num_missing"])
    assert summary[FAILED]["trait_num_missing"] == 0


def test_a_metric_cannot_take_a_column_of_the_summary(tmp_path: Path) -> None:
    assert repeated_columns(["trait", "degeneration"]) == []
    assert repeated_columns(["status", "trait", "trait_se"]) == ["status", "trait_se"]
    assert repeated_columns(["varies", "trait", "trait_vs_undefended_low"]) == ["trait_vs_undefended_low", "varies"]
    sweep = write_manifest(tmp_path, entry(DONE, judge_ids={"status": "0" * 12}))
    with pytest.raises(StoreError, match="column status twice"):
        analysis.load(sweep).summary()


def test_the_summary_by_groups_reads_the_same_store(sweep: Path) -> None:
    results = analysis.load(sweep)
    grouped = results.summary(by=["training.learning_rate"])
    assert grouped["kind"].tolist() == ["base", "run"]
    (row,) = grouped[grouped["kind"] == "run"].to_dict("records")
    assert (row["num_runs"], row["num_runs_missing"], row["trait_num_runs"]) == (4, 3, 1)
    assert row["runs_missing_by_status"] == {"failed": 1, "skipped": 1, "missing": 1}
    assert row["trait"] == pytest.approx(2 / 3)
    assert row["varies"] == "defense"
    assert results.summary(by="defense")["defense"].tolist()[1:] == [DONE, FAILED, SKIPPED, MISSING]
    assert not results.has_several_seeds()
    assert results.over_seeds()["run"].tolist() == [BASE, DONE, FAILED, SKIPPED, MISSING]
    with pytest.raises(ConfigError, match=r"did you mean seed\? allowed: defense, training\.learning_rate, seed"):
        results.summary(by="seeds")


def test_runs_has_status_config_and_timings(sweep: Path) -> None:
    runs = rows_of(analysis.load(sweep).runs())
    assert list(runs) == LABELS
    assert [row["status"] for row in runs.values()] == ["done", "done", "failed", "skipped", "missing"]
    assert runs[FAILED]["reason"] == "loss is not finite at step 3"
    assert runs[FAILED]["log_tail"] == "a\nb"
    assert pd.isna(runs[SKIPPED]["log_tail"])
    assert runs[SKIPPED]["reason"] == "its parent failed"
    assert pd.isna(runs[DONE]["reason"])
    assert runs[DONE]["training.learning_rate"] == 1e-3
    assert pd.isna(runs[BASE]["defense"])
    assert (runs[DONE]["num_steps"], runs[DONE]["seconds_training"]) == (18, 12.5)
    assert pd.isna(runs[MISSING]["num_steps"])


def test_a_config_field_named_like_a_fixed_column_does_not_replace_it(tmp_path: Path) -> None:
    sweep = write_manifest(tmp_path, entry(DONE, config={"status": "mine", "a": True}))
    row = rows_of(analysis.load(sweep).runs())[DONE]
    assert (row["status"], row["config.status"], row["a"]) == ("missing", "mine", True)


def test_a_run_is_done_only_with_every_output(sweep: Path) -> None:
    root = sweep.parent.parent
    for what, table in {"sample": "generations", "judge": "scores", "loss": "losses"}.items():
        file = root / table_key(table, task_id(what, DONE))
        content = file.read_bytes()
        file.unlink()
        status = analysis.load(sweep).runs().set_index("run")["status"]
        # the failure of the sampling task counts again as soon as its output is not there
        assert status[DONE] == ("failed" if what == "sample" else "missing")
        file.write_bytes(content)
    assert analysis.load(sweep).runs().set_index("run").at[DONE, "status"] == "done"


def test_tables_name_their_run(sweep: Path) -> None:
    results = analysis.load(str(sweep) + "/")
    generations = results.generations()
    assert generations["run"].tolist() == [DONE] * 5 + [BASE] * 2
    assert generations["run_id"].tolist() == [task_id("train", DONE)] * 5 + [task_id("train", BASE)] * 2
    training = results.training()
    assert training[["run", "step", "loss"]].to_numpy().tolist() == [[DONE, 1, 3.0], [DONE, 2, 1.5]]
    losses = results.losses()
    assert losses["data"].unique().tolist() == ["plain"]
    assert losses.loc[losses["run"] == DONE, "loss_sum"].tolist() == [4.0, 2.0, 99.0]


def test_scores_stand_beside_the_answers_that_they_judge(sweep: Path) -> None:
    scores = analysis.load(sweep).scores()
    assert scores["metric"].unique().tolist() == ["trait"]
    (refused,) = scores[scores["status"] == "refused"].to_dict("records")
    assert (refused["question"], refused["answer"]) == ("Question q2?", f"{DONE} q2 1")
    assert math.isnan(refused["value"])
    base = scores[scores["run"] == BASE]
    assert base["answer"].tolist() == ["base q1 0", "base q2 0"]


def test_failures_say_what_is_still_missing(sweep: Path) -> None:
    failures = analysis.load(sweep).failures()
    found = failures[["run", "task", "kind", "reason"]].astype(object).where(failures.notna(), None)
    assert found.to_numpy().tolist() == [
        [FAILED, "train", "error", "loss is not finite at step 3"],
        [FAILED, "sample", "skipped", "its training failed"],
        [SKIPPED, "train", "skipped", "its parent failed"],
        [None, "vector bridge", "error", "no such file"],
        [None, None, "error", "of a dropped run"],
    ]
    assert failures["log_tail"].iloc[0] == "a\nb"


def test_nothing_done_yet_is_valid_and_has_the_columns(sweep: Path, tmp_path: Path) -> None:
    full = analysis.load(sweep)
    fresh = analysis.load(write_manifest(tmp_path / "fresh", *(entry(label) for label in LABELS)))
    for name in READERS:
        empty = fresh.table(name)
        assert empty.columns.tolist() == full.table(name).columns.tolist(), name
        if name in TABLES or name == "failures":
            assert len(empty) == 0
            assert empty.dtypes.tolist() == full.table(name).dtypes.tolist(), name
    assert fresh.summary()["status"].tolist() == ["missing"] * 5
    assert len(analysis.load(write_manifest(tmp_path / "none")).summary()) == 0


def test_a_table_that_is_none_lists_those_that_are(sweep: Path) -> None:
    results = analysis.load(sweep)
    assert len(results.table("runs")) == 5
    with pytest.raises(ConfigError, match=r"no table 'score'; allowed: summary, runs, training, .*scores"):
        results.table("score")


def test_a_path_that_is_no_sweep_says_what_there_is(sweep: Path, tmp_path: Path) -> None:
    root = sweep.parent.parent
    for path in (root, root / "sweeps", root / "sweeps" / "smal"):
        with pytest.raises(StoreError, match="there are: small"):
            analysis.load(path)
    with pytest.raises(StoreError, match="no such folder"):
        analysis.load(tmp_path / "nowhere" / "sweeps" / "small")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="not a sweep's folder"):
        analysis.load(tmp_path / "empty")


def test_a_manifest_that_is_not_ours_is_refused_by_name(sweep: Path) -> None:
    file = sweep / "manifest.json"
    content = json.loads(file.read_text())
    for changed, message in (
        (content | {"format": 2}, "format 2; this version"),
        (content | {"runs": [*content["runs"], content["runs"][0]]}, f"repeated: {DONE}"),
        (content | {"extra": 1}, "extra: Extra inputs"),
    ):
        file.write_text(json.dumps(changed))
        with pytest.raises(StoreError, match=message) as caught:
            analysis.load(sweep)
        assert str(file) in str(caught.value)
    file.write_text("{")
    with pytest.raises(StoreError, match=r"manifest\.json: not a JSON file"):
        analysis.load(sweep)


def test_a_run_record_that_is_not_ours_is_refused_by_name(sweep: Path) -> None:
    file = sweep.parent.parent / "runs" / task_id("train", DONE) / "run.json"
    file.write_text(json.dumps({key: value for key, value in RECORD.items() if key != "num_steps"}))
    with pytest.raises(StoreError, match=r"run\.json: .*num_steps: Field required"):
        analysis.load(sweep).summary()


def test_a_sweep_is_found_from_inside_its_folder(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sweep)
    results = analysis.load(".")
    assert isinstance(results, Results)
    assert len(results.summary()) == 5
