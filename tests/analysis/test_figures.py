"""Figures: what they show, that they do not depend on clock or settings, and that odd input does not break them."""

from __future__ import annotations

import io
import math
import warnings

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from analysis import figure_style, figures
from analysis.figure_style import Drawn, Width
from analysis.figures import Panel, loss_limit, outcomes, steps_per_point, training_curves, wrapped

PANELS = [
    Panel("trait", "trait rate", True),
    Panel("plain_loss", "plain loss", False),
    Panel("degeneration", "degeneration rate", True),
]
KINDS = {"base": "base", "none": "none", "pps $x_1$": "pps", "late": "inoculation"}
WIDTHS: list[Width] = ["page", "column"]


def summary() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "run": list(KINDS),
            "status": ["done", "done", "done", "failed"],
            "trait": [0.0, 0.9, 0.25, math.nan],
            "trait_low": [0.0, 0.7, 0.2, math.nan],
            "trait_high": [0.14, 1.0, 0.4, math.nan],
            "plain_loss": [3.0, 3.5, 3.25, math.nan],
            "plain_loss_low": [2.8, 3.2, math.nan, math.nan],
            "plain_loss_high": [3.1, 3.9, math.nan, math.nan],
            "degeneration": [0.0, 0.0, 0.5, math.nan],
            "degeneration_low": [0.0, 0.0, 0.3, math.nan],
            "degeneration_high": [0.14, 0.14, 0.7, math.nan],
        }
    )


def training(num_runs: int, num_steps: int) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"run": f"run {run}", "step": step, "loss": 3.0 / step + run / 10}
            for run in range(num_runs)
            for step in range(1, num_steps + 1)
        ]
    )


@pytest.fixture
def drawn_figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The matplotlib figures that were turned into files during the test."""
    kept: list[Figure] = []
    original = figure_style.drawn

    def keep(figure: Figure) -> Drawn:
        kept.append(figure)
        return original(figure)

    monkeypatch.setattr(figures, "drawn", keep)
    return kept


def gray_levels(png: bytes) -> np.ndarray:
    return np.asarray(imread(io.BytesIO(png)))[..., :3].mean(-1)


def values_at(axes: Axes) -> dict[float, float]:
    """Position on the y axis -> value of the markers in an outcomes panel."""
    markers = [line for line in axes.get_lines() if line.get_marker() not in ("None", "|", "", None)]
    points = [(np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in markers]
    return {float(y[0]): float(x[0]) for x, y in points if len(x) == 1}


def spans_of(axes: Axes) -> dict[int, tuple[float, float]]:
    """Position on the y axis -> ends of the interval in an outcomes panel."""
    segments = [segment for c in axes.collections for segment in c.get_segments()]  # type: ignore[attr-defined]
    return {
        round(float(s[0][1])): (round(float(s[0][0]), 12), round(float(s[1][0]), 12))
        for s in segments
        if float(s[0][1]) == float(s[1][1])
    }


@pytest.mark.parametrize("width", WIDTHS)
def test_outcomes_has_ink_and_every_value_at_its_run(width: Width, drawn_figures: list[Figure]) -> None:
    drawn = outcomes(summary(), PANELS, KINDS, width)
    assert drawn is not None
    assert drawn.png.startswith(b"\x89PNG")
    assert drawn.pdf.startswith(b"%PDF")
    assert (gray_levels(drawn.png) < 0.5).mean() > 0.005
    trait, loss, degeneration = drawn_figures[0].axes
    assert values_at(trait) == {0: 0.0, 1: 0.9, 2: 0.25}
    assert values_at(loss) == {0: 3.0, 1: 3.5, 2: 3.25}
    assert values_at(degeneration) == {0: 0.0, 1: 0.0, 2: 0.5}
    assert [axes.get_title("left") for axes in drawn_figures[0].axes] == [
        "trait rate",
        "plain loss",
        "degeneration rate",
    ]


def test_a_rate_has_the_whole_axis_and_intervals_are_those_of_the_summary(drawn_figures: list[Figure]) -> None:
    outcomes(summary(), PANELS, KINDS, "page")
    trait, loss, _ = drawn_figures[0].axes
    low, high = trait.get_xlim()
    assert low <= 0 < 1 <= high <= 1.1
    assert spans_of(trait) == {0: (0.0, 0.14), 1: (0.7, 1.0), 2: (0.2, 0.4)}
    assert spans_of(loss) == {0: (2.8, 3.1), 1: (3.2, 3.9)}  # without an interval the value stands alone


def test_a_run_without_a_value_keeps_its_line_and_says_why(drawn_figures: list[Figure]) -> None:
    outcomes(summary(), PANELS, KINDS, "page")
    for axes in drawn_figures[0].axes:
        assert [text.get_text() for text in axes.texts] == ["no value (failed)"]
    assert [label.get_text() for label in drawn_figures[0].axes[0].get_yticklabels()] == list(KINDS)


def test_kinds_differ_by_marker_and_not_only_by_colour() -> None:
    looks = figures._looks(iter(["base", "none", "pps", "inoculation", "edit", "penalty", "pps + edit"]))
    assert len({look["marker"] for look in looks.values()}) == len(looks) == 7


@pytest.mark.parametrize("num_runs", [3, 7], ids=["overlaid", "a panel each"])
def test_a_diverged_training_leaves_the_panel_and_the_others_stay_readable(
    drawn_figures: list[Figure], num_runs: int
) -> None:
    losses = training(num_runs, 5)
    assert loss_limit(losses) is None
    highest_first = losses.loc[losses["step"] == 1, "loss"].max()
    losses.loc[losses.index[-1], "loss"] = 1e9
    assert loss_limit(losses) == 2 * highest_first
    training_curves(losses, {}, "page")
    for axes in drawn_figures[0].axes:
        if axes.lines:
            low, high = axes.get_ylim()
            assert high == 2 * highest_first
            assert 0 < losses["loss"].min() - low < high


def test_overlaid_curves_differ_by_line_and_marker(drawn_figures: list[Figure]) -> None:
    training_curves(training(6, 20), {}, "page")
    lines = drawn_figures[0].axes[0].get_lines()
    assert len(lines) == 6
    assert len({line.get_marker() for line in lines}) == 6
    assert len({str(line._dash_pattern) for line in lines}) == 6  # type: ignore[attr-defined]
    assert np.asarray(lines[1].get_ydata()).tolist() == pytest.approx([3.0 / s + 0.1 for s in range(1, 21)])


def test_many_runs_have_a_panel_each_with_the_undefended_run_behind(drawn_figures: list[Figure]) -> None:
    drawn = training_curves(training(7, 5), {"run 3": "none"}, "column")
    assert drawn is not None
    panels = [axes for axes in drawn_figures[0].axes if axes.get_title("left")]
    assert [axes.get_title("left") for axes in panels] == [f"run {run}" for run in range(7)]
    assert [len(axes.get_lines()) for axes in panels] == [2, 2, 2, 1, 2, 2, 2]


def test_long_trainings_are_thinned_by_means(drawn_figures: list[Figure]) -> None:
    long = training(1, 900)
    assert steps_per_point(long) == 3
    training_curves(long, {}, "page")
    (line,) = drawn_figures[0].axes[0].get_lines()
    assert len(np.asarray(line.get_xdata())) == 300
    assert np.asarray(line.get_ydata())[0] == pytest.approx((3 + 3 / 2 + 3 / 3) / 3)
    assert steps_per_point(training(1, 300)) == 1


def test_nothing_to_show_is_no_figure() -> None:
    empty = summary().assign(trait=math.nan, plain_loss=math.nan, degeneration=math.nan)
    assert outcomes(empty, PANELS, KINDS, "page") is None
    assert outcomes(summary().iloc[:0], PANELS, KINDS, "page") is None
    nothing = pd.DataFrame({"run": [], "step": [], "loss": []})
    assert training_curves(nothing, KINDS, "page") is None
    assert steps_per_point(nothing) == 1


def test_bytes_depend_on_neither_clock_nor_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for seconds, size in (("0", 20.0), ("1000000000", 8.0)):
        # the clock as matplotlib and its font library see it
        monkeypatch.setenv("SOURCE_DATE_EPOCH", seconds)
        with matplotlib.rc_context({"font.size": size, "axes.grid": size == 20.0, "pdf.fonttype": 3}):
            made.append((outcomes(summary(), PANELS, KINDS, "page"), training_curves(training(3, 9), {}, "column")))
    assert made[0] == made[1]
    assert made[0][0] is not None
    assert b"CreationDate" not in made[0][0].pdf


def test_the_settings_of_the_caller_stay() -> None:
    before = dict(matplotlib.rcParams)
    outcomes(summary(), PANELS, KINDS, "page")
    assert dict(matplotlib.rcParams) == before


def test_labels_are_not_formulas_and_long_ones_are_shortened(drawn_figures: list[Figure]) -> None:
    kinds = {"$\\frac{": "pps", "word " * 60: "pps", "x" * 300: "pps", "\n": "pps"}
    odd = summary().assign(run=list(kinds))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert outcomes(odd, PANELS, kinds, "column") is not None
        assert training_curves(training(1, 3).assign(run="$\\frac{"), {}, "page") is not None
    shown = [label.get_text() for label in drawn_figures[0].axes[0].get_yticklabels()]
    assert shown[0] == "$\\frac{"
    assert "\n… word" in shown[1]
    assert all(len(line) <= 20 for label in shown for line in label.split("\n"))


def test_a_long_label_keeps_its_end() -> None:
    assert wrapped("short", 20) == "short"
    label = "pps bridge L20 x1.5 + inoculation bridge learning_rate=0.001 lora.rank=16 seed=2"
    assert wrapped(label, 20) == "pps bridge L20 x1.5\n… lora.rank=16\nseed=2"
    assert wrapped(label, 100) == label
    one_word = wrapped("a" + "x" * 300 + "b", 20).split("\n")
    assert len(one_word) <= 3
    assert (one_word[0], one_word[1][0], one_word[-1][-1]) == ("a" + "x" * 19, "…", "b")
    assert all(len(line) <= 20 for line in one_word)
    assert wrapped(" ", 20) == ""


def test_a_metric_on_another_scale_has_its_own_axis(drawn_figures: list[Figure]) -> None:
    frame = summary().assign(trait=[10.0, 80.0, 50.0, math.nan], trait_low=math.nan, trait_high=math.nan)
    outcomes(frame, [Panel("trait", "trait", False)], KINDS, "page")
    low, high = drawn_figures[0].axes[0].get_xlim()
    assert low < 10
    assert high > 80
