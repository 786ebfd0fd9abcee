"""The page of a plan: its counts are the plan's at every setting, in Python and in a browser."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import msplora
from html_page import Page, browser
from msplora.plan_page.embedded import embedded
from msplora.plan_page.page import render
from msplora.pyramid import Level, Plan, Shape, Site, arrange
from runs import msplora as command
from runs import save_decoder
from tiny import EXPERTS_ARE_PARAMETERS, MODELS

EVIL = '</script><script>alert("x")</script>\'"&'
NAMES = ("global", "mid", "local")


def plan_of(name: str, **changes: Any) -> Plan:
    tiny = MODELS[name]
    options: dict[str, Any] = {"target_modules": tiny.targets, "r": 8}
    if tiny.parameters:
        options["target_parameters"] = list(tiny.parameters)
    return msplora.plan(tiny.model(), msplora.MSPLoraConfig(**(options | changes)))


def grouped_convolution(ranks: list[int], groups: list[int]) -> Plan:
    """Convolutions of 2 groups in 5 blocks, of which one is not adapted."""
    shape = Shape("conv", 8, 3, (3, 3), 2)
    sites = [Site(f"blocks.{n}.conv", "blocks", "conv", n, shape) for n in (0, 1, 2, 4, 5)]
    return arrange(sites, levels(ranks, groups))


def levels(ranks: list[int], groups: list[int]) -> list[Level]:
    given = zip(NAMES, ranks, groups, strict=False)
    return [Level(name, rank, its, 16.0) for name, rank, its in given]


CASES: dict[str, Any] = {
    "llama-all-linear": lambda **its: plan_of("llama-all-linear", **its),
    "gemma": lambda **its: plan_of("gemma", **its),
    "llava": lambda **its: plan_of("llava", **its),
    "vit": lambda **its: plan_of("vit", target_modules=".*projection|.*query", **its),
    "pattern": lambda **its: plan_of("llama", rank_pattern={"v_proj": 16}, **its),
    "dora": lambda **its: plan_of("gpt2", use_dora=True, **its),
    "convolution": lambda **its: grouped_convolution(its["ranks"], its["groups"]),
}
if EXPERTS_ARE_PARAMETERS:
    CASES["mixtral"] = lambda **its: plan_of("mixtral", **its)
SETTINGS = [([8, 4, 2], [1, 3, 0]), ([16, 2, 6], [2, 4, 1]), ([4, 64, 2], [0, 3, 2])]


def content(plan: Plan) -> dict[str, Any]:
    """What the page's script reads, out of the page."""
    (found,) = re.findall(
        r'<script type="application/json" id="plan">(.*?)</script>', render(plan), flags=re.DOTALL
    )
    return json.loads(found)


def setting(ranks: list[int], groups: list[int], on: list[bool] | None = None) -> dict[str, Any]:
    its = zip(ranks, groups, on or [True] * 3, strict=True)
    return {"levels": [{"on": on, "rank": rank, "groups": groups} for rank, groups, on in its]}


def counted(found: dict[str, Any], asked: dict[str, Any]) -> tuple[list[int], list[int], int, int]:
    """The formula of embedded.py, on what is embedded: levels, kinds, all, LoRA's."""
    of_levels, of_kinds = [0] * len(asked["levels"]), []
    lora = found["magnitudes"]
    on = [level["rank"] for level in asked["levels"] if level["on"]]

    def numbers(kind: Any, rank: int) -> int:
        return kind["a"] * rank + kind["b"] * (rank // kind["splits"])

    for kind in found["kinds"]:
        layers, own = len(kind["blocks"]), kind["rank"] or on[0]
        if on == [on[0], on[0] // 2, on[0] // 4]:
            ranks = iter([own, own // 2, own // 4])
        else:
            ranks = iter([rank * own // on[0] for rank in on])
        of_kinds.append(0)
        for place, level in enumerate(asked["levels"]):
            pairs = min(level["groups"], layers) if level["groups"] else layers
            rank = next(ranks) if level["on"] else 0
            of_levels[place] += level["on"] * pairs * numbers(kind, rank)
            of_kinds[-1] += level["on"] * pairs * numbers(kind, rank)
        lora += layers * numbers(kind, own)
    return of_levels, of_kinds, sum(of_kinds) + found["magnitudes"], lora


def expected(plan: Plan) -> tuple[list[int], list[int], int, int]:
    of_kinds = [kind.parameters for kind in plan.kinds]
    of_levels = list(plan.parameters_per_level.values())
    return of_levels, of_kinds, plan.parameters, plan.lora_parameters


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] * (case not in ("convolution", "dora")))
        for case in CASES
    ],
)
def test_what_is_embedded_counts_as_the_plan(case: str) -> None:
    ranks, groups = SETTINGS[0]
    made = CASES[case](ranks=ranks, groups=groups, **same_names(case))
    found = content(made)
    for ranks, groups in SETTINGS:
        plan = CASES[case](ranks=ranks, groups=groups, **same_names(case))
        assert counted(found, setting(ranks, groups)) == expected(plan)
    off = counted(found, setting([8, 4, 2], [1, 3, 0], [True, False, True]))
    smaller = CASES[case](ranks=[8, 2], groups=[1, 0], **same_names(case, "global", "local"))
    assert off[2:] == expected(smaller)[2:]
    # Without the first level LoRA has the rank of the second, as in the plan of the others.
    off = counted(found, setting([8, 4, 2], [1, 3, 0], [False, True, True]))
    smaller = CASES[case](ranks=[4, 2], groups=[3, 0], **same_names(case, "mid", "local"))
    assert off[2:] == expected(smaller)[2:]


def same_names(case: str, *names: str) -> dict[str, Any]:
    return {} if case == "convolution" else {"levels": list(names or NAMES), "r": None}


@pytest.mark.parametrize(
    ("rank", "ranks"),
    [(4, [16, 8, 4]), (4, [8, 6, 2]), (4, [3, 1, 1]), (8, [16, 8, 4]), (8, [8, 4, 2])],
    ids=str,
)
def test_a_pattern_keeps_its_rank_and_the_others_follow(rank: int, ranks: list[int]) -> None:
    """As the planner has it, for a pattern of the rank that all had, too."""
    patterns = {"rank_pattern": {"v_proj": rank}, "alpha_pattern": {"v_proj": 8}}
    found = content(plan_of("llama", **patterns))
    assert [kind["rank"] for kind in found["kinds"]] == [None, rank]
    assert [kind["alphas"] for kind in found["kinds"]] == [None, [8.0, 8.0, 8.0]]
    plan = plan_of("llama", r=None, ranks=ranks, groups=[1, 3, 0], **patterns)
    assert counted(found, setting(ranks, [1, 3, 0])) == expected(plan)


def test_an_alpha_of_its_own_leaves_the_rank_to_the_sliders() -> None:
    patterns = {"alpha_pattern": {"v_proj": 8}}
    found = content(plan_of("llama", **patterns))
    assert [kind["rank"] for kind in found["kinds"]] == [None, None]
    assert [kind["alphas"] for kind in found["kinds"]] == [None, [8.0, 8.0, 8.0]]
    plan = plan_of("llama", r=16, **patterns)
    assert counted(found, setting([16, 8, 4], [1, 3, 0])) == expected(plan)


def test_what_trains_beside_the_pairs_is_said() -> None:
    said = "Trained too, and not counted here: modules_to_save = ['lm_head']."
    assert said in render(plan_of("llama", modules_to_save=["lm_head"])).replace("&#39;", "'")
    assert "Trained too" not in render(plan_of("llama"))


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    plan = plan_of("llava")
    text = render(plan, "some/model")
    assert not re.findall(r"""src=|href=(?!"#)|url\(|@import|https?://""", text)
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    assert "The pyramid of some/model" in page.texts
    # Without JavaScript it shows the plan as it was made.
    for number in (plan.parameters, plan.lora_parameters, *plan.parameters_per_level.values()):
        assert f"{number:,}" in page.texts
    for kind in plan.kinds:
        assert f"{kind.parameters:,}" in page.texts
    assert "language_model" in text
    # Each control has a name, each grid its kind's.
    for its in page.all("input"):
        assert its.get("aria-label") or its["type"] == "checkbox"
    grids = [its for its in page.all("div") if its.get("role") == "grid"]
    assert len(grids) == len(plan.kinds)
    assert {its["aria-labelledby"] for its in grids} <= set(ids)


def test_names_from_files_are_escaped() -> None:
    plan = plan_of("llama")
    evil = replace(plan.kinds[0], name=EVIL, path=EVIL, stack=EVIL)
    level = replace(plan.levels[0], name=EVIL)
    evil_plan = replace(plan, kinds=(evil, *plan.kinds[1:]), notes=(EVIL,))
    text = render(evil_plan, EVIL)
    assert "alert(" in text
    assert "<script>alert" not in text
    assert len(Page(text).all("script")) == 2
    assert embedded(replace(plan, levels=(level, *plan.levels[1:])))["levels"][0]["name"] == EVIL


def test_the_command_writes_a_page_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_decoder(tmp_path / "decoder")
    page = tmp_path / "made/plan.html"
    asked = ("plan", tmp_path / "decoder", "-t", "q_proj", "--html", page)
    result = command(*asked)
    assert result.code == 0, result.error
    assert f"Wrote {page}" in result.out
    text = page.read_text()
    assert str(tmp_path) not in text
    refused = command(*asked, "--json")
    assert refused.code == 1
    assert "already. Choose another output, or pass --force" in refused.error
    page.write_text("mine")
    assert command(*asked, "--force", "--json").json()["parameters"]
    assert page.read_text() == text
    refused = command("plan", tmp_path / "decoder", "--html", tmp_path / "made")
    assert "is a folder; give another name" in refused.error
    assert [its.name for its in page.parent.iterdir()] == ["plan.html"]
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert "pip install -e '.[report]' in msplora's clone" in command(*asked, "--force").error


_COUNT = """<script>
const keys = (kind, level) => Pyramid.pairs(kind, SETTINGS[0], level)
  .map((depths) => depths.map((depth) => kind.sites[depth]));
const sharedBy = (plan) =>
  plan.kinds.map((kind) => plan.levels.map((_, level) => keys(kind, level)));
document.body.dataset.found = JSON.stringify(PLANS.map((plan) => ({
  counts: SETTINGS.map((its) => Pyramid.count(plan, its)),
  shared: sharedBy(plan),
})));
</script></body>"""


@pytest.mark.slow
def test_a_browser_counts_and_shares_as_the_plan(tmp_path: Path) -> None:
    ranks, groups = SETTINGS[0]
    plans = {
        case: make(ranks=ranks, groups=groups, **same_names(case)) for case, make in CASES.items()
    }
    given = {
        "PLANS": [embedded(plan) for plan in plans.values()],
        "SETTINGS": [setting(*its) for its in SETTINGS],
    }
    constants = "".join(f"const {name} = {json.dumps(its)};" for name, its in given.items())
    script = _COUNT.replace("<script>", f"<script>{constants}")
    text = render(plans["gemma"]).replace("</body>", script)
    (body,) = browser(text, tmp_path).all("body")
    counted_there = json.loads(body["data-found"] or "")
    for (case, made), found in zip(plans.items(), counted_there, strict=True):
        for (ranks, groups), its in zip(SETTINGS, found["counts"], strict=True):
            plan = CASES[case](ranks=ranks, groups=groups, **same_names(case))
            of_levels = [level["parameters"] for level in its["levels"]]
            of_kinds = [kind["parameters"] for kind in its["kinds"]]
            assert (of_levels, of_kinds, its["parameters"], its["lora"]) == expected(plan)
            assert sum(level["pairs"] for level in its["levels"]) == len(plan.pairs)
        for kind, of_levels in zip(made.kinds, found["shared"], strict=True):
            for level, shared in zip(made.levels, of_levels, strict=True):
                pairs = [its for its in made.pairs if its.kind == kind.name]
                assert shared == [list(its.sites) for its in pairs if its.level == level.name]


_USE = """<script>
const slide = (id, value) => {
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event("input"));
};
const press = (key) =>
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const said = (id) => document.getElementById(id).textContent;
const labels = (which) =>
  [...document.querySelectorAll(which)].map((its) => its.getAttribute("aria-label"));
const seen = {};
seen.planned = document.getElementById("notes-of").hidden;
slide("rank-0", 16); slide("groups-1", 2); slide("groups-2", 3);
seen.moved = ["parameters", "lora", "config", "said", "level-2-groups"].map(said);
seen.unplanned = document.getElementById("notes-of").hidden;
document.getElementById("on-1").click();
seen.off = [said("parameters"), said("level-1-parameters")];
seen.rows = document.querySelectorAll("#grid-0 .level").length;
document.getElementById("on-2").click();
seen.share = [[1, 320], [100, 320], [180, 320], [55, 200]].map(([part, all]) => share(part, all));
seen.last = document.getElementById("on-0").disabled;
document.getElementById("reset").click();
seen.reset = [said("parameters"), said("lora"), document.getElementById("rank-0").value];
document.querySelector("#grid-0 .cell").focus();
press("ArrowDown"); press("ArrowRight");
seen.pair = document.activeElement.getAttribute("aria-label");
seen.lit = labels("#grid-0 .sites .on");
press("End"); press("ArrowDown"); press("ArrowDown");
seen.site = document.activeElement.getAttribute("aria-label");
seen.used = [...document.querySelectorAll("#grid-0 .level .on")].length;
seen.fits = document.documentElement.scrollWidth <= window.innerWidth;
seen.ground = getComputedStyle(document.body).backgroundColor;
seen.errors = window.failed || 0;
document.body.dataset.seen = JSON.stringify(seen);
</script></body>"""


_SCALES = """<script>
document.getElementById("on-0").click();
const seen = { config: document.getElementById("config").textContent };
seen.labels = [...document.querySelectorAll(".level .cell")]
  .map((its) => its.getAttribute("aria-label"));
document.body.dataset.seen = JSON.stringify(seen);
</script></body>"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes", "pattern"),
    [
        ("llama", {"r": None, "ranks": [8, 4, 2], "alphas": [1, 2, 4]}, "v_proj"),
        ("llama", {"split_alpha": True, "lora_alpha": 48}, "v_proj"),
        ("t5", {"split_alpha": True, "lora_alpha": 48}, "decoder.*SelfAttention.v"),
    ],
)
def test_the_config_of_a_browser_has_the_scales_that_it_shows(
    name: str, changes: dict[str, Any], pattern: str, tmp_path: Path
) -> None:
    """With a pattern's alpha too, where the alpha that it stands for is another."""
    made = plan_of(name, alpha_pattern={pattern: 5}, **changes)
    (body,) = browser(render(made).replace("</body>", _SCALES), tmp_path).all("body")
    seen = json.loads(body["data-seen"] or "")
    targets = MODELS[name].targets
    spelled = seen["config"].replace("…", f"target_modules={targets!r}")
    plan = msplora.plan(MODELS[name].model(), eval(spelled, {"msplora": msplora}))
    shown = dict(re.findall(r"(\S+)\. Rank \d+, scale ([\d.]+)\.", " ".join(seen["labels"])))
    assert {its.address: float(f"{its.scale:.4g}") for its in plan.pairs} == {
        address: float(scale) for address, scale in shown.items()
    }
    assert len({its.scale for its in plan.pairs}) > 2


def test_experts_of_one_place_are_drawn_once() -> None:
    """A slider would else draw each of hundreds anew."""
    nn = torch.nn

    def block() -> nn.Module:
        experts = [nn.ModuleDict({its: nn.Linear(8, 4) for its in ("up", "at")}) for _ in range(6)]
        mlp = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        return nn.ModuleDict({"experts": nn.ModuleList(experts), "mlp": mlp})

    model: Any = nn.ModuleDict({"layers": nn.ModuleList([block(), block()])})
    targets = r".*(up|at|mlp\.\d)"
    plan = msplora.plan(model, msplora.MSPLoraConfig(r=4, target_modules=targets))
    page = Page(render(plan))
    grids = [its for its in page.all("div") if its.get("role") == "grid"]
    assert len(plan.kinds) == 14
    assert len(grids) == 4
    assert "experts.0.up and 5 like it" in page.texts
    assert all(f"{kind.parameters:,}" in page.texts for kind in plan.kinds)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "ground", "width"), [(0, "rgb(13, 17, 23)", 500), (1, "rgb(255, 255, 255)", 1400)]
)
def test_it_works_in_a_browser(scheme: int, ground: str, width: int, tmp_path: Path) -> None:
    made = plan_of("llama", use_rslora=bool(scheme))
    text = render(made).replace("</body>", _USE)
    text = text.replace("<head>", "<head><script>window.onerror = () => window.failed = 1</script>")
    (body,) = browser(text, tmp_path, scheme, width).all("body")
    seen = json.loads(body["data-seen"] or "")
    moved = plan_of("llama", r=None, ranks=[16, 8, 4], groups=[1, 2, 3])
    parameters, lora, config, told, shared = seen["moved"]
    assert (parameters, lora) == (f"{moved.parameters:,}", f"{moved.lora_parameters:,}")
    assert "ranks=[16, 8, 4],\n    groups=[1, 2, 3],\n    alphas=[16, 16, 16]" in config
    assert ("use_rslora=True" in config) == bool(scheme)
    share = f"{moved.parameters / moved.lora_parameters:.1%}"
    assert told == f"{parameters} parameters, {share} of LoRA's {lora}."
    assert shared == "3 groups"
    without = plan_of("llama", r=None, ranks=[16, 4], groups=[1, 3], levels=["global", "local"])
    assert seen["off"] == [f"{without.parameters:,}", "0"]
    assert seen["rows"] == 2
    assert seen["last"] is True
    assert (seen["planned"], seen["unplanned"]) == (True, False)
    assert seen["share"] == [f"{part / 320:.1%}" for part in (1, 100, 180, 88)]
    assert seen["reset"] == [f"{made.parameters:,}", f"{made.lora_parameters:,}", "8"]
    pair = next(its for its in made.pairs if its.address == "mid/1/self_attn.q_proj")
    scale = 8 if scheme else 4
    assert seen["pair"].startswith(
        f"mid/1/self_attn.q_proj. Rank 4, scale {scale}. Used by layer 2."
    )
    assert f"{pair.parameters:,} parameters" in seen["pair"]
    assert [its.partition(",")[0] for its in seen["lit"]] == list(pair.sites)
    assert seen["site"].startswith("model.layers.3.self_attn.q_proj, 32x32. Uses global/0 (rank 8)")
    assert seen["used"] == 3
    assert (seen["fits"], seen["ground"], seen["errors"]) == (True, ground, 0)
