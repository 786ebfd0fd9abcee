"""The page of an analysis: one HTML file that needs no other, and no network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from msplora.extras import report_extra

from . import sections
from .charts import shown
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
    with report_extra():
        import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("msplora.analysis", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,  # names of adapters, kinds, levels and models come from files
    )
    environment.filters |= {
        "cell": cell,
        "shown": shown,
        "percent": percent,
        "average": mean,
        "short": short,
    }
    return environment.get_template("page.html.j2").render(
        analysis=analysis,
        several=len(analysis.adapters) > 1,
        sections=sections,
    )


def percent(value: Number) -> str:
    """A share in percent."""
    return shown(value, share=True)


def short(name: str) -> str:
    """A path's last two parts: a page is shown around, and folders of this machine are not."""
    return "/".join(Path(name).parts[-2:]) if Path(name).is_absolute() else name


def cell(value: Number) -> Cell:
    """A share, or a cosine, as a whole number of hundredths on its colour."""
    if value is None:
        return Cell("–", "")
    hundredths = round(value * 100)
    steps = round(abs(hundredths) / 5)
    return Cell(str(hundredths), f"n{steps}" if hundredths < 0 and steps else f"h{steps}")
