"""The page of the benchmarks says what its result files say, and no more."""

from __future__ import annotations

import json
import re
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Any

import pytest

import made_up_results as made_up
from msplora.bench.measured import METHODS
from msplora.bench.render import render_page
from msplora.bench.tables import (
    MIN_ROUNDS,
    escape,
    faster_beyond_spread,
    rounded,
    slower_beyond_spread,
    spread,
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    made_up.write_all(folder)
    return folder


@pytest.fixture(scope="module")
def text(results: Path) -> str:
    return render_page(results).text


def section(text: str, heading: str) -> str:
    found = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    assert found, f"no section {heading}"
    return found


def rows_of(markdown: str) -> list[dict[str, str]]:
    """The lines of a section's tables, by their headers; an escaped bar is part of a cell."""
    lines = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in markdown.splitlines()
        if line.startswith("|")
    ]
    assert all(len(line) == len(lines[0]) for line in lines)
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def numbers(cell: str) -> list[Decimal]:
    """The numbers of a cell `median (lower to upper)`, in the order of a file."""
    middle, lower, upper = (Decimal(part.replace(",", "")) for part in re.findall(r"[\d.,]+", cell))
    return [lower, middle, upper]


def speed(folder: Path, *points: dict[str, Any]) -> str:
    """The page of one file of steps."""
    rows = [row for keys in points for row in made_up.step_rows(**keys)]
    made_up.write(folder, "speed.json", "speed", rows)
    return render_page(folder).text


def test_every_ratio_of_the_main_point_is_its_row_s_and_none_is_rounded_in_our_favour(
    text: str,
) -> None:
    shown = {row["method"].strip("*"): row for row in rows_of(section(text, "A step, all methods"))}
    rows = made_up.step_rows(made_up.COSTS)
    assert len(shown) == len(rows)
    for row in rows:
        line = shown[METHODS[row["method"]]]
        assert line["trainable"] == f"{row['trainable']:,}"
        for header, field in (("÷ floor", "to_floor"), ("÷ LoRA", "to_lora")):
            for cell, value in zip(numbers(line[header]), row[field], strict=True):
                off = cell - Decimal(repr(value))
                assert abs(off) < Decimal("0.001")
                assert off >= 0 if row["method"] == "msplora" else off <= 0


def test_the_overhead_is_a_share_of_lora_s_and_needs_one(tmp_path: Path) -> None:
    page = speed(tmp_path / "a", {"ours": 1.1})
    costs = {row["method"]: row["to_floor"][1] for row in made_up.step_rows(ours=1.1)}
    share = 100 * (costs["msplora"] - 1) / (costs["lora"] - 1)
    (line,) = [
        row for row in rows_of(section(page, "A step, all methods")) if "**" in row["method"]
    ]
    found = float(line["share of LoRA's overhead"].rstrip("%"))
    assert share <= found < share + 0.1
    again = Decimal(100 * (costs["lora-again"] - 1) / (costs["lora"] - 1)).quantize(
        Decimal("0.1"), ROUND_FLOOR
    )
    assert (
        f"its overhead over the floor is {found}% of LoRA's (that of LoRA measured again, {again}%)"
        in page
    )
    rows = [row | {"to_floor": [1, 1, 1]} for row in made_up.step_rows()]
    made_up.write(tmp_path / "b", "speed.json", "speed", rows)
    assert "its overhead over the floor is" not in render_page(tmp_path / "b").text


@pytest.mark.parametrize(
    ("ours", "again", "slower", "faster"),
    [
        ([1.0, 1.02, 1.03], [0.99, 1.0, 1.01], True, False),
        ([1.0, 1.01, 1.03], [0.99, 1.0, 1.01], False, False),  # as large as the band is not above
        ([0.9, 0.99, 1.1], [0.95, 0.96, 0.98], False, False),  # above the band, but not above 1
        ([0.9, 0.98, 1.0], [0.99, 1.0, 1.01], False, True),
        ([0.9, 1.01, 1.1], [1.02, 1.03, 1.04], False, False),
    ],
)
def test_slower_and_faster(
    ours: list[float], again: list[float], slower: bool, faster: bool
) -> None:
    assert slower_beyond_spread(ours, again) is slower
    assert faster_beyond_spread(ours, again) is faster


def test_no_share_is_given_of_an_overhead_that_is_noise(tmp_path: Path) -> None:
    rows = made_up.step_rows(ours=0.999, again=1.01, batch=1)
    small = {"lora": 1.012, "lora-again": 1.013, "msplora": 1.011, "floor": 1.0}
    rows = [row | {"to_floor": made_up.around(small[row["method"]])} for row in rows]
    rows += made_up.step_rows(batch=8)
    made_up.write(tmp_path, "speed.json", "speed", rows)
    found = section(render_page(tmp_path).text, "Batch, length and depth")
    shares = [row["its share of LoRA's overhead"] for row in rows_of(found)]
    assert shares[0] == "–"  # LoRA adds 1.2 %, and its control reaches 1.4 %
    assert shares[1].endswith("%")
    assert f"overhead over the floor is {shares[1]} of LoRA's, at the 1 point of 2 where" in found
    controls = [row["LoRA again's share"] for row in rows_of(found)]
    assert controls[0] == "–"
    assert f"that of LoRA measured again, {controls[1]}." in found


def test_the_side_on_which_points_inside_the_spread_lie_is_said(tmp_path: Path) -> None:
    page = speed(
        tmp_path,
        {"ours": 1.0021, "again": 1.0, "batch": 1},
        {"ours": 1.0012, "again": 1.0, "batch": 2},
        {"ours": 0.999, "again": 1.0, "batch": 4},
        {"ours": 1.2, "again": 1.0, "batch": 8},
    )
    found = section(page, "Batch, length and depth")
    assert (
        "Inside the spread its median is above LoRA's at 2 of 3 points, by at most 0.3%." in found
    )
    verdicts = [row["MSPLoRA is"] for row in rows_of(found)]
    assert verdicts == ["inside the A/A spread"] * 3 + ["**slower**"]


def test_the_points_where_ours_is_slower_are_counted_and_named(text: str) -> None:
    found = section(text, "Batch, length and depth")
    assert "At 10 of 11 points, MSPLoRA is not slower" in found
    assert "it is at: 12 layers, batch 1, length 32." in found
    assert "Beyond that spread it is faster at 1 point." in found
    verdicts = [row["MSPLoRA is"] for row in rows_of(found)]
    assert verdicts.count("**slower**") == verdicts.count("faster") == 1
    assert len(verdicts) == 11
    sites = section(text, "Single sites")
    assert "At 0 of 3 points" in sites
    assert all(row["MSPLoRA is"] == "**slower**" for row in rows_of(sites))


def test_a_point_without_a_control_or_with_few_rounds_is_shown_and_not_judged(
    tmp_path: Path,
) -> None:
    page = speed(
        tmp_path,
        {"batch": 1},
        {"batch": 2, "methods": ("floor", "lora", "msplora")},
        {"batch": 4, "rounds": MIN_ROUNDS - 1},
        {"batch": 8, "methods": ("floor", "lora", "lora-again")},
    )
    found = section(page, "Batch, length and depth")
    assert "At 1 of 1 point," in found
    assert (
        "Not judged: batch 2 (no LoRA again (A/A)); batch 4 (59 rounds); batch 8 (no MSPLoRA)."
        in found
    )
    assert [row["batch"] for row in rows_of(found)] == ["1", "2", "4", "8"]
    assert f"fewer than {MIN_ROUNDS} rounds" in page
    assert "59 to 60 rounds" in page


def test_the_same_point_of_two_files_is_told_apart_by_them(tmp_path: Path) -> None:
    for name, ours in (("a.json", 1.0), ("b.json", 1.2)):
        made_up.write(tmp_path, name, "speed", made_up.step_rows(ours=ours))
    found = section(render_page(tmp_path).text, "Batch, length and depth")
    assert "At 1 of 2 points" in found
    assert "it is at: b.json." in found


def test_two_machines_are_told_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        made_up.write(
            tmp_path, f"{name}.json", "sites", made_up.site_rows(), hardware=f"CPU {name}"
        )
    page = render_page(tmp_path).text
    assert "Measured on CPU one and on CPU two" in page
    assert [row["hardware"] for row in rows_of(section(page, "Single sites"))] == [
        "CPU one",
        "CPU two",
    ]


def test_compiled_and_checkpointed_steps_stand_beside_the_plain_ones(text: str) -> None:
    found = section(text, "Compiled, and with gradient checkpointing")
    assert "At 2 of 2 points" in found  # the plain one has been judged above
    shown = [(row["checkpointing"], row["compiled"]) for row in rows_of(found)]
    assert shown == [("none", "no"), ("gradient", "no"), ("none", "yes")]


def test_checkpointing_may_be_named(tmp_path: Path) -> None:
    page = speed(tmp_path, {"checkpointing": "none"}, {"checkpointing": "non-reentrant"})
    assert "no checkpointing" in section(page, "A step, all methods")
    shown = rows_of(section(page, "Compiled, and with gradient checkpointing"))
    assert [row["checkpointing"] for row in shown] == ["none", "non-reentrant"]


def test_other_methods_are_shown_wherever_they_were_measured(tmp_path: Path) -> None:
    page = speed(
        tmp_path,
        {"methods": tuple(made_up.COSTS)},
        {"methods": (*made_up.FEW, "vera"), "batch": 1, "compiled": True},
    )
    more = section(page, "A step, all methods").partition("All methods at 1 more point")[2]
    assert "VeRA" in more
    assert "| 1 |" in more


def test_memory_files_and_singular_values(text: str) -> None:
    memory = section(text, "Memory")
    rows = made_up.memory_rows()
    lora, ours = (next(r for r in rows if r["method"] == name) for name in ("lora", "msplora"))
    for field, what in (
        ("peak_live_bytes", "the peak of live tensors"),
        ("step_live_bytes", "what a step adds to those that live from step to step"),
    ):
        ratio = rounded(Decimal(ours[field]) / lora[field], 3, "msplora")
        assert f"At 0 of 2 points, {what} with MSPLoRA is no higher than LoRA's" in memory
        assert f"higher at: no checkpointing ({ratio} of LoRA's)" in memory
    assert rows_of(memory)[-1]["peak of live tensors, MiB"] == "1,012.1"  # 1,012.01, rounded up
    assert rows_of(memory)[-1]["of it the step's, MiB"] == "612.1"
    files = section(text, "Files")
    assert "At 1 of 1 point, the file of MSPLoRA is no larger than LoRA's." in files
    assert [row["file, bytes"] for row in rows_of(files)] == ["1,183,969", "545,001"]
    assert "Saving it takes 0.701 of LoRA's time." in files
    assert "Loading it takes 0.701 of LoRA's time." in files
    injection = section(text, "Plan and injection")
    assert "0.912 (0.903 to 0.922)" in injection
    assert "Planning and injecting a pyramid takes 0.912 of LoRA's time." in injection
    lora_s, ours_s = (row["ms per layer"] for row in rows_of(injection))
    assert lora_s.startswith("6.66 (")  # 80 ms, 12 layers
    assert ours_s.startswith("6.08 (")
    values = section(text, "Singular values")
    assert "275.0 times as fast" in values  # 275.04, rounded down
    assert "difference is 3.3e-06" in values  # 3.21e-06, rounded up


def test_a_time_stands_beside_the_control_s(tmp_path: Path) -> None:
    model = {"what": "inject", "shape": "roberta-base", "targets": "qv", "rounds": 20}
    rows = [
        {**model, "layers": layers, "method": method, "seconds": 0.1, "to_lora": ratio}
        for layers, ours in ((8, 1.0811), (32, 1.0567))
        for method, ratio in (("lora", 1.0), ("lora-again", 0.999), ("msplora", ours))
    ]
    made_up.write(tmp_path, "size.json", "size", rows)
    found = section(render_page(tmp_path).text, "Plan and injection")
    assert (
        "Planning and injecting a pyramid takes 1.057 to 1.082 of LoRA's time; LoRA measured "
        "against itself, 0.999." in found
    )


def test_memory_is_drawn_where_our_share_is_largest(tmp_path: Path) -> None:
    rows = made_up.memory_rows(dtype="bfloat16") + made_up.memory_rows(dtype="float32", batch=1)
    for row in rows:
        if row["dtype"] == "bfloat16" and row["method"] == "msplora":
            row["step_live_bytes"] //= 2
    made_up.write(tmp_path, "memory.json", "memory", rows)
    assert "where MSPLoRA's share is largest: float32, batch 1, MiB" in render_page(tmp_path).text


def test_the_page_says_whether_all_files_are_of_one_commit(tmp_path: Path) -> None:
    made_up.write(tmp_path, "a.json", "speed", made_up.step_rows())
    assert "all at commit 0123abc." in render_page(tmp_path).text
    made_up.write(tmp_path, "b.json", "sites", made_up.site_rows(), commit="4567def")
    assert "at 2 commits (0123abc, 4567def), by file" in render_page(tmp_path).text


def test_a_gpu_has_a_section_of_its_own(text: str, tmp_path: Path) -> None:
    found = rows_of(section(text, "On a GPU"))
    assert len(found) == len(made_up.COSTS)
    assert found[-1]["method"] == "**MSPLoRA**"
    assert found[-1]["tokens per second"] == "123,456"
    assert found[0]["tokens per second"] == "123,457"
    assert "bfloat16" not in section(text, "Batch, length and depth")
    made_up.write(tmp_path, "memory.json", "memory", made_up.memory_rows())
    page = render_page(tmp_path).text
    assert "The script `benchmarks/gpu.py` has not been run." in section(page, "On a GPU")


@pytest.mark.parametrize("kind", ["speed", "sites", "memory", "size"])
def test_a_page_of_one_kind_says_what_is_not_measured(kind: str, tmp_path: Path) -> None:
    rows = {
        "speed": made_up.step_rows(),
        "sites": made_up.site_rows(),
        "memory": made_up.memory_rows(),
        "size": made_up.size_rows(),
    }
    made_up.write(tmp_path, "only.json", kind, rows[kind])
    text = render_page(tmp_path).text
    for other in rows.keys() - {kind}:
        assert f"Not measured yet: `msplora bench {other}`." in text
    assert kind == "speed" or f"Not measured yet: `msplora bench {kind}`." not in text


def test_every_file_is_named_with_its_origin(text: str, results: Path) -> None:
    found = section(text, "Where the numbers come from")
    for path in results.iterdir():
        content = json.loads(path.read_text())
        about = found.partition(f"### {path.name}\n")[2].partition("\n### ")[0]
        assert f"\n    {content['command']}" in about
        assert content["commit"] in about
        assert content["hardware"] in about
        assert all(f"{name} {version}" in about for name, version in content["versions"].items())


def test_names_from_files_are_text(tmp_path: Path) -> None:
    rows = made_up.step_rows(
        (*made_up.FEW, "new|<b>*method*"), shape="a|b<i>$x$_y_", targets=["q", "v"]
    )
    command = "msplora bench ``` && <script>"
    made_up.write(tmp_path, "a|b.json", "speed", rows, command=command, hardware="<i>CPU</i> | x")
    page = render_page(tmp_path)
    shown = [row["method"] for row in rows_of(section(page.text, "A step, all methods"))]
    assert r"new\|&lt;b&gt;\*method\*" in shown
    assert r"a\|b&lt;i&gt;$x$\_y\_, 12 layers, q, v" in page.text
    assert "<i>" not in page.text
    assert "\n    msplora bench ```\n    <script>" in page.text  # in an indented block
    assert escape("a\n# b `c` [d](e) snake_case \\") == r"a # b \`c\` \[d\](e) snake_case \\"


def test_numbers_are_rounded_as_decimals() -> None:
    assert rounded(1.1, 3, "msplora") == rounded(1.1, 3, "lora") == "1.100"
    assert rounded(1.0001, 3, "msplora") == "1.001"
    assert rounded(1.0009, 3, "lora") == "1.000"
    assert rounded(12_345.6, 0, "msplora", large_is_good=True) == "12,345"
    assert spread([0.2, 0.25, 0.3], 1, "lora", 1e-3) == "250.0 (200.0 to 300.0)"
    assert spread(None, 1, "lora") == "–"
