"""The one style of all figures: for page and print, readable in greyscale, the same bytes from the same data.

Every series differs by its marker (and in curves by its line) as well as by its colour. Two widths exist: ``page``
(across both columns of a paper, or a desktop's window) and ``column`` (one column, or a phone).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Width = Literal["page", "column"]


_WIDTH_INCHES: dict[Width, float] = {"page": 6.9, "column": 3.4}

# a column is also what a phone shows, where print sizes are small
_LARGER_IN_COLUMN = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}

INK, SOFT, FAINT = "#1a1a1a", "#6b6b6b", "#d9d9d9"
# Okabe and Ito's palette without its yellow (too pale on white); each colour has a marker and a line of its own
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", INK)
MARKERS = ("s", "^", "v", "P", "X", "p", "h", "<", ">", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))

_STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so every machine draws the same
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.5,
    "text.color": INK,
    "text.parse_math": False,  # labels are the user's: a $ is a dollar sign
    "xtick.color": SOFT,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 7,
    "ytick.color": SOFT,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 7,
    "pdf.fonttype": 42,  # text stays text
    "savefig.facecolor": "white",
    "figure.facecolor": "white",
}


@dataclass(frozen=True)
class Drawn:
    """A figure as files."""

    png: bytes
    pdf: bytes


def new_figure(width: Width, height_inches: float) -> Figure:
    figure = Figure(figsize=(_WIDTH_INCHES[width], height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@contextmanager
def style(width: Width) -> Iterator[None]:
    """Our style alone, whatever a user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        settings: Any = _STYLE | (
            _LARGER_IN_COLUMN if width == "column" else {}
        )  # its stub lists every key as a literal
        matplotlib.rcParams.update(settings)
        yield


def drawn(figure: Figure) -> Drawn:
    """Both files without the time and the program that made them. To be called inside ``style``."""
    files: dict[str, bytes] = {}
    metadata: dict[str, dict[str, Any]] = {
        "png": {"Software": None},
        "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    }
    for kind, facts in metadata.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=200, metadata=facts)
        files[kind] = buffer.getvalue()
    return Drawn(**files)
