"""What plots have in common: colours, shapes, and an SVG that is the same for the same numbers.

Colours are Okabe and Ito's, which colour-blind readers tell apart, and a shape goes with each. The
background is white, so that a dark page shows the same picture.
"""

from __future__ import annotations

import io
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#999999",
)  # fmt: skip
SHAPES = "osD^vPX*"
DARK, MIDDLE, LIGHT = "#333333", "#7A7A7A", "#D9D9D9"

SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "msplora",
    "svg.fonttype": "path",
    "text.parse_math": False,  # names come from files
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": MIDDLE,
    "axes.labelcolor": DARK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": DARK,
    "ytick.color": DARK,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
}


def mark_of(place: int) -> dict[str, Any]:
    """The colour and the shape of the series at a place."""
    return {"color": COLOURS[place % len(COLOURS)], "marker": SHAPES[place % len(SHAPES)]}


def svg(figure: Figure, title: str) -> bytes:
    """The figure as SVG, without a date."""
    canvas, file = FigureCanvasSVG(figure), io.BytesIO()
    canvas.print_svg(file, metadata={"Date": None, "Title": title})
    return file.getvalue()
