"""Figures of measurements inside a model, each a pure function of tables.

Numbers of figures are those of arXiv 2604.16423. A table is what a reader of ``analysis.load`` gives, or rows of the
same columns; a column ``coefficient`` or ``run`` is added by whoever knows it. Every function gives None where there is
nothing to draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from analysis.figure_style import Drawn, Width
from analysis.panels import bars, curves, identity_scatter, matrix, named_points, summarised
from analysis.rows import NO_CONDITION


def cosine_scatter(
    gradients: pd.DataFrame, *, vector: str, layers: Sequence[int], width: Width, reference: str = NO_CONDITION
) -> Drawn | None:
    """Figure 3: a point per row of the data, the defense present (x) and not (y); a panel per layer.

    Right of the identity line: less amplification with the defense; the lower right quarter: the gradient's sign flips.
    """
    chosen = gradients[(gradients["vector"] == vector) & gradients["layer"].isin(layers)]
    pairs = _pairs(chosen, ["row", "layer"], "cosine", reference).sort_values("layer", kind="stable")
    points = pairs.rename(columns={"with": "x", "without": "y", "condition": "series"})
    points["panel"] = [f"layer {layer}" for layer in points["layer"]]
    label = f"gradient cosine with {vector}"
    return identity_scatter(points, x_label=f"{label}, defended", y_label=f"{label}, undefended", width=width)


def loss_scatter(losses: pd.DataFrame, *, width: Width, reference: str = NO_CONDITION) -> Drawn | None:
    """Figures 4a and 4b: mean loss of every row, the defense present (x) and not (y); a panel per condition.

    Above the identity line: the defense explains the row.
    """
    points = _pairs(losses, ["row"], "loss_mean", reference).rename(columns={"with": "x", "without": "y"})
    points = points.assign(panel=points["condition"], series="")
    return identity_scatter(points, x_label="loss with (nats/token)", y_label="loss without (nats/token)", width=width)


def cosine_by_layer(gradients: pd.DataFrame, *, vectors: Sequence[str], width: Width) -> Drawn | None:
    """Mean cosine over rows at every layer, a curve per condition and a panel per vector compared with."""
    chosen = gradients[gradients["vector"].isin(vectors)]
    means = summarised(chosen, ["vector", "condition", "layer"], "cosine")
    means["panel"] = [f"along {vector}" for vector in means["vector"]]
    points = means.rename(columns={"condition": "series", "layer": "x"})
    return curves(points, x_label="layer", y_label="cosine of the gradient", width=width, zero=True)


def cross_trait_curves(gradients: pd.DataFrame, *, width: Width) -> Drawn | None:
    """Figure 5: columns measurement and series (texts), coefficient, layer, cosine (the data's trait). A panel
    per measurement and series, a curve per coefficient."""
    means = summarised(gradients, ["measurement", "series", "coefficient", "layer"], "cosine")
    means["panel"] = means["measurement"] + ": " + means["series"]
    means = means.sort_values("coefficient", kind="stable")
    means["panel"] = pd.Categorical(means["panel"], list(dict.fromkeys(means["panel"])))
    means["series"] = [f"coefficient {value:g}" for value in means["coefficient"]]
    points = means.rename(columns={"layer": "x"})
    return curves(points, x_label="layer", y_label="cosine along the data's trait", width=width, zero=True)


def coefficient_curves(
    gradients: pd.DataFrame,
    losses: pd.DataFrame,
    scores: pd.DataFrame | None = None,
    *,
    vector: str,
    layer: int,
    width: Width,
) -> Drawn | None:
    """Figure 4c, and with ``scores`` 4d beside it: all tables with columns series and coefficient. Loss, cosine with
    ``vector`` at ``layer``, and what trained runs scored (columns metric, value, low, high)."""
    chosen = gradients[(gradients["vector"] == vector) & (gradients["layer"] == layer)]
    loss = summarised(losses, ["series", "coefficient"], "loss_mean").assign(panel="loss (nats/token)")
    cosine = summarised(chosen, ["series", "coefficient"], "cosine").assign(
        panel=f"cosine with {vector}, layer {layer}"
    )
    parts = [loss, cosine]
    if scores is not None and len(scores):
        panels = [f"{metric} after training" for metric in scores["metric"]]
        parts.append(scores.assign(panel=panels, error=np.nan).rename(columns={"value": "y"}))
    points = pd.concat(parts).rename(columns={"coefficient": "x"})
    return curves(points, x_label="coefficient", y_label="mean", width=width, shared_y=False, shared_x=True)


def signature(similarities: pd.DataFrame, *, layers: Sequence[int], width: Width) -> Drawn | None:
    """Figures 1c and 16: cosine of the steered with the prompted gradient over coefficients (columns series and
    coefficient), a panel per series, a curve per layer."""
    chosen = similarities[similarities["layer"].isin(layers)].sort_values("layer", kind="stable")
    means = summarised(chosen, ["series", "layer", "coefficient"], "cosine")
    points = means.assign(panel=means["series"], series=[f"layer {layer}" for layer in means["layer"]]).rename(
        columns={"coefficient": "x"}
    )
    return curves(points, x_label="coefficient", y_label="cosine of the two gradients", width=width)


def vector_cosines(cosines: pd.DataFrame, *, width: Width) -> Drawn | None:
    """Figure 17: columns vector, layer, cosine: of prompt-difference vectors with the trait's vector."""
    points = cosines.rename(columns={"vector": "series", "layer": "x", "cosine": "y"})
    points = points.assign(panel="cosine with the trait's vector", error=np.nan)
    return curves(points, x_label="layer", y_label="cosine", width=width, zero=True)


def explained_variance(
    components: pd.DataFrame, *, layers: Sequence[int], width: Width, count: int = 5
) -> Drawn | None:
    """Figure 18c: the share that each of the first directions explains, a panel per layer."""
    chosen = components[components["layer"].isin(layers) & components["component"].between(1, count)]
    points = chosen.drop_duplicates(["condition", "layer", "component"]).sort_values("layer", kind="stable")
    points = points.assign(
        panel=[f"layer {layer}" for layer in points["layer"]],
        x=[f"PC{number}" for number in points["component"]],
        y=points["explained"],
        series=points["condition"],
    )
    return bars(points, x_label="direction of the gradient's change", y_label="share explained", width=width)


def component_cosines(components: pd.DataFrame, *, layer: int, width: Width, count: int = 3) -> Drawn | None:
    """Figures 18a and 18b: cosine of the first directions, and of the mean change, with every vector; a panel per
    condition."""
    chosen = components[(components["layer"] == layer) & (components["component"] <= count)]
    names = ["mean" if number == 0 else f"PC{number}" for number in chosen["component"]]
    points = chosen.assign(
        panel=[f"{condition}, layer {layer}" for condition in chosen["condition"]],
        x=names,
        y=chosen["cosine"],
        series=chosen["vector"],
    )
    return bars(points, x_label="direction of the gradient's change", y_label="cosine", width=width, zero=True)


def change_by_layer(changes: pd.DataFrame, *, vector: str, width: Width) -> Drawn | None:
    """Figure 12: cosine of dh with the gradient, and of both with ``vector``, at every layer; a panel per condition
    of the step."""
    chosen = changes[changes["vector"] == vector]
    names = {
        "change_gradient_cosine": "dh with g",
        "change_cosine": f"dh with {vector}",
        "gradient_cosine": f"g with {vector}",
    }
    parts = [summarised(chosen, ["condition", "layer"], column).assign(series=name) for column, name in names.items()]
    points = pd.concat(parts).rename(columns={"condition": "panel", "layer": "x"})
    return curves(points, x_label="layer", y_label="cosine", width=width, zero=True)


def change_scatter(
    changes: pd.DataFrame, *, vector: str, layers: Sequence[int], width: Width, reference: str = NO_CONDITION
) -> Drawn | None:
    """Figures 13 and 14: cosine of dh with ``vector`` after a step with nothing present (x) and with the defense (y).

    Below the identity line: the defended step moves activations less along the vector.
    """
    chosen = changes[(changes["vector"] == vector) & changes["layer"].isin(layers)]
    pairs = _pairs(chosen, ["row", "layer"], "change_cosine", reference).sort_values("layer", kind="stable")
    points = pairs.rename(columns={"without": "x", "with": "y", "condition": "series"})
    points["panel"] = [f"layer {layer}" for layer in points["layer"]]
    label = f"cosine of dh with {vector}"
    return identity_scatter(points, x_label=f"{label}, plain step", y_label=f"{label}, defended step", width=width)


def projection_by_layer(projections: pd.DataFrame, *, vector: str, base: str, width: Width) -> Drawn | None:
    """Figure 6: column run. Projection of activations on ``vector`` minus that of the run ``base`` on the same row, in
    units of the base's mean |h| of the layer, so that layers can be compared."""
    chosen = projections[projections["vector"] == vector]
    of_base = chosen[chosen["run"] == base].set_index(["row", "layer"])
    sizes = of_base["activation_norm"].groupby("layer").mean()
    others = chosen[chosen["run"] != base].merge(
        of_base["projection"].rename("of_base").reset_index(), on=["row", "layer"]
    )
    others = others.assign(moved=(others["projection"] - others["of_base"]) / others["layer"].map(sizes))
    means = summarised(others, ["run", "layer"], "moved").assign(panel=f"along {vector}, minus {base}")
    points = means.rename(columns={"run": "series", "layer": "x"})
    return curves(points, x_label="layer", y_label="change of projection / mean |h|", width=width, zero=True)


def foreseen_and_found(
    candidates: pd.DataFrame, *, score: str, outcome: str, width: Width, labels: Mapping[str, str] | None = None
) -> Drawn | None:
    """A point per candidate: columns condition, ``score`` (and ``score``_error), ``outcome`` (and ``outcome``_error)
    and, where there are several data sets, data (a panel each). ``labels``: words for the two columns."""
    words = {"shift": "foreseen: shift of the cosine", "loss_gap": "loss gap (nats/token)"} | dict(labels or {})
    points = pd.DataFrame(
        {
            "panel": candidates.get("data", ""),
            "series": candidates["condition"],
            "x": candidates[score],
            "y": candidates[outcome],
            "x_error": candidates.get(f"{score}_error", np.nan),
            "y_error": candidates.get(f"{outcome}_error", np.nan),
        }
    )
    return named_points(points, x_label=words.get(score, score), y_label=words.get(outcome, outcome), width=width)


def cross_trait_matrix(
    cells: pd.DataFrame, *, width: Width, scales: Mapping[str, tuple[float, float]] | None = None
) -> Drawn | None:
    """Figure 5's numbers: columns candidate, measurement, value and panel (the quantity). ``scales``: the least and
    greatest value that a quantity can have."""
    points = cells.rename(columns={"candidate": "row", "measurement": "column"})
    return matrix(points, row_label="defense", column_label="data", width=width, scales=scales)


def _pairs(table: pd.DataFrame, keys: Sequence[str], value: str, reference: str) -> pd.DataFrame:
    """Columns keys, condition, with, without: every condition beside the reference on the same row."""
    base = table[table["condition"] == reference].set_index(list(keys))[value].rename("without")
    others = table[table["condition"] != reference]
    return others.merge(base.reset_index(), on=list(keys)).rename(columns={value: "with"})
