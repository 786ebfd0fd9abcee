"""Render the result files of the benchmarks to a page with plots.

The same results give the same bytes: `render_page` is what a test compares a committed page with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from msplora.errors import MSPLoraError
from msplora.extras import report_extra

from .reading import Results, is_on_gpu, read_results
from .tables import MIN_ROUNDS, escape

if TYPE_CHECKING:
    from .section import Plot, Section

# Every plot that a page may have: one that no longer has its rows is removed.
PLOTS = ("main", "sites", "sweep", "depth", "memory")
_MISSING = {
    "main": "Not measured yet: `msplora bench speed`.",
    "sites": "Not measured yet: `msplora bench sites`.",
    "sweep": "Not measured yet: `msplora bench speed`.",
    "modes": "Not measured yet: `msplora bench speed`.",
    "memory": "Not measured yet: `msplora bench memory`.",
    "inject": "Not measured yet: `msplora bench size`.",
    "adapter_files": "Not measured yet: `msplora bench size`.",
    "singular_values": "Not measured yet: `msplora bench size`.",
    "gpu": "The script `benchmarks/gpu.py` has not been run.",
}


@dataclass(frozen=True)
class Page:
    """The page's text, and its plots by file name."""

    text: str
    plots: dict[str, bytes]


def render_page(results: Path, folder: str = "benchmarks") -> Page:
    """Render the results in a folder.

    Args:
        results: the folder with the result files.
        folder: where the page finds its plots, from its own place.

    Raises:
        MSPLoraError: a result file is not as it should be, or jinja2 or matplotlib is missing.
    """
    files = read_results(results)
    with report_extra():
        import jinja2

        from . import sections

        found: dict[str, Section] = {
            "main": sections.main(files),
            "sites": sections.sites(files),
            "sweep": sections.sweep(files),
            "modes": sections.modes(files),
            "memory": sections.memory(files),
            "inject": sections.inject(files),
            "adapter_files": sections.adapter_files(files),
            "singular_values": sections.singular_values(files),
            "gpu": sections.gpu(files),
        }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("msplora.bench", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        autoescape=False,  # it is Markdown: `escape` has seen to what comes from files
    )
    text = environment.get_template("page.md.j2").render(
        **{
            name: section.markdown(quote(folder), _MISSING[name]) for name, section in found.items()
        },
        min_rounds=MIN_ROUNDS,
        hardware=" and on ".join(dict.fromkeys(escape(file.hardware) for file in files)),
        rounds=_rounds(files),
        commits=_commits(files),
        origins="\n\n".join(_origin(file) for file in files),
    )
    drawn: list[Plot] = [plot for section in found.values() for plot in section.plots]
    return Page(text.rstrip() + "\n", {f"{plot.name}.svg": plot.svg for plot in drawn})


def write_page(results: Path, output: Path) -> list[Path]:
    """Render the results to `output` and its plots to the folder of the same name beside it.

    Returns:
        The files written, the page first.
    """
    if output.suffix != ".md":
        raise MSPLoraError(f"the page is Markdown: {output} should end in .md")
    page = render_page(results, output.stem)
    folder = output.with_suffix("")
    try:
        (folder if page.plots else output.parent).mkdir(parents=True, exist_ok=True)
        for name in PLOTS:
            (folder / f"{name}.svg").unlink(missing_ok=True)
        written = {output: page.text.encode()}
        written |= {folder / name: svg for name, svg in page.plots.items()}
        for path, content in written.items():
            path.write_bytes(content)
    except OSError as error:
        raise MSPLoraError(f"the page cannot be written: {error}") from None
    return list(written)


def _rounds(files: list[Results]) -> str:
    """Say how often the steps on a CPU were measured."""
    found = [
        row["rounds"]
        for file in files
        if file.kind == "speed"
        for row in file.rows
        if not is_on_gpu(row)
    ]
    if not found:
        return ""
    low, high = min(found), max(found)
    number = f"{low}" if low == high else f"{low} to {high}"
    return f", with {number} rounds for each point of the steps on the CPU"


def _commits(files: list[Results]) -> str:
    """Say whether all files are of the same code."""
    found = list(dict.fromkeys(escape(file.commit) for file in files))
    if len(found) == 1:
        return f"all at commit {found[0]}"
    return (
        f"at {len(found)} commits ({', '.join(found)}), by file; what differs between files may be "
        f"the code"
    )


def _origin(file: Results) -> str:
    """Say where a file's numbers come from."""
    rows = f"{len(file.rows)} row{'s' * (len(file.rows) != 1)}"
    threads = f"; {file.threads} thread{'s' * (file.threads != 1)}"
    hardware = file.hardware if "thread" in file.hardware else file.hardware + threads
    versions = ", ".join(f"{name} {version}" for name, version in file.versions.items())
    about = f"{file.kind}, {rows}; commit {file.commit}; {hardware}; {versions}."
    # A continued sweep has several commands. An indented block takes whatever they hold.
    commands = [" ".join(line.split()) for line in file.command.split(" && ")]
    block = "\n".join(f"    {line}" for line in commands if line)
    return f"### {escape(file.name)}\n\n{escape(about)}\n\n{block}"
