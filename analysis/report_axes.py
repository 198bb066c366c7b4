"""What the report shows of a study of axes: alignment over noise and over rows, with intervals and tests."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import pandas as pd

from analysis.figure_style import Drawn, Width
from analysis.manifest import MeasureEntry
from analysis.panels import curves
from analysis.report_blocks import Block, drawn_block, number

_NORMAL = 1.96
_TITLES = {
    "mean_difference": "mean difference",
    "leading_difference": "leading difference",
    "contrastive": "contrastive",
    "logistic": "logistic",
}


def axis_blocks(summary: pd.DataFrame, tests: pd.DataFrame, entry: MeasureEntry) -> Iterator[Block]:
    """Figures and tables of the tables ``axis_summary`` and ``axis_tests``; nothing while they are empty."""
    if summary.empty:
        return
    given = entry.config
    assumed = (
        f"Assumed: dimension {given['dimension']}, means {given['separation']:g} apart, rows that vary by "
        f"{given['spread']:g} in every coordinate before noise is added; {given['seeds']} draws of each."
    )
    yield from drawn_block(
        f"{entry.name}_noise",
        "Alignment with the known axis over noise",
        f"Mean cosine over draws, with its 95 % interval; a panel per number of rows. {assumed}",
        partial(alignment_curves, summary, along="noise", panel="num_rows"),
    )
    yield from drawn_block(
        f"{entry.name}_rows",
        "Alignment with the known axis over rows",
        "The same over the rows of each set (logarithm to base 10); a panel per noise.",
        partial(alignment_curves, summary, along="num_rows", panel="noise"),
    )
    most = int(summary["num_rows"].max())
    yield Block(
        f"{entry.name}_table",
        f"Alignment with {most} rows of each set",
        f"Mean cosine with the known axis and its 95 % bootstrap interval. {assumed} Closed form: separation / "
        "sqrt(separation² + 2 s² (d − 1) / n), for the mean difference.",
        head=("Noise", *_TITLES.values(), "closed form"),
        rows=tuple(_table(summary[summary["num_rows"] == most])),
    )
    yield Block(
        f"{entry.name}_tests",
        f"Estimators against each other, {most} rows of each set",
        "Paired by draw: mean difference of the alignments, Cohen's d (over the pooled standard deviation), p of the "
        "sign-flip permutation test and of the paired t test; not corrected for their number.",
        head=("Noise", "first", "second", "difference", "d", "p (sign flip)", "p (t)"),
        rows=tuple(
            (
                f"{row['noise']:g}",
                _TITLES[str(row["first"])],
                _TITLES[str(row["second"])],
                f"{row['difference']:+.5f}",
                number(row["cohens_d"], "+.2f"),
                number(row["p_sign_flip"], ".2g"),
                number(row["p_t"], ".2g"),
            )
            for row in tests[tests["num_rows"] == most].to_dict("records")
        ),
    )


def alignment_curves(summary: pd.DataFrame, *, along: str, panel: str, width: Width) -> Drawn | None:
    """A curve per estimator over ``along``, a panel per value of ``panel``."""
    names = {"noise": "noise {:g}", "num_rows": "{:g} rows"}
    logarithm = along == "num_rows"
    points = pd.DataFrame(
        {
            "panel": [names[panel].format(value) for value in summary[panel]],
            "series": [_TITLES[name] for name in summary["estimator"]],
            "x": [math.log10(value) if logarithm else value for value in summary[along]],
            "y": summary["alignment"],
            "error": (summary["alignment_high"] - summary["alignment_low"]) / (2 * _NORMAL),
        }
    )
    label = "rows of each set, log10" if logarithm else "noise"
    return curves(points, x_label=label, y_label="cosine with the axis", width=width)


def _table(summary: pd.DataFrame) -> Iterator[tuple[str, ...]]:
    for noise in dict.fromkeys(summary["noise"]):
        of_noise = summary[summary["noise"] == noise].set_index("estimator")
        cells = [
            f"{row['alignment']:.4f} ({number(row['alignment_low'], '.4f')} to {number(row['alignment_high'], '.4f')})"
            for row in (of_noise.loc[name] for name in _TITLES)
        ]
        yield (f"{noise:g}", *cells, number(of_noise.loc["mean_difference", "expected"], ".4f"))
