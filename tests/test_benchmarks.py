"""The numbers in benchmarks/README.md are those of the result files, which name their origin."""

from __future__ import annotations

import ast
import importlib
import json
import re
import runpy
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from msplora.bakeoff.report import NOT_OVER
from msplora.bench.measured import Measured, gather
from msplora.bench.reading import STEP, Results, read_results
from msplora.bench.tables import Verdict, overhead_share, ratio_to_lora, rounded, spread, verdict
from msplora.train.target import find_target

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
# Of a bake-off its rows; its runs may lie beside them, where it has been run.
RESULTS = sorted(
    its
    for its in (*(BENCHMARKS / "results").iterdir(), *BENCHMARKS.glob("results/*/results.jsonl"))
    if its.is_file()
)
TRAINING_PAGE = BENCHMARKS.parent / "docs" / "training.md"
TEXT = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
NAMES = {"lora": "LoRA, r = 8", "lora, r = 6": "LoRA, r = 6"}


def rows_of(name: str) -> list[dict[str, Any]]:
    with (BENCHMARKS / "results" / name).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def mean_of(values: list[float]) -> str:
    """A mean with the lowest and the highest, or the one value there is."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else ""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def table(rows: list[dict[str, Any]], value: str) -> list[str]:
    """Methods against learning rates, as the README has them."""
    rates = sorted({row["learning_rate"] for row in rows})
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row["name"]][row["learning_rate"]].append(row[value])
    parameters = {row["name"]: row["trainable"] for row in rows}
    shown = [f"lr {rate:.0e}".replace("e-0", "e-") for rate in rates]
    lines = [f"| | parameters | {' | '.join(shown)} |", "|---|---:|" + "---|" * len(rates)]
    for name, by_rate in found.items():
        cells = " | ".join(mean_of(by_rate[rate]) for rate in rates)
        lines.append(f"| {NAMES.get(name, name)} | {parameters[name]:,} | {cells} |")
    return lines


def section(heading: str) -> str:
    """The text below a heading, up to the next."""
    return TEXT.partition(f"## {heading}")[2].partition("\n## ")[0]


def check_origins(records: list[dict[str, Any]], text: str) -> None:
    for record in records:
        if record.get("status") == "unfinished":
            continue  # a run of a bake-off that was stopped: it has no result
        assert re.match(r"[0-9a-f]{7,}$", record["commit"])
        assert record["hardware"]
        assert {"torch", "transformers", "peft", "python"} <= set(record["versions"])
    assert not re.search(r"/(work|tmp|root|home|Users)\b", text)


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: f"{file.parent.name}-{file.name}")
def test_a_result_says_where_it_is_from_and_names_no_folder_of_a_machine(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else None
    check_origins(records or [json.loads(text)], text)
    assert str(file.relative_to(BENCHMARKS / "results")) in TEXT


def test_the_readme_of_the_benchmarks_names_no_folder_of_a_machine() -> None:
    assert not re.search(r"/(work|tmp|root|home|Users)\b", TEXT)
    for script in re.findall(r"python benchmarks/(\w+\.py)", TEXT):
        assert (BENCHMARKS / script).is_file()


def test_the_readme_says_what_a_step_costs_beside_lora() -> None:
    """Its table and sentences, with the page's own rounding, which never favours us."""
    readme = (BENCHMARKS.parent / "README.md").read_text(encoding="utf-8")
    part = readme.partition("**Speed and memory.**")[2].partition("- **")[0]
    files = {its.name: its for its in read_results(BENCHMARKS / "results")}
    shown = [line.strip() for line in part.splitlines() if line.strip().startswith("| ")]
    assert shown[1:] == what_a_step_costs(files)

    text = " ".join(part.split())
    # One verdict is made of all of them, so they are of one processor, and it is said where they
    # are not of one commit.
    assert len({its.hardware for its in files.values()}) == 1
    several = len({its.commit for its in files.values()}) > 1
    assert ("of which of several commits it is" in text) == several
    points = gather(files.values(), "speed", (*STEP, "compiled"))
    found = Counter(map(verdict, points))
    above = [
        point
        for point in points
        if verdict(point) is Verdict.LEVEL and point.rows["msplora"]["to_lora"][1] > 1
    ]
    assert found[Verdict.UNJUDGED] == 0
    assert f"Of {len(points)} points" in text
    assert (
        f"it is faster at {found[Verdict.FASTER]} and slower at {found[Verdict.SLOWER] or 'none'}"
        in text
    )
    assert f"at {len(above)} of the others its median is above LoRA's" in text
    worst = max(point.rows["msplora"]["to_lora"][1] for point in points)
    assert f"at most {rounded(worst, 3, 'msplora')}" in text


def what_a_step_costs(files: dict[str, Results]) -> list[str]:
    """The lines of the README's table: all linear layers, then query and value."""

    def at(file: str, batch: int, length: int = 128, **keys: Any) -> list[Measured]:
        found = []
        for targets in ("all-linear", "qv"):
            keys |= {"shape": "roberta-base", "layers": 12, "targets": targets}
            wanted = {"dtype": "float32", "batch": batch, "length": length} | keys
            its = files[file]
            found += gather([its], its.kind, wanted, lambda row, w=wanted: w.items() <= row.items())
        return found

    def line(name: str, cells: list[str]) -> str:
        return f"| {name} | {' | '.join(cells)} |"

    def step(name: str, points: list[Measured], method: str = "msplora") -> str:
        return line(name, [spread(its.rows[method]["to_lora"], 3, method) for its in points])

    def share(name: str, points: list[Measured], method: str = "msplora") -> str:
        found = [overhead_share(its, method) for its in points]
        return line(name, [rounded(its, 3, method) if its else "in the noise" for its in found])

    def memory(name: str, *points: Measured) -> str:
        cells = []
        for point in points:
            fields = ("peak_live_bytes", "step_live_bytes")
            shares = (ratio_to_lora(point, "msplora", field) for field in fields)
            peak, own = (rounded(its, 3, "msplora") for its in shares if its is not None)
            cells.append(f"{peak}, of it {own}")
        return line(name, cells)

    main, few = at("speed-cpu.json", 8), at("speed-cpu.json", 1, 16)
    dtypes = ("bfloat16-autocast", "bfloat16")
    half = [at("speed-bfloat16-cpu.json", 4, dtype=its) for its in dtypes]
    live = [
        at("memory-cpu.json", batch, dtype=dtype, dropout=0.0)
        for batch, dtype in ((8, "float32"), (8, "bfloat16"), (1, "float32"))
    ]
    return [
        step("a step, 8 × 128 tokens, float32", main),
        step("the same LoRA once more", main, "lora-again"),
        share("of what LoRA adds to the frozen model's step", main),
        share("the same LoRA once more", main, "lora-again"),
        step("a step, 4 × 128, bfloat16 autocast", half[0]),
        step("a step, 4 × 128, bfloat16", half[1]),
        step("a step, 1 × 16, float32", few),
        memory("memory, 8 × 128, float32", *live[0]),
        memory("memory, 8 × 128, bfloat16", *live[1]),
        memory("memory, 1 × 128, float32", *live[2]),
    ]


def test_mrpc() -> None:
    text = section("MRPC")
    rows = rows_of("mrpc-minilm.jsonl")
    assert f"{len(rows)} runs" in text
    best = []
    for name in ("lora", "pyramid", "pyramid, split alpha"):
        by_rate = defaultdict(list)
        for row in rows:
            if row["name"] == name:
                by_rate[row["learning_rate"]].append(row["accuracy"])
        best.append(f"{max(statistics.mean(found) for found in by_rate.values()):.3f}")
    assert f"({', '.join(best)})" in text


def test_sorting() -> None:
    text = section("Sorting")
    content = json.loads((BENCHMARKS / "results/sort-descending.json").read_text())
    assert "\n".join(table(content["runs"], "descending")) in text
    before = content["before"]
    assert f"ascending {before['ascending']:.3f}, descending {before['descending']:.3f}" in text
    for run in content["runs"]:
        assert run["reloaded"] == run["descending"]
        assert run.get("converted", run["descending"]) == run["descending"]


@pytest.mark.parametrize("data", ["instruction-data.json", "tinyshakespeare.txt"])
def test_stories(data: str) -> None:
    text = section("Instructions and plain text")
    rows = [row for row in rows_of("stories260k.jsonl") if row["data"] == data]
    assert "\n".join(table(rows, "after")) in text
    (before,) = {round(row["before"], 3) for row in rows}
    assert f"before training {before:.3f}" in text


def test_stories_reloaded_and_converted() -> None:
    text = section("Instructions and plain text")
    rows = rows_of("stories260k.jsonl")
    pyramids = [row for row in rows if "converted" in row]
    reloaded = max(abs(row["reloaded"] - row["after"]) for row in rows)
    converted = max(abs(row["converted"] - row["after"]) for row in pyramids)
    logits = max(row["largest_logit_difference"] for row in pyramids)
    assert f"{len(rows)} runs, {len(pyramids)} of them pyramids" in text
    assert f"reloaded: {reloaded:.1e}; converted: {converted:.1e}; logits: {logits:.1e}" in text


def test_every_killed_run_ended_in_the_same_bits() -> None:
    runs = rows_of("interruptions.jsonl")
    kills = sum(run["killed"] + run["killed_again"] for run in runs)
    assert all(run["same_bits"] for run in runs)
    assert f"{len(runs)} runs, {kills} kills, {len(runs)} times the same bits" in section(
        "Killed runs"
    )
    random_moments = [run for run in runs if run["moment"].endswith(" s")]
    assert len(random_moments) == 2 * 12


def test_the_dry_runs_table_and_its_worst_error_are_those_of_the_results() -> None:
    rows = rows_of("dry-run.jsonl")
    lines = [
        f"| {row['case']} | {row['training_measured'] / 2**20:,.0f} | {row['training_error']:+.2%} "
        f"| {row['evaluation_error']:+.2%} | {row['resident_error']:+.1%} |"
        for row in rows
    ]
    assert len(lines) >= 10
    shown = section("What the dry run foresees").splitlines()
    assert [line for line in shown if line.startswith("| ") and "error" not in line] == lines
    errors = [abs(row[f"{phase}_error"]) for row in rows for phase in ("training", "evaluation")]
    assert max(errors) < 0.1
    worst = f"{max(errors):.2%}".replace("%", " %")
    assert f"was within {worst} of the bytes" in TRAINING_PAGE.read_text(encoding="utf-8")


def test_the_processes_of_the_dry_runs_would_have_fitted_as_foreseen() -> None:
    machine = find_target("cpu:64GB")
    for row in rows_of("dry-run.jsonl"):
        peak = max(row["training_estimate"], row["evaluation_estimate"])
        weights = row["parts"].get("frozen weights", 0) + row["parts"]["weights that train"]
        assert row["resident_growth"] <= peak + machine.overhead(peak, weights), row["case"]


def test_what_an_analysis_costs() -> None:
    text = section("What an analysis costs")
    *rows, intruders = rows_of("analyse.jsonl")
    names = {"lora": "LoRA, r = 28", "pyramid": "pyramid, 16 + 8 + 4"}
    for row in rows:
        sizes = [f"{row[key] / 2**20:,.0f}" for key in ("factor_bytes", "resident_growth")]
        name = f"{row['model']}, {row['layers']} layers, {names[row['method']]}"
        assert f"| {name} | {row['seconds']:.1f} | {' | '.join(sizes)} |" in text
    assert len(rows) == 4
    assert f"4096 × 4096 took {intruders['seconds']:.0f} seconds" in text


SCRIPTS = [*BENCHMARKS.rglob("*.py"), *(BENCHMARKS.parent / "tests/contract").glob("*.py")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda its: its.stem)
def test_what_a_script_imports_of_the_library_is_there(script: Path) -> None:
    """They run by hand, some in environments of other tools: a name that moved is found here."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "msplora":
            module = importlib.import_module(node.module or "")
            for its in node.names:
                if not hasattr(module, its.name):
                    importlib.import_module(f"{node.module}.{its.name}")


def test_the_tables_of_the_results_are_those_of_the_reports() -> None:
    names = runpy.run_path(str(BENCHMARKS / "results_page.py"))
    page = names["PAGE"].read_text(encoding="utf-8")
    assert page.count("<!-- end of table -->") == page.count("<!-- table: ") == 10
    assert names["filled"](page) == page


def test_a_table_of_a_bake_off_that_is_not_over_says_so(tmp_path: Path) -> None:
    names = runpy.run_path(str(BENCHMARKS / "results_page.py"))
    report = tmp_path / "benchmarks/results/half/report.md"
    report.parent.mkdir(parents=True)
    names["filled"].__globals__["ROOT"] = tmp_path
    page = "<!-- table: half, How they stand -->\n<!-- end of table -->"
    table = "## How they stand\n\n| a |\n| --- |\n\nA note.\n"
    report.write_text(f"# Bake-off\n\n{table}")
    assert NOT_OVER not in names["filled"](page)
    report.write_text(f"# Bake-off\n\n{NOT_OVER}\n\n{table}")
    assert f"| --- |\n\n{NOT_OVER}\n<!-- end" in names["filled"](page)


def test_what_a_bake_off_was_stopped_at_needs_no_commit_and_names_no_folder() -> None:
    rows: list[dict[str, Any]] = [{"status": "unfinished", "commit": None, "error": None}]
    check_origins(rows, json.dumps(rows))
    rows[0]["error"] = "The last checkpoint is /tmp/checkpoint-3"
    with pytest.raises(AssertionError):
        check_origins(rows, json.dumps(rows))
    with pytest.raises((AssertionError, TypeError)):
        check_origins([{"status": "complete", "commit": None}], "")
