"""Figures of measurements: what is drawn where, and that it can be read without colour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from analysis import measured_figures, panels
from analysis.figure_style import Drawn, Width
from analysis.measured_figures import (
    change_by_layer,
    change_scatter,
    coefficient_curves,
    component_cosines,
    cosine_by_layer,
    cosine_scatter,
    cross_trait_curves,
    cross_trait_matrix,
    explained_variance,
    foreseen_and_found,
    loss_scatter,
    projection_by_layer,
    signature,
    vector_cosines,
)

CONDITIONS = ("none", "pps evil L2 x1.5", "inoculation")


def table(**columns: Any) -> pd.DataFrame:
    """The product of the columns that are lists, and numbers that depend on the row's place for those that are None."""
    lists = {name: values for name, values in columns.items() if values is not None}
    frame = pd.MultiIndex.from_product(list(lists.values()), names=list(lists)).to_frame(index=False)
    draw = np.random.default_rng(0)
    for name in columns.keys() - lists.keys():
        frame[name] = draw.normal(size=len(frame))
    return frame


GRADIENTS = table(row=[0, 1, 2], condition=CONDITIONS, layer=[1, 2, 3], vector=["evil", "random"], cosine=None)
LOSSES = table(row=[0, 1, 2], condition=CONDITIONS, loss_mean=None)
CHANGES = table(
    row=[0, 1, 2],
    condition=CONDITIONS,
    layer=[1, 2, 3],
    vector=["evil"],
    change_cosine=None,
    gradient_cosine=None,
    change_gradient_cosine=None,
)
COMPONENTS = table(
    condition=CONDITIONS[1:], layer=[2, 3], component=[0, 1, 2, 3, 4, 5, 6], vector=["evil", "random"], cosine=None
).assign(explained=lambda frame: 0.6 / frame["component"].clip(1) ** 2)
PROJECTIONS = table(run=["base", "none", "pps"], row=[0, 1], layer=[1, 2, 3], vector=["evil"], projection=None).assign(
    activation_norm=2.0
)
CANDIDATES = pd.DataFrame(
    {
        "data": ["evil", "evil", "other"],
        "condition": ["a", "b", "a"],
        "shift": [0.1, 0.2, -0.1],
        "shift_error": [0.01, 0.02, np.nan],
        "kept away": [0.5, 0.7, 0.0],
    }
)

SCORES = pd.DataFrame(
    {
        "series": "evil",
        "coefficient": [0, 2],
        "metric": "trait",
        "value": [0.5, 0.25],
        "low": [0.25, 0.125],
        "high": [0.75, 1.0],
    }
)
CELLS = table(candidate=["none", "pps"], measurement=["a", "b"])

FIGURES: dict[str, Callable[[Width], Drawn | None]] = {
    "cosine_scatter": lambda width: cosine_scatter(GRADIENTS, vector="evil", layers=[2, 3], width=width),
    "loss_scatter": lambda width: loss_scatter(LOSSES, width=width),
    "cosine_by_layer": lambda width: cosine_by_layer(GRADIENTS, vectors=["evil", "random"], width=width),
    "cross_trait_curves": lambda width: cross_trait_curves(
        table(measurement=["a", "b"], series=["a", "b"], coefficient=[0.0, 1.5], layer=[1, 2], row=[0, 1], cosine=None),
        width=width,
    ),
    "coefficient_curves": lambda width: coefficient_curves(
        table(series=["evil"], coefficient=[0, 1, 2], row=[0, 1], layer=[2], vector=["evil"], cosine=None),
        table(series=["evil"], coefficient=[0, 1, 2], row=[0, 1], loss_mean=None),
        SCORES,
        vector="evil",
        layer=2,
        width=width,
    ),
    "signature": lambda width: signature(
        table(series=["evil"], layer=[2, 10], coefficient=[0.0, 1.0], row=[0, 1], cosine=None),
        layers=[2, 10],
        width=width,
    ),
    "vector_cosines": lambda width: vector_cosines(table(vector=["p"], layer=[1, 2], cosine=None), width=width),
    "explained_variance": lambda width: explained_variance(COMPONENTS, layers=[2, 3], width=width),
    "component_cosines": lambda width: component_cosines(COMPONENTS, layer=2, width=width),
    "change_by_layer": lambda width: change_by_layer(CHANGES, vector="evil", width=width),
    "change_scatter": lambda width: change_scatter(CHANGES, vector="evil", layers=[2, 3], width=width),
    "projection_by_layer": lambda width: projection_by_layer(PROJECTIONS, vector="evil", base="base", width=width),
    "foreseen_and_found": lambda width: foreseen_and_found(CANDIDATES, score="shift", outcome="kept away", width=width),
    "cross_trait_matrix": lambda width: cross_trait_matrix(
        pd.concat(
            [
                CELLS.assign(panel="foreseen", value=[0.0, -0.0215, 0.004, np.nan]),
                CELLS.assign(panel="found", value=[0.0, 1.0, 0.25, np.nan]),
            ]
        ),
        scales={"found": (0.0, 1.0)},
        width=width,
    ),
}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The matplotlib figures that are made during the test, in place of files, which take seconds."""
    kept: list[Any] = []

    def keep(figure: Figure) -> Drawn:
        kept.append(figure)
        return Drawn(b"", b"")

    monkeypatch.setattr(panels, "drawn", keep)
    return kept


def test_every_figure_of_the_module_is_tried() -> None:
    own = measured_figures.__name__
    public = {name for name, value in vars(measured_figures).items() if getattr(value, "__module__", "") == own}
    assert {name for name in public if not name.startswith("_")} == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("width", ["page", "column"])
def test_every_panel_has_something_in_it(name: str, width: Width, figures: list[Any]) -> None:
    assert FIGURES[name](width) is not None
    (figure,) = figures
    assert all(axes.lines or axes.patches or axes.images for axes in figure.axes if axes.axison)
    texts = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    assert not [text for text in texts if text.get_text().lower() == "nan"]


def test_the_same_data_gives_the_same_bytes() -> None:
    found = FIGURES["loss_scatter"]("column")
    assert found is not None
    assert found.png.startswith(b"\x89PNG")
    assert found.pdf.startswith(b"%PDF")
    assert FIGURES["loss_scatter"]("column") == found


def points_of(axes: Any) -> list[list[float]]:
    """x and y of every series that is drawn as markers, by series: x0, y0, x1, y1, ... in the order of x."""
    series = [line.get_xydata() for line in axes.lines if line.get_marker() != "None" and len(line.get_xdata())]
    return [points[points[:, 0].argsort()].flatten().tolist() for points in series]


def in_order(x: Sequence[float], y: Sequence[float]) -> list[float]:
    return [value for point in sorted(zip(x, y, strict=True)) for value in point]


def test_a_scatter_has_the_defense_on_x_and_the_identity_line(figures: list[Any]) -> None:
    cosine_scatter(GRADIENTS, vector="evil", layers=[3], width="page")
    (axes,) = figures[0].axes
    chosen = GRADIENTS[(GRADIENTS["vector"] == "evil") & (GRADIENTS["layer"] == 3)]
    by_condition = {name: part.sort_values("row")["cosine"].tolist() for name, part in chosen.groupby("condition")}
    expected = [in_order(by_condition[name], by_condition["none"]) for name in CONDITIONS[1:]]
    assert points_of(axes) == [pytest.approx(series) for series in expected]
    assert axes.get_xlim() == axes.get_ylim()
    ends = [line.get_xydata().tolist() for line in axes.lines]
    diagonal = [points for points in ends if len(points) == 2 and all(x == y for x, y in points)]
    assert len(diagonal) == 1


def test_a_changed_scatter_has_the_plain_step_on_x(figures: list[Any]) -> None:
    change_scatter(CHANGES, vector="evil", layers=[2], width="page")
    chosen = CHANGES[CHANGES["layer"] == 2].set_index(["condition", "row"])["change_cosine"]
    expected = in_order([chosen["none", row] for row in range(3)], [chosen["inoculation", row] for row in range(3)])
    assert points_of(figures[0].axes[0])[1] == pytest.approx(expected)


def test_curves_are_means_over_rows(figures: list[Any]) -> None:
    cosine_by_layer(GRADIENTS, vectors=["random"], width="page")
    means = GRADIENTS[GRADIENTS["vector"] == "random"].groupby(["condition", "layer"])["cosine"].mean()
    expected = [in_order([1, 2, 3], [means[condition, layer] for layer in (1, 2, 3)]) for condition in CONDITIONS]
    assert points_of(figures[0].axes[0]) == [pytest.approx(series) for series in expected]


def test_projections_are_those_of_the_run_minus_the_bases(figures: list[Any]) -> None:
    projection_by_layer(PROJECTIONS, vector="evil", base="base", width="page")
    wide = PROJECTIONS.pivot_table(index=["layer", "row"], columns="run", values="projection")
    moved = ((wide["pps"] - wide["base"]) / 2).groupby("layer").mean()
    assert points_of(figures[0].axes[0])[1] == pytest.approx(in_order(list(moved.index), moved.tolist()))


def test_series_differ_without_colour(figures: list[Any]) -> None:
    many = table(vector=[f"v{number}" for number in range(6)], layer=[1, 2, 3], cosine=None)
    vector_cosines(many, width="page")
    lines = [line for line in figures[0].axes[0].lines if len(line.get_xdata()) == 3]
    assert len({(line.get_marker(), line.get_linestyle(), str(line._unscaled_dash_pattern)) for line in lines}) == 6


def test_a_matrix_names_its_numbers_and_what_is_missing(figures: list[Any]) -> None:
    FIGURES["cross_trait_matrix"]("page")
    foreseen, found = ([text.get_text() for text in axes.texts] for axes in figures[0].axes)
    assert foreseen == ["0.0000", "-0.0215", "0.0040", "–"], "three digits of the largest"
    assert found == ["0.00", "1.00", "0.25", "–"]


def test_scores_of_runs_stand_beside_the_curves_over_coefficients(figures: list[Any]) -> None:
    FIGURES["coefficient_curves"]("page")
    loss, cosine, score = figures[0].axes
    assert score.get_title(loc="left") == "trait after training"
    assert points_of(score) == [[0, 0.5, 2, 0.25]]
    (band,) = score.collections
    ends = band.get_paths()[0].get_extents()
    assert (ends.ymin, ends.ymax) == (0.125, 1.0), "the interval, not a number of errors"
    assert loss.get_xlim() == cosine.get_xlim() == score.get_xlim()
    assert loss.get_ylim() != score.get_ylim()


def test_nothing_to_draw_is_none() -> None:
    assert cosine_scatter(GRADIENTS[GRADIENTS["condition"] == "none"], vector="evil", layers=[2], width="page") is None
    assert cosine_by_layer(GRADIENTS, vectors=["other"], width="page") is None
    assert loss_scatter(LOSSES.iloc[:0], width="page") is None
    assert projection_by_layer(PROJECTIONS, vector="evil", base="gone", width="page") is None
    assert explained_variance(COMPONENTS, layers=[9], width="page") is None
    nothing = CANDIDATES.assign(shift=np.nan)
    assert foreseen_and_found(nothing, score="shift", outcome="kept away", width="page") is None
