"""Properties of the plan, over arbitrary pyramids and models."""

from __future__ import annotations

import ast
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import msplora
from msplora.errors import TargetError
from msplora.pyramid import PER_LAYER, Level, Shape, Site, arrange

SHAPES = st.builds(
    Shape,
    layout=st.just("linear"),
    out_features=st.sampled_from([4, 8]),
    in_features=st.sampled_from([4, 6]),
)


@st.composite
def pyramids(draw: st.DrawFn) -> tuple[Level, ...]:
    count = draw(st.integers(1, 4))
    return tuple(
        Level(
            name=f"level{place}",
            rank=draw(st.integers(1, 9)),
            groups=draw(st.integers(0, 7)),
            alpha=draw(st.floats(0.5, 64)),
            use_rslora=draw(st.booleans()),
        )
        for place in range(count)
    )


@st.composite
def site_lists(draw: st.DrawFn) -> list[Site]:
    """Sites in one or two stacks, with gaps, and kinds that differ in shape from layer to layer."""
    sites = []
    for stack in draw(st.sampled_from([["model.layers"], ["encoder.block", "decoder.block"]])):
        for block in range(draw(st.integers(1, 12))):
            for kind in draw(st.sets(st.sampled_from(["attn.q", "attn.v", "mlp"]))):
                shape = draw(SHAPES)
                sites.append(Site(f"{stack}.{block}.{kind}", stack, kind, block, shape))
    if draw(st.booleans()):
        sites.append(Site("head", "head", "head", None, draw(SHAPES)))
    return sites


@given(site_lists(), pyramids())
def test_every_site_has_one_pair_per_level(sites: list[Site], levels: tuple[Level, ...]) -> None:
    plan = arrange(sites, levels)
    assert set(plan.pairs_of) == {site.key for site in sites}
    for pairs in plan.pairs_of.values():
        assert [pair.level for pair in pairs] == [level.name for level in levels]


@given(site_lists(), pyramids())
def test_groups_partition_the_layers_in_runs(sites: list[Site], levels: tuple[Level, ...]) -> None:
    plan = arrange(sites, levels)
    for kind in plan.kinds:
        for level in levels:
            groups = [
                next(p for p in plan.pairs_of[site.key] if p.level == level.name).group
                for site in kind.sites
            ]
            count = level.groups_among(kind.layers)
            assert groups == sorted(groups)
            assert set(groups) == set(range(count))
            sizes = Counter(groups).values()
            assert max(sizes) - min(sizes) <= 1
            if level.groups == PER_LAYER:
                assert groups == list(range(kind.layers))


@given(site_lists(), pyramids())
def test_sites_share_only_with_their_own_kind_stack_and_shape(
    sites: list[Site], levels: tuple[Level, ...]
) -> None:
    plan = arrange(sites, levels)
    assert len({pair.address for pair in plan.pairs}) == len(plan.pairs)
    for pair in plan.pairs:
        found = [plan.site_of[key] for key in pair.sites]
        assert len({(site.stack, site.kind, site.shape) for site in found}) == 1
        assert pair.blocks == tuple(site.block for site in found)


@given(site_lists(), pyramids(), st.randoms())
def test_the_order_of_modules_does_not_matter(
    sites: list[Site], levels: tuple[Level, ...], random
) -> None:
    plan = arrange(sites, levels)
    shuffled = list(sites)
    random.shuffle(shuffled)
    again = arrange(shuffled, levels)
    assert again == plan
    assert again.fingerprint == plan.fingerprint


@given(site_lists(), pyramids())
def test_counts_agree(sites: list[Site], levels: tuple[Level, ...]) -> None:
    plan = arrange(sites, levels)
    by_pair = sum(
        math.prod(pair.shape.a(pair.rank)) + math.prod(pair.shape.b(pair.rank))
        for pair in plan.pairs
    )
    by_formula = sum(
        (kind.shape.in_features + kind.shape.out_features)
        * sum(level.groups_among(kind.layers) * level.rank for level in levels)
        for kind in plan.kinds
    )
    assert plan.parameters == by_pair == by_formula == sum(kind.parameters for kind in plan.kinds)
    assert plan.parameters == sum(plan.parameters_per_level.values())


@given(st.integers(1, 200), st.integers(1, 12))
def test_groups_are_cut_by_the_formula(layers: int, groups: int) -> None:
    level = Level("mid", rank=1, groups=groups, alpha=1)
    found = [level.group_of(depth, layers) for depth in range(layers)]
    count = min(groups, layers)
    assert found == [math.floor(depth * count / layers) for depth in range(layers)]


@pytest.mark.parametrize("layers", [3, 6, 7, 11, 12, 24, 32, 80])
def test_three_groups_have_the_sizes_of_an_even_split(layers: int) -> None:
    level = Level("mid", rank=4, groups=3, alpha=16)
    sizes = Counter(level.group_of(depth, layers) for depth in range(layers))
    assert [sizes[group] for group in range(3)] == [
        len(part) for part in np.array_split(range(layers), 3)
    ]


@pytest.mark.parametrize(
    ("layers", "width", "rank", "pyramid", "lora"),
    [
        (12, 768, 8, 135_168, 294_912),  # RoBERTa-base, query and value
        (32, 4096, 64, 11_010_048, 33_554_432),  # Llama-2-7B, q_proj and v_proj
    ],
)
def test_the_papers_counts(layers: int, width: int, rank: int, pyramid: int, lora: int) -> None:
    shape = Shape("linear", width, width)
    sites = [
        Site(f"layers.{block}.{kind}", "layers", kind, block, shape)
        for block in range(layers)
        for kind in ("q", "v")
    ]
    plan = arrange(sites, msplora.MSPLoraConfig(r=rank).pyramid)
    assert (plan.parameters, plan.lora_parameters) == (pyramid, lora)


@pytest.mark.parametrize(("layers", "share"), [(1, "175%"), (2, "125%"), (3, "108%"), (4, None)])
def test_where_a_pyramid_is_dearer_than_lora_one_note_says_so(
    layers: int, share: str | None
) -> None:
    shape = Shape("linear", 8, 8)
    sites = [
        Site(f"layers.{block}.{kind}", "layers", kind, block, shape)
        for kind in ("k", "q", "v")
        for block in range(layers)
    ]
    levels = [Level("global", 8, 1, 16), Level("mid", 4, 3, 16), Level("local", 2, PER_LAYER, 16)]
    notes = arrange(sites, levels).notes
    if share is None:
        assert not notes
    else:
        (note,) = notes
        assert note.startswith("k, q, v: ")
        assert f"trains {share} of what LoRA r = 8 does" in note


def test_gaps_count_the_blocks_that_hold_the_kind() -> None:
    shape = Shape("linear", 4, 4)
    sites = [Site(f"layers.{b}.q", "layers", "q", b, shape) for b in (1, 4, 5, 9)]
    plan = arrange(sites, (Level("mid", 2, 2, 4.0), Level("local", 1, 0, 4.0)))
    mid = [pair for pair in plan.pairs if pair.level == "mid"]
    assert [pair.blocks for pair in mid] == [(1, 4), (5, 9)]
    assert plan.pairs_of["layers.9.q"][1].address == "local/3/q"


def test_a_stack_is_named_only_where_two_clash() -> None:
    shape = Shape("linear", 4, 4)
    sites = [
        Site("encoder.0.q", "encoder", "q", 0, shape),
        Site("decoder.0.q", "decoder", "q", 0, shape),
        Site("decoder.0.cross", "decoder", "cross", 0, shape),
        Site("decoder.1.cross", "decoder", "cross", 1, Shape("linear", 8, 4)),
    ]
    plan = arrange(sites, (Level("global", 1, 1, 1.0),))
    assert {pair.address for pair in plan.pairs} == {
        "global/0/encoder:q",
        "global/0/decoder:q",
        "global/0/cross[4x4]",
        "global/0/cross[8x4]",
    }


def test_different_ranks_for_sites_that_share_are_refused() -> None:
    shape = Shape("linear", 4, 4)
    sites = [Site(f"layers.{b}.q", "layers", "q", b, shape) for b in range(2)]
    levels = (Level("global", 4, 1, 16.0),)
    with pytest.raises(TargetError, match="share their pairs"):
        arrange(sites, levels, levels_of={"layers.0.q": (Level("global", 2, 1, 16.0),)})


def test_the_plan_imports_no_torch() -> None:
    for name in ("pyramid", "plan_text", "errors"):
        source = (Path(msplora.__file__).parent / f"{name}.py").read_text()
        imported = {
            (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
            for node in ast.walk(ast.parse(source))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        assert not {name for name in imported if name.startswith(("torch", "peft", "transformers"))}
