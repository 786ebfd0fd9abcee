"""Which blocks of a LoRA `msplora inspect` misses, and which it does not."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from safetensors.torch import load_file

import msplora
from inspected import WEIGHTS, edit, lora
from msplora.inspection.gaps import Place, gaps

CONFIG = LoraConfig(target_modules=["q_proj", "v_proj"])


def of(blocks: Iterable[int], *paths: str, stack: str = "model.layers") -> list[Place]:
    return [(stack, block, path) for path in paths for block in blocks]


def attention(blocks: Iterable[int], **where: str) -> list[Place]:
    return of(blocks, "self_attn.q_proj", "self_attn.v_proj", **where)


MLP = ("mlp.up_proj", "mlp.down_proj")
SOUND = {
    "whole": attention(range(8)) + of(range(8), *MLP),
    "two stacks": attention(range(8)) + attention(range(3), stack="vision.layers"),
    "a sequence of modules": of([0, 2], "self", stack="projector") + attention(range(4)),
}
HYBRID = {
    "every fourth": attention([3, 7, 11, 15]),
    "every fourth, beside others": attention([3, 7])
    + of([0, 1, 2, 4, 5, 6, 8, 9], "mamba.in_proj"),
    "all but every fourth": attention(set(range(16)) - {3, 7, 11, 15}),
    "cross attention": attention({0, 1, 2, 4, 5, 6, 7, 9}) + of([3, 8], "cross_attn.q_proj"),
    "a dense first block": of([0], *MLP) + of(range(1, 6), "mlp.shared_experts.up_proj"),
    "values that keys stand for": of(range(18), "self_attn.q_proj")
    + of(set(range(18)) - {5, 11, 17}, "self_attn.v_proj"),
}
LOST = {
    "in the middle": (attention([0, 1, 3]), "self_attn lacks block 2"),
    "the first": (attention(range(1, 6)), "self_attn lacks block 0"),
    "two of many": (attention(set(range(9)) - {3, 6}), "self_attn lacks block 3 and 1 more"),
    "one weight of the last": (
        of(range(32), "self_attn.q_proj") + of(range(31), "self_attn.v_proj"),
        "self_attn.v_proj lacks block 31",
    ),
    "one weight of a hybrid's": (
        attention([3, 7, 11, 15])[:-1] + of(range(16), *MLP),
        "self_attn.v_proj lacks block 15",
    ),
}


@pytest.mark.parametrize("places", SOUND.values(), ids=SOUND)
def test_nothing_is_missed_of_what_is_whole(places: list[Place]) -> None:
    assert gaps(CONFIG, places) == []


@pytest.mark.parametrize("places", HYBRID.values(), ids=HYBRID)
def test_blocks_of_several_sorts_are_noted(places: list[Place]) -> None:
    (found,) = gaps(CONFIG, places)
    assert found.severity == "note"


@pytest.mark.parametrize(("places", "said"), LOST.values(), ids=LOST)
def test_what_was_lost_is_named(places: list[Place], said: str) -> None:
    found = [its for its in gaps(CONFIG, places) if its.severity != "note"]
    assert [its.rule for its in found] == ["missing layer"]
    assert said in found[0].text


def test_whoever_chose_blocks_may_have_left_some_out() -> None:
    places = attention([0, 1, 3])
    for chosen in (
        {"target_modules": r".*\.[013]\..*q_proj"},
        {"target_modules": ["layers.0.self_attn.q_proj", "v_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 1, 3]},
    ):
        assert gaps(LoraConfig(**chosen), places) == []


def test_what_is_excluded_is_not_missed(tmp_path: Path) -> None:
    excluded = LoraConfig(
        target_modules=["q_proj", "v_proj"], exclude_modules=r".*layers\.([01]\..*|2\..*v_proj)"
    )
    assert gaps(excluded, of([2, 3, 4], "self_attn.q_proj") + of([3, 4], "self_attn.v_proj")) == []
    (found,) = gaps(excluded, attention([2, 4]))
    assert "self_attn lacks block 3" in found.text
    chosen: dict[str, Any] = {"target_modules": ["q_proj", "lm_head"]}
    folder = lora(tmp_path, **chosen, exclude_modules=["lm_head"])
    assert not msplora.inspect(folder).suspicious


def test_a_file_that_lost_one_pair(tmp_path: Path) -> None:
    folder = lora(tmp_path)
    whole = load_file(folder / WEIGHTS)
    for part in ("layers.3.self_attn.v_proj", "layers.0."):
        edit(folder, lambda _, part=part: {k: t for k, t in whole.items() if part not in k})
        rules = [its.rule for its in msplora.inspect(folder).findings]
        assert rules.count("missing layer") == 1
