"""The page of an analysis: one HTML file that needs no other, and no network."""

from __future__ import annotations

from dataclasses import dataclass

from msplora.page.environment import environment

from . import sections
from .charts import shown
from .experts import drawn, weights
from .results import Analysis, Number, mean


@dataclass(frozen=True)
class Cell:
    """A cell of a coloured table: what it says, and how strong its colour is."""

    text: str
    strength: str
    """h0 … h20, or n1 … n20 where it is below zero; empty without a value."""


def render(analysis: Analysis) -> str:
    """The page of an analysis.

    Raises:
        MSPLoraError: jinja2 is not installed.
    """
    made = environment("msplora.analysis")
    made.filters |= {
        "cell": cell,
        "shown": shown,
        "percent": percent,
        "average": mean,
        "drawn": drawn,
        "weights": weights,
    }
    return made.get_template("page.html.j2").render(
        analysis=analysis,
        several=len(analysis.adapters) > 1,
        sections=sections,
    )


def percent(value: Number) -> str:
    """A share in percent."""
    return shown(value, share=True)


def cell(value: Number) -> Cell:
    """A share, or a cosine, as a whole number of hundredths on its colour."""
    if value is None:
        return Cell("–", "")
    hundredths = round(value * 100)
    steps = round(abs(hundredths) / 5)
    return Cell(str(hundredths), f"n{steps}" if hundredths < 0 and steps else f"h{steps}")
