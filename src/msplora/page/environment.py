"""How a page is made from its template: everything is escaped, nothing is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from msplora.extras import report_extra

if TYPE_CHECKING:
    import jinja2


def environment(package: str) -> jinja2.Environment:
    """The templates of a package, and the theme of all pages.

    Args:
        package: the one that holds page.html.j2, and what that includes.

    Raises:
        MSPLoraError: jinja2 is not installed.
    """
    with report_extra():
        import jinja2

    found = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader(package, "."), jinja2.PackageLoader("msplora.page", ".")]
        ),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,  # names of adapters, kinds, levels and models come from files
    )
    found.filters["short"] = short
    return found


def short(name: str) -> str:
    """A path's last two parts: a page is shown around, and folders of this machine are not."""
    return "/".join(Path(name).parts[-2:]) if Path(name).is_absolute() else name
