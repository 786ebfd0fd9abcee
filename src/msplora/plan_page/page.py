"""The page of a plan: one HTML file that needs no other, and no network."""

from __future__ import annotations

from msplora import __version__
from msplora.page.environment import environment
from msplora.pyramid import Plan

from .embedded import embedded


def render(plan: Plan, model: str | None = None) -> str:
    """The page of a plan.

    Args:
        plan: what is drawn.
        model: the name of the model, for the title.

    Raises:
        MSPLoraError: jinja2 is not installed.
    """
    template = environment("msplora.plan_page").get_template("page.html.j2")
    return template.render(
        plan=plan, model=model, embedded=embedded(plan), version=__version__, share=_share
    )


def _share(part: int, whole: int) -> str:
    """As the page's script writes it, and the terminal."""
    return f"{100 * part / whole:.1f}%"
