"""Tables for a terminal: what they say, also at 80 columns and with text that looks like markup."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console, RenderableType

from analysis.results import Results, load
from engine.graph import Cost
from engine.prepare import Prepared
from engine.show import failures_table, frame_table, plan_table, total_cost
from engine.tasks import RunJob
from tests.engine.finished import ANSWER, write_finished
from tests.engine.tiny_prepare import TinySweep, tiny_model_folder

FAILED = "inoculation topic"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory)


@pytest.fixture
def sweep(tmp_path: Path, model: Path) -> TinySweep:
    return TinySweep(tmp_path / "sweep", model)


def _lines(what: RenderableType, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(what)
    return [line.rstrip() for line in console.export_text().splitlines()]


def _finished(prepared: Prepared, failed: str | None = None) -> Results:
    store = write_finished(prepared, failed=failed)
    return load(store.root / "sweeps" / prepared.sweep.name)


def _row(lines: list[str], beginning: str) -> list[str]:
    (line,) = [line for line in lines if line.startswith(beginning)]
    return line.removeprefix(beginning).split()


class TestPlan:
    @pytest.mark.parametrize("width", [80, 200])
    def test_a_line_per_job_with_whole_ids(self, sweep: TinySweep, width: int) -> None:
        prepared = sweep.prepare()
        lines = _lines(plan_table(prepared), width)
        assert lines[0] == "tiny: 7 jobs, 4 side by side on cpu"
        for name, vector_id in prepared.manifest.vectors.items():
            assert _row(lines, f"vector {name} ") == [vector_id, "no"]
        tokens = f"{prepared.costs['none'].num_training_tokens:,}"
        for entry in prepared.manifest.runs:
            numbers = ["0", "0", "8", "16"] if entry.kind == "base" else ["2", tokens, "8", "16"]
            assert _row(lines, f"{entry.label} ") == [entry.run_id, "no", *numbers]
        assert _row(lines, "all ")[0] == "8"
        assert _row(lines, "all ")[2:] == ["40", "80"]

    def test_what_is_done(self, sweep: TinySweep) -> None:
        prepared = sweep.prepare()
        assert not Path(prepared.sweep.results).exists()
        plan_table(prepared)
        assert not Path(prepared.sweep.results).exists(), "a plan touches nothing"
        store = write_finished(prepared, failed=FAILED)
        lines = _lines(plan_table(prepared))
        assert _row(lines, "vector topic ")[1] == "yes"
        assert _row(lines, "none ")[1] == "yes"
        assert _row(lines, f"{FAILED} ")[1] == "no"
        entry = next(entry for entry in prepared.manifest.runs if entry.label == "none")
        store.remove(f"tables/scores/{entry.judge_ids['trait']}.parquet")
        assert _row(_lines(plan_table(prepared)), "none ")[1] == "no", "its answers are not judged"

    def test_what_is_shared_is_counted_once(self, sweep: TinySweep) -> None:
        trait = sweep.raw["evaluation"]["metrics"]["trait"]
        sweep.raw["runs"] = [
            {"defense": "none"},
            {"defense": "none", "evaluation": {"temperature": 0.5}},
            {"defense": "none", "evaluation": {"metrics": {"other": {**trait, "trait": None, "patterns": ["x"]}}}},
        ]
        prepared = sweep.prepare()
        one = next(cost for cost in prepared.costs.values() if cost.num_steps)
        total = total_cost(prepared)
        # one training; the base and the run are each asked at two temperatures; the third metric is judged once more
        assert (total.num_steps, total.num_training_tokens) == (2, one.num_training_tokens)
        assert total.num_answers == 2 * 2 * 8
        assert total.num_judgements == 2 * (2 * 2 * 8 + 8)

    def test_a_sum_over_different_runs(self, sweep: TinySweep) -> None:
        prepared = sweep.prepare()
        costs = [prepared.costs[entry.label] for entry in prepared.manifest.runs]
        assert total_cost(prepared) == Cost(
            *(
                sum(getattr(cost, name) for cost in costs)
                for name in ("num_steps", "num_training_tokens", "num_answers", "num_judgements")
            )
        )

    def test_labels_are_no_markup(self, sweep: TinySweep) -> None:
        sweep.raw["runs"] = [{"defense": "none", "label": "[bold]x[/bold] [/nope] :smile:"}]
        assert any(
            line.startswith("[bold]x[/bold] [/nope] :smile:") for line in _lines(plan_table(sweep.prepare()), 120)
        )


class TestFrames:
    def test_as_a_table_where_it_fits(self) -> None:
        frame = pd.DataFrame({"run": ["none", "pps"], "loss": [1.23456, float("nan")], "count": [3, pd.NA]})
        lines = _lines(frame_table(frame, "training"))
        assert lines[0] == "training: 2 rows"
        assert [line.split() for line in lines[1:2] + lines[3:]] == [
            ["run", "loss", "count"],
            ["none", "1.235", "3"],
            ["pps", "-", "-"],
        ]

    def test_row_by_row_where_it_is_too_wide(self) -> None:
        frame = pd.DataFrame({f"column_{index}": ["a value of some length", "b"] for index in range(8)})
        lines = _lines(frame_table(frame, "runs"))
        assert lines[:4] == ["runs: 2 rows", "", "row 1", "column_0  a value of some length"]
        assert lines.count("column_7  b") == 1
        assert _lines(frame_table(frame, "runs"), 300)[1].split() == [f"column_{index}" for index in range(8)]

    def test_text_is_shown_as_it_is(self, sweep: TinySweep) -> None:
        results = _finished(sweep.prepare())
        for width in (80, 250):
            assert any(ANSWER in line for line in _lines(frame_table(results.generations(), "generations"), width))

    def test_without_rows_or_columns(self) -> None:
        assert _lines(frame_table(pd.DataFrame({"run": [], "kind": []}), "failures"))[0] == "failures: 0 rows"
        assert _lines(frame_table(pd.DataFrame(), "nothing"))[0] == "nothing: 0 rows"

    def test_failures_say_which_run_and_why(self, sweep: TinySweep) -> None:
        prepared = sweep.prepare()
        results = _finished(prepared, FAILED)
        lines = _lines(failures_table(results))
        (job,) = [job for job in prepared.jobs.values() if isinstance(job, RunJob) and job.label == FAILED]
        text = "\n".join(lines)
        assert lines[0] == "failures: 1 row"
        assert job.id in text
        assert "TrainingError: run x, step 2: the loss is [nan]" in text
        assert "step [2]" in text


def test_a_title_is_no_markup() -> None:
    assert _lines(frame_table(pd.DataFrame({"[b]": ["[/b]"]}), "[i]x"))[0] == "[i]x: 1 row"
