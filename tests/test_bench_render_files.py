"""The page of the benchmarks: the files it is made of, and the files that it is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
from typer.testing import CliRunner

import made_up_results as made_up
from msplora.bench.render import PLOTS, render_page, write_page
from msplora.cli.bench_render import render
from msplora.errors import MSPLoraError
from msplora.extras import report_extra

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "docs" / "benchmarks.md"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    made_up.write_all(folder)
    return folder


def test_the_same_results_give_the_same_bytes(results: Path, tmp_path: Path) -> None:
    page = render_page(results)
    output = tmp_path / "docs" / "benchmarks.md"
    stale = output.with_suffix("") / "main.svg"
    stale.parent.mkdir(parents=True)
    stale.write_text("an earlier page's")
    written = write_page(results, output)
    assert page == render_page(results)
    assert output.read_text(encoding="utf-8") == page.text
    assert {path.name: path.read_bytes() for path in written[1:]} == page.plots
    assert set(page.plots) == {f"{name}.svg" for name in PLOTS}


def test_a_plot_that_has_no_rows_any_more_is_removed_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "page"
    folder.mkdir()
    for name in ("main.svg", "own.svg"):
        (folder / name).write_text("x")
    made_up.write(tmp_path / "results", "size.json", "size", made_up.size_rows())
    write_page(tmp_path / "results", tmp_path / "page.md")
    assert [path.name for path in folder.iterdir()] == ["own.svg"]


def test_plots_are_shown_with_a_text_and_say_no_date(results: Path) -> None:
    page = render_page(results, "its folder")
    for name, svg in page.plots.items():
        assert re.search(rf"!\[[^\]]{{20,}}\]\(its%20folder/{re.escape(name)}\)", page.text)
        ElementTree.fromstring(svg)
        assert b"<dc:date>" not in svg


GOOD = made_up.step_rows()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"rows": []}, "has no rows"),
        ({"kind": "sped"}, "unknown kind 'sped'.*'speed'"),
        (
            {"rows": [{k: v for k, v in GOOD[0].items() if k != "to_lora"}]},
            "row 1 has no 'to_lora'",
        ),
        ({"rows": [GOOD[0], GOOD[1] | {"seconds": [3, 2, 1]}]}, "row 2 has 'seconds' = .*quartile"),
        ({"rows": [GOOD[0] | {"to_lora": float("nan")}]}, "row 1 has 'to_lora' = nan"),
        ({"rows": [GOOD[0] | {"layers": "12"}]}, "row 1 has 'layers' = '12'; .* a whole number"),
        ({"rows": [GOOD[0], GOOD[0]]}, "two rows of method 'floor' at the same point"),
        ({"rows": ["x"]}, "row 1 is 'x'"),
        ({"commit": ""}, "'commit'"),
        ({"kind": "size", "rows": [{"what": "taste"}]}, "row 1 is about 'taste'"),
        ({"kind": "size", "rows": [{"what": "file", "shape": "x"}]}, "row 1 has no 'targets'"),
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_named(
    other: dict[str, Any], message: str, tmp_path: Path
) -> None:
    made_up.write(tmp_path, "bad.json", **({"kind": "speed", "rows": GOOD} | other))
    with pytest.raises(MSPLoraError, match=rf"bad\.json.*{message}"):
        render_page(tmp_path)


def test_other_files_are_left_alone_and_a_folder_of_nothing_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "learning.json").write_text('{"runs": []}')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "rows.jsonl").write_text('{"kind": "speed"}\n{')
    with pytest.raises(MSPLoraError, match=r"no file in .* is a result of `msplora bench`"):
        render_page(tmp_path)
    made_up.write(tmp_path, "size.json", "size", made_up.size_rows())
    assert "learning" not in render_page(tmp_path).text
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(MSPLoraError, match=r"broken\.json is not JSON"):
        render_page(tmp_path)
    with pytest.raises(MSPLoraError, match="is not a folder"):
        render_page(tmp_path / "nowhere")
    with pytest.raises(MSPLoraError, match=r"should end in \.md"):
        write_page(tmp_path, tmp_path / "page")


def test_a_missing_extra_is_named(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    expected = r"needs jinja2.*pip install -e '\.\[report\]' in msplora's clone"
    with pytest.raises(MSPLoraError, match=expected):
        render_page(results)
    with pytest.raises(ModuleNotFoundError, match="no_such"), report_extra():
        import no_such_module  # pyright: ignore[reportMissingImports] # noqa: F401


def test_the_command(results: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(render)
    output = tmp_path / "page.md"
    found = CliRunner().invoke(app, [str(results), "--output", str(output)])
    assert found.exit_code == 0, found.output
    assert "Wrote" in found.output
    assert output.is_file()


def test_the_command_s_file_imports_nothing_heavy() -> None:
    code = (
        "import sys, msplora.cli.bench_render, msplora.bench.render\n"
        "print(sorted({'torch', 'peft', 'matplotlib', 'jinja2'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.skipif(not COMMITTED.is_file(), reason="the page has not been rendered yet")
def test_the_committed_page_is_what_the_committed_results_render_to() -> None:
    page = render_page(ROOT / "benchmarks" / "results", COMMITTED.stem)
    assert COMMITTED.read_text(encoding="utf-8") == page.text
    folder = COMMITTED.with_suffix("")
    assert {path.name for path in folder.glob("*.svg")} == set(page.plots)
    creator = re.compile(rb"Matplotlib v([\d.]+)")
    for name, svg in page.plots.items():
        committed = (folder / name).read_bytes()
        # Another version of matplotlib may draw the same plot with other bytes.
        if creator.findall(committed) == creator.findall(svg):
            assert committed == svg
