"""The page of an analysis: nothing from a file is markup, nothing is fetched."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from rich.console import Console

import msplora
from adapted_llama import adapted
from html_page import Page, browser
from msplora.analysis import sections
from msplora.analysis.charts import Series, line_chart
from msplora.analysis.experts import drawn
from msplora.analysis.page import percent
from msplora.analysis.results import Ablation, Analysis, Checkpoint, SwitchedOff
from msplora.cli.analyse_table import print_analysis
from runs import msplora as command
from tiny import MODELS, llama

EVIL = '<script>alert("x")</script>\'"&'


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    adapted().save_pretrained(folder / "pyramid")
    lora = LoraConfig(r=14, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(llama(), lora).save_pretrained(folder / "lora")
    MODELS["llama"].model().save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module")
def found(folders: Path) -> Analysis:
    """Everything that a page can show."""
    found = msplora.analyse(folders / "pyramid", folders / "lora", base=str(folders / "base"))
    first, second = found.adapters
    history = tuple(Checkpoint(step, first.levels, 0.1, 0.2) for step in (10, 20))
    runs = (SwitchedOff((), 1.5, 0, 0, 0), SwitchedOff(("local",), 1.75, 0.25, 0.125, 0.375))
    first = replace(first, history=history, ablation=Ablation("rows.jsonl", 40, "token", runs))
    return replace(found, adapters=(first, second))


@pytest.fixture(scope="module")
def page(found: Analysis) -> Page:
    return Page(found.to_html())


def test_the_page_is_whole_and_needs_nothing_else(found: Analysis, page: Page) -> None:
    text = found.to_html()
    assert not re.findall(r"""src=|href=(?!"#)|url\(|@import|https?://""", text)
    sections = {attributes.get("id") for attributes in page.all("h2")}
    assert sections >= {"levels", "spectra", "between", "decoupling", "base", "data", "training"}
    assert "side" in sections
    links = {attributes["href"] for attributes in page.all("a")}
    assert {f"#{name}" for name in sections if name} <= links
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))


def test_what_is_drawn_can_be_read_and_reached_by_key(page: Page) -> None:
    ids = {attributes["id"] for _, attributes in page.elements if attributes.get("id")}
    drawn = [its for its in page.all("svg") if its.get("aria-hidden") != "true"]
    assert len(drawn) > 20
    for picture in drawn:
        assert picture["role"] == "img"
        assert set((picture["aria-labelledby"] or "").split()) <= ids
    # Behind each a table, and one for each of the four kinds. What can be wider is reached by Tab.
    assert len(page.all("details")) == len(drawn) + 4
    regions = [its for its in page.all("div") if its.get("class") == "wide"]
    assert len(regions) == len(page.all("table"))
    assert all(its["tabindex"] == "0" and its["aria-label"] for its in regions)
    # Landmarks are for the few parts of a page, and over a hundred tables are none.
    assert {its["role"] for its in regions} == {"group"}
    (button,) = page.all("button")
    assert "aria-pressed" not in button  # its name says what it does next
    assert all(its.get("scope") in ("col", "row") for its in page.all("th"))
    assert page.all("html")[0]["lang"] == "en"


def test_it_shows_the_numbers(found: Analysis, page: Page) -> None:
    text = " ".join(page.texts)
    kind = found.adapters[0].kinds[0]
    assert kind.similarity is not None
    for value in kind.similarity.columns[0]:
        assert str(round((value or 0) * 100)) in page.texts
    assert f"{kind.sites[0].levels['mid'].norm:.3g}" in text
    assert "+0.1250 to +0.3750" in text
    assert kind.intruders is not None
    assert f"{kind.intruders[0]} of the {kind.intruders[1]} vectors" in text


def test_a_kind_has_a_table_of_all_figures(found: Analysis, page: Page) -> None:
    kind = next(its for its in found.adapters[0].kinds if its.name == "self_attn.v_proj")
    said = [its.strip() for its in page.texts if its.strip()]
    start = said.index(f"{kind.name}, layer by layer") + 1
    header = ["layer", "level", "norm", "share", "effective rank", "stable rank", "numerical rank"]
    assert said[start : start + 8] == [*header, "‖s·BA‖ / ‖W₀‖"]
    rows = [said[at : at + 8] for at in range(start + 8, start + 8 * 17, 8)]
    expected = [
        (str(site.layer), level, its)
        for site in kind.sites
        for level, its in (*site.levels.items(), ("sum of all", site.update))
    ]
    for row, (layer, level, its) in zip(rows, expected, strict=True):
        assert row[:3] == [layer, level, f"{its.norm:.3g}"]
        assert row[4:] == [
            f"{its.effective_rank:.3g}",
            f"{its.stable_rank:.3g}",
            str(its.numerical_rank),
            f"{its.relative_norm:.3g}",
        ]


def test_no_two_lines_of_a_chart_look_alike(found: Analysis) -> None:
    css = (Path(sections.__file__).parent / "page.css").read_text(encoding="utf-8")
    adapter = found.adapters[0]
    kind, names = adapter.kinds[0], [f"level{place}" for place in range(7)]
    sites = tuple(replace(its, levels=dict.fromkeys(names, its.update)) for its in kind.sites)
    levels = tuple(replace(adapter.levels[0], level=name) for name in names)
    history = tuple(Checkpoint(step, levels, 0.1, 0.2) for step in (10, 20))
    charts = [
        sections.norms(replace(kind, sites=sites), names),
        sections.effective_ranks(replace(kind, sites=sites), names),
        *sections.over_training(replace(adapter, levels=levels, history=history)),
        sections.inside_coarser(kind, [its.level for its in adapter.levels]),
        sections.angles(kind),
        sections.explained(kind),
        *sections.side_by_side(found.comparisons[0]),
    ]
    for chart in charts:
        assert chart is not None
        styles = [line.style for line in chart.lines]
        assert len(set(styles)) == len(styles), chart.title
        for name in " ".join(styles).split():
            assert re.search(rf"\.{name}[,{{.]", css), name


def test_what_chance_would_give_stands_beside_two_adapters(folders: Path, found: Analysis) -> None:
    _, kind = found.comparisons[0].kinds
    assert (kind.kind, kind.random_columns, kind.random_rows) == (
        "self_attn.v_proj",
        14 / 16,
        14 / 32,
    )
    _, chart = sections.side_by_side(found.comparisons[0])
    assert chart.header[4:] == ("random columns", "random rows")
    assert {row[4] for row in chart.rows} == {percent(kind.random_columns)}
    out = command("analyse", folders / "pyramid", folders / "lora").out.rpartition("against")[2]
    assert out.count("random") == 2
    assert "87.5%" in out
    assert "43.8%" in out


def test_what_layers_with_nothing_in_common_would_give_stands_beside_them(
    folders: Path, found: Analysis, page: Page
) -> None:
    lora = found.adapters[1]
    kind = lora.kinds[1]
    angles, explained = sections.angles(kind), sections.explained(kind)
    assert angles is not None
    assert explained is not None
    assert kind.shared is not None
    assert kind.similarity is not None
    assert angles.header[3:] == ("random columns", "random rows")
    assert explained.header[4:] == ("random columns", "random rows", "a pair of random updates")
    assert [row[6] for row in explained.rows] == [percent(its) for its in kind.shared.random_pair]
    assert any("share pairs, so theirs are alike by\nconstruction" in its for its in page.texts)
    alone = replace(found, adapters=(lora,), comparisons=()).to_html()
    assert "construction" not in alone
    out = command("analyse", folders / "lora").out
    row = next(line for line in out.splitlines() if "v_proj" in line)
    shown = row.split()
    assert shown[4] == f"{kind.similarity.random_columns:.1%}"
    assert shown[6] == f"{kind.similarity.random_rows:.1%}"
    assert shown[7:] == [f"{its[-1]:.1%}" for its in (kind.shared.pair, kind.shared.random_pair)]


def test_adapters_side_by_side_have_one_scale_and_one_order(found: Analysis) -> None:
    pyramid, lora = found.adapters
    (large,) = (its for its in lora.kinds if its.name == "self_attn.v_proj")
    sites = tuple(replace(its, update=replace(its.update, norm=1e3)) for its in large.sites)
    large = replace(large, sites=sites)
    (other,) = (its for its in lora.kinds if its.name == "self_attn.q_proj")
    alone = replace(other, name="a.kind.of.its.own")
    both = pyramid, replace(lora, kinds=(alone, large, other))
    assert [its.name for its in drawn(both[1], both)] == [
        *(its.name for its in drawn(both[0], both)),
        "a.kind.of.its.own",
    ]
    for draw in (sections.norms, sections.effective_ranks):
        of_both = [
            draw(kind, [its.level for its in adapter.levels], both).y_ticks
            for adapter in both
            for kind in adapter.kinds
            if kind.name == "self_attn.v_proj"
        ]
        assert of_both[0] == of_both[1]
    assert sections.norms(pyramid.kinds[1], ["global"]).y_ticks != of_both[0]


def test_the_colours_of_heat_maps_have_a_scale(page: Page) -> None:
    maps = [its for its in page.all("figure") if "heat" in (its.get("class") or "").split()]
    scales = [its for its in page.all("span") if its.get("class") == "scale"]
    assert len(maps) == 3 * len(scales) > 0


def test_the_page_names_no_folder_above_those_that_were_given(found: Analysis) -> None:
    assert Path(found.adapters[0].base or "").is_absolute()
    text = found.to_html()
    for adapter in found.adapters:
        assert str(Path(adapter.path).parents[1]) not in text


def test_what_takes_long_is_said_before_it_is_done(folders: Path, found: Analysis) -> None:
    base = ["--base", folders / "base"]
    said = "Intruder dimensions take 16 dense singular value decompositions, of 8 weights of"
    result = command("analyse", folders / "lora", *base, "--json")
    assert said in result.error
    assert result.json()["version"]
    assert "--intruders 0" in result.error
    for more in ([*base, "--intruders", "0"], []):
        assert "decompositions" not in command("analyse", folders / "lora", *more).error
    assert "take dense decompositions" in found.to_html()
    assert "take dense" not in msplora.analyse(folders / "lora").to_html()


def test_names_from_files_are_escaped(found: Analysis) -> None:
    first, second = found.adapters
    kinds = tuple(replace(kind, name=EVIL) for kind in first.kinds)
    first = replace(first, name=EVIL, base=EVIL, kinds=kinds, notes=(EVIL,))
    first = replace(first, ablation=replace(first.ablation, data=EVIL))  # pyright: ignore
    evil = replace(found, adapters=(first, second)).to_html()
    assert "alert(" in evil
    assert "<script>alert" not in evil
    assert len(Page(evil).all("script")) == 1
    for _, attributes in Page(evil).elements:
        assert not any(name.startswith("on") for name in attributes)


def test_a_page_of_one_lora_has_no_empty_sections(folders: Path) -> None:
    page = Page(msplora.analyse(folders / "lora").to_html())
    sections = {attributes["id"] for attributes in page.all("h2") if attributes.get("id")}
    assert sections == {"levels", "spectra", "between"}


def test_of_many_experts_the_smallest_the_median_and_the_largest_are_drawn(
    found: Analysis,
) -> None:
    kind, *_ = found.adapters[0].kinds
    order = [7, 2, 11, 0, 5, 9, 1, 10, 3, 8, 6, 4]  # an expert's norm, and how alike it is

    def grown(by: int) -> Any:
        sites = [
            replace(its, update=replace(its.update, norm=its.update.norm * (1 + by)))
            for its in kind.sites
        ]
        return replace(kind, name=f"mlp.up[expert {order.index(by)}]", sites=tuple(sites))

    (comparison,) = found.comparisons
    alike = tuple(
        replace(comparison.kinds[0], kind=f"mlp.up[expert {number}]", cosine=(by / 12,))
        for number, by in enumerate(order)
    )
    kinds = (*(grown(by) for by in range(12)), *found.adapters[0].kinds)
    experts = replace(found.adapters[0], kinds=kinds)
    compared = replace(comparison, kinds=alike)
    page = replace(found, adapters=(experts,), comparisons=(compared,)).to_html()
    drawn = [3, 10, 2]  # with 0, 6 and 11
    for chart in ("norm", "effective rank", "local", "one shared space for all layers"):
        titles = re.findall(rf">mlp\.up\[expert (\d+)\]: {chart}<", page)
        assert titles == [str(its) for its in sorted(drawn)]
    assert re.findall(r">mlp\.up\[expert (\d+)\]</figcaption>", page) == ["2", "3", "10"]
    assert ">mlp.up: norm by expert<" in page
    assert "mlp.up (4 × 12 experts × " in page
    assert "Of many experts three are drawn" in page
    assert "many experts" not in found.to_html()
    terminal = Console(file=StringIO(), width=200)
    print_analysis(replace(found, adapters=(experts,), comparisons=(compared,)), terminal)
    printed = terminal.file.getvalue()  # pyright: ignore
    rows = re.findall(r"^mlp\.up\[expert (\d+)\]", printed, flags=re.MULTILINE)
    assert rows == ["2", "3", "10"] * 3  # between layers, against the base, compared
    assert printed.count("· Of many experts three are shown: ") == 2
    assert replace(found, adapters=(experts,)).to_json().count("[expert ") == 12
    # Experts that are modules are experts too.
    kinds = tuple(
        replace(its, name=re.sub(r"mlp\.up\[expert (\d+)\]", r"mlp.experts.\1.up", its.name))
        for its in kinds
    )
    page = replace(found, adapters=(replace(experts, kinds=kinds),)).to_html()
    titles = re.findall(r">mlp\.experts\.(\d+)\.up: norm<", page)
    assert titles == [str(its) for its in sorted(drawn)]
    assert ">mlp.experts.up: norm by expert<" in page


_CHECKS = """<script>
const all = [...document.querySelectorAll("details")], press = document.getElementById("open-all");
press.click();
document.body.dataset.open = all.every((its) => its.open) && !press.ariaPressed;
press.click();
document.body.dataset.closed = all.every((its) => !its.open) && press.textContent;
document.body.dataset.fits = document.documentElement.scrollWidth <= window.innerWidth;
document.body.dataset.dark = getComputedStyle(document.body).backgroundColor;
const tops = {};
for (const its of document.querySelectorAll("#levels ~ * figcaption"))
  (tops[its.textContent] ??= []).push(its.nextElementSibling.getBoundingClientRect().top);
document.body.dataset.level = Object.values(tops).every(([one, other]) => one === other);
document.body.dataset.errors = window.failed || 0;
</script></body>"""


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "ground"), [(0, "rgb(13, 17, 23)"), (1, "rgb(255, 255, 255)")])
@pytest.mark.parametrize("width", [500, 1400])
def test_it_works_in_a_browser(
    scheme: int, ground: str, width: int, found: Analysis, tmp_path: Path
) -> None:
    text = found.to_html().replace("</body>", _CHECKS)
    text = text.replace("<head>", "<head><script>window.onerror = () => window.failed = 1</script>")
    (body,) = browser(text, tmp_path, scheme, width).all("body")
    assert body == {
        "data-open": "true",
        "data-closed": "Open all tables",
        "data-fits": "true",
        "data-dark": ground,
        "data-level": str(width > 1000).lower(),  # a kind of one adapter beside the other's
        "data-errors": "0",
    }


def test_the_json_is_the_result(found: Analysis) -> None:
    content = json.loads(found.to_json())
    site = found.adapters[0].kinds[0].sites[0]
    written = content["adapters"][0]["kinds"][0]["sites"][0]
    assert written["levels"]["mid"]["norm"] == site.levels["mid"].norm
    assert written["relative_norm"] == site.relative_norm
    relative = site.levels["mid"].norm / (site.base_norm or 0)
    assert written["levels"]["mid"]["relative_norm"] == pytest.approx(relative)
    assert written["intruders"]["count"] == site.intruders.count  # pyright: ignore
    assert content["version"] == msplora.__version__


def test_a_chart_puts_values_where_they_belong() -> None:
    chart = line_chart("t", "x", "y", [0, 1, 2, 3, 4], [Series("a", [0, 10, None, 10, None])])
    (line,) = chart.lines
    assert line.paths == (f"{chart.left}.0,{chart.bottom}.0 {across(chart, 1)},{chart.top}.0",)
    assert line.dots == ((across(chart, 3), chart.top),)
    assert chart.rows[2] == ("2", "–")
    log = line_chart("t", "k", "y", [1, 2, 3], [Series("a", [100.0, 1.0, 0.0])], log=True)
    assert [tick.text for tick in log.y_ticks] == ["1", "10", "100"]
    assert log.lines[0].paths == (f"{log.left}.0,{log.top}.0 {across(log, 1, 2)},{log.bottom}.0",)


def across(chart: Any, step: int, steps: int = 4) -> float:
    return round(chart.left + (chart.right - chart.left) * step / steps, 1)


def test_a_chart_of_zeros_or_nothing_can_be_drawn() -> None:
    for values in ([0.0, 0.0], [None, None], [-1.0, -2.0]):
        for log in (False, True):
            line_chart("t", "x", "y", [0, 1], [Series("a", values)], log=log)
    line_chart("t", "x", "y", [3], [Series("a", [0.5])], share=True)
