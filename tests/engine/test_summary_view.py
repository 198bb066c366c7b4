"""The summary in a terminal of 80 columns: runs, seeds, groups, differences, and what to beware of."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console, RenderableType

from analysis.manifest import Manifest, Scalar
from analysis.quantities import Measured
from analysis.results import Results, load
from engine.summary_view import ONE_SEED, summary_table, summary_view
from tests.analysis.in_memory import Answers, Run, sweep
from tests.engine.finished import write_finished
from tests.engine.tiny_prepare import TinySweep, tiny_model_folder

FAILED = "inoculation topic"
LOSSES = {0: (4.0, 2), 1: (6.0, 4), 2: (9.0, 3)}
NOTHING: dict[str, Scalar] = {}
PPS: dict[str, Scalar] = {"kind": "pps", "vector": "topic"}


@dataclass(frozen=True, repr=False)
class InMemory(Results):
    """Results whose tables were written down in a test."""

    found: Measured = field(kw_only=True)

    def _measured(self) -> Measured:
        return self.found


def results_of(*runs: Run, metrics: tuple[str, ...] = ("trait",)) -> Results:
    found = sweep(*runs, metrics=metrics)
    return InMemory(Path("nowhere"), Manifest(name="small", runs=found.entries, vectors={}), "small", found=found)


def answers(seed: int, rate: float) -> Answers:
    rng = np.random.default_rng(seed)
    return {f"q{number}": rng.binomial(1, rate, 2).astype(float).tolist() for number in range(12)}


def seeded(num_seeds: int, metrics: tuple[str, ...] = ("trait",)) -> list[Run]:
    """A base and two kinds of runs, with `` seed=0`` in their labels if there are several."""
    base = Run("base", {metric: answers(99, 0.0) for metric in metrics}, LOSSES, seed=None)
    runs = [base]
    for defense, items, rate in (("none", NOTHING, 0.8), ("pps topic L2 x1.5", PPS, 0.2)):
        for seed in range(num_seeds):
            label = f"{defense} seed={seed}" if num_seeds > 1 else defense
            scores = {metric: answers(seed + len(items), rate) for metric in metrics}
            runs.append(Run(label, scores, LOSSES, defense, items, seed))
    return runs


def lines_of(what: RenderableType, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(what)
    return [line.rstrip() for line in console.export_text().splitlines()]


def cells_of(lines: list[str], beginning: str) -> list[str]:
    (line,) = [line for line in lines if line.startswith(beginning)]
    return line.removeprefix(beginning).split()


class TestByRun:
    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tiny_model_folder(tmp_path_factory)

    @pytest.fixture
    def tiny(self, tmp_path: Path, model: Path) -> TinySweep:
        return TinySweep(tmp_path / "sweep", model)

    def test_of_a_real_store_at_80_columns(self, tiny: TinySweep) -> None:
        results = load(write_finished(tiny.prepare(), failed=FAILED).root / "sweeps" / "tiny")
        lines = lines_of(summary_table(results, results.summary()))
        assert all(len(line) <= 80 for line in lines)
        # one of two answers to each question is "Hm.", which has no vowel: no spread, so the bound stands there
        assert cells_of(lines, "base ") == ["0.50", "0.00", "3.000", "-", "8", "done"]
        assert cells_of(lines, "pps random L2 x1.5 ")[-4:] == ["3.000", "2.500", "8", "done"]
        assert sum(line.split() == ["0.20", "to", "0.80", "0.00", "to", "0.60"] for line in lines) == 4
        assert cells_of(lines, f"{FAILED} ") == ["-", "-", "-", "-", "-", "failed"]
        assert lines[2].split()[:3] == ["run", "trait", "degeneration"]
        # what makes a bound of a rate of 0 known
        assert results.manifest.runs[0].scales == {"trait": (0.0, 1.0), "degeneration": (0.0, 1.0)}

    def test_an_error_or_where_there_is_none_the_bound(self) -> None:
        results = results_of(*seeded(1))
        row = results.summary().set_index("run").loc["none"]
        lines = lines_of(summary_table(results, results.summary()))
        assert cells_of(lines, "none ")[:3] == [f"{row['trait']:.2f}", "±", f"{row['trait_se']:.2f}"]
        at = next(index for index, line in enumerate(lines) if line.startswith("base "))
        assert lines[at].split()[:2] == ["base", "0.00"]
        assert lines[at + 1].split() == ["0.00", "to", "0.26"]  # 1 - 0.025 ** (1 / 12)

    def test_answers_without_a_score_are_counted(self) -> None:
        results = results_of(Run("none", {"trait": {"a": ["refused", 1.0], "b": ["refused", "refused"]}}))
        lines = lines_of(summary_table(results, results.summary()))
        assert lines[-2].split()[:2] == ["none", "1.00"]
        assert lines[-1].split() == ["3", "missing"]

    def test_every_metric_stands_beside_the_labels_at_80_columns(self) -> None:
        metrics = ("trait", "local", "hybrid", "a_longer_name")
        results = results_of(*seeded(1, metrics), metrics=metrics)
        lines = lines_of(summary_table(results, results.summary()))
        assert all(len(line) <= 80 for line in lines)
        assert not any("…" in line for line in lines)
        assert [line.split()[0] for line in lines if line.startswith(("run", "none"))] == ["run", "none"] * 2
        assert {word for line in lines if line.startswith("run") for word in line.split()} >= set(metrics)

    def test_labels_are_no_markup(self) -> None:
        results = results_of(Run("[red]a[/red] [/nope]", seed=1), Run("[b]", seed=2))
        text = "\n".join(lines_of(summary_view(results), 120))
        assert text.count("[red]a[/red] [/nope]") == 2
        assert "[b] / [red]a[/red] [/nope]" in text


class TestView:
    def test_one_seed_shows_differences_and_says_that_seeds_are_unknown(self) -> None:
        lines = lines_of(summary_view(results_of(*seeded(1))))
        assert "minus 'none', paired by question: mean, 95 % interval" in lines
        assert not any("over seeds" in line for line in lines)
        assert lines[-1] == ONE_SEED
        assert cells_of(lines[8:], "pps topic L2 x1.5 ")[0].startswith("-0.")
        assert "+0.000" in lines[-3]  # the losses are the same everywhere

    def test_several_seeds_are_shown_together(self) -> None:
        runs = seeded(3)
        runs[-1] = Run("pps topic L2 x1.5 seed=2", {}, {}, "pps topic L2 x1.5", PPS, 2, status="failed")
        lines = lines_of(summary_view(results_of(*runs)))
        assert all(len(line) <= 80 for line in lines)
        at = lines.index("small over seeds: mean ± standard error of seeds and questions")
        assert cells_of(lines[at:], "none ")[:2] == ["3", "3"]
        (row, _) = [line for line in lines[at:] if line.startswith("pps topic L2 x1.5 ")]
        assert row.removeprefix("pps topic L2 x1.5 ").split()[:4] == ["2", "of", "3¹", "2"]
        assert "¹ 1 failed" in lines
        assert cells_of(lines[at:], "base ")[:2] == ["1", "-"]
        assert "minus 'none', paired by question: mean, 95 % interval" in lines
        assert ONE_SEED not in "\n".join(lines)

    def test_groups_say_what_they_mix_and_that_there_is_one_seed(self) -> None:
        rates = [
            Run(f"pps {rate}", {"trait": answers(1, 0.5)}, LOSSES, f"pps {rate}", PPS, settings={"training.rate": rate})
            for rate in (0.001, 0.01)
        ]
        view = summary_view(results_of(*seeded(1), *rates), ["defense.vector", "training.rate"])
        assert any(line.startswith("topic") and " 0.001 " in line for line in lines_of(view))
        lines = lines_of(summary_view(results_of(*seeded(1), *rates), ["defense.vector"]))
        assert all(len(line) <= 80 for line in lines)
        assert lines[0] == "small by defense.vector: mean ± standard error of seeds and questions"
        assert cells_of(lines[:8], "- ")[:2] == ["1¹", "1"]
        assert f"¹ {ONE_SEED}" in lines
        assert "² mixes runs that differ in defense, training.rate" in lines
        assert "not compared: topic: 2 of 3 runs: no undefended run" in " ".join(lines)

    def test_each_group_has_its_own_undefended_run(self) -> None:
        runs = [
            Run(
                f"{defense} {rate}",
                {"trait": answers(1, 0.5)},
                LOSSES,
                defense,
                items,
                settings={"training.rate": rate},
            )
            for defense, items in (("none", NOTHING), ("pps", PPS))
            for rate in (0.1, 0.2)
        ]
        lines = lines_of(summary_view(results_of(*runs)))
        assert "minus the undefended run, paired by question: mean, 95 % interval" in lines
        assert cells_of(lines[8:], "pps 0.2 ")[-2:] == ["none", "0.2"]

    def test_a_sweep_without_an_undefended_run_says_so(self) -> None:
        lines = lines_of(summary_view(results_of(seeded(1)[-1])))
        assert "not compared: pps topic L2 x1.5: the sweep has no undefended run" in lines
        assert not any(line.startswith("minus") for line in lines)

    def test_many_metrics_keep_their_numbers_whole(self) -> None:
        metrics = ("trait", "a_longer_name", "third", "fourth")
        lines = lines_of(summary_view(results_of(*seeded(2, metrics), metrics=metrics), ["defense"]))
        assert all(len(line) <= 80 for line in lines)
        assert not any("…" in line for line in lines)
        assert sum(line.startswith("small by defense") for line in lines) == 2
        assert sum(line.startswith("minus 'none'") for line in lines) == 2

    def test_nothing_to_show(self) -> None:
        assert lines_of(summary_view(results_of()))[-1].strip("─") == ""
        assert lines_of(summary_view(results_of(Run("base", seed=None))))[-1].startswith("base")
