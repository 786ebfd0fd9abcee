"""One section of the page, and how it is laid out."""

from __future__ import annotations

from dataclasses import dataclass, field

from .tables import Table


@dataclass(frozen=True)
class Plot:
    """A picture of the page."""

    name: str
    alt: str
    svg: bytes


@dataclass(frozen=True)
class Section:
    """What a section shows; without a table there is nothing measured."""

    table: Table | None = None
    same: str = ""
    claims: list[str] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    more: Table | None = None
    more_title: str = ""

    def markdown(self, folder: str, missing: str) -> str:
        """Write the section, its plots in `folder`; `missing`, if there is nothing to show."""
        if self.table is None:
            return missing
        parts = [f"Everywhere here: {self.same}."] if self.same else []
        bullet = "- " if len(self.claims) > 1 else ""
        parts += ["\n".join(bullet + claim for claim in self.claims)] if self.claims else []
        parts += [f"![{plot.alt}]({folder}/{plot.name}.svg)" for plot in self.plots]
        parts.append(str(self.table))
        if self.more is not None:
            parts.append(f"<details><summary>{self.more_title}</summary>")
            parts += [str(self.more), "</details>"]
        return "\n\n".join(parts)
