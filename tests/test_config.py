"""What a config accepts, fills in and refuses."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig, PeftType
from peft.utils.peft_types import PeftType as PeftTypeOfModule

import msplora
from msplora.errors import ConfigError, UnsupportedError
from msplora.pyramid import Level


def test_the_short_form_is_the_papers_pyramid() -> None:
    config = msplora.MSPLoraConfig(r=8, lora_alpha=16)
    assert config.pyramid == (
        Level("global", rank=8, groups=1, alpha=16),
        Level("mid", rank=4, groups=3, alpha=16),
        Level("local", rank=2, groups=0, alpha=16),
    )
    assert [level.scale for level in config.pyramid] == [2, 4, 8]
    assert (config.r, config.lora_alpha) == (8, 16)
    assert msplora.MSPLoraConfig().pyramid == config.pyramid
    assert isinstance(config, LoraConfig)


@pytest.mark.parametrize("given", [{}, {"split_alpha": True}, {"ranks": [8, 2, 2]}])
@pytest.mark.parametrize("changed", [{"r": 16}, {"lora_alpha": 32}])
def test_a_change_that_the_levels_would_not_follow_is_refused(
    given: dict[str, object], changed: dict[str, int]
) -> None:
    config = msplora.MSPLoraConfig(**given)  # pyright: ignore
    for name, value in changed.items():
        setattr(config, name, value)
        with pytest.raises(ConfigError, match=rf"replace\(config, {name}={value}\)"):
            _ = config.pyramid


@pytest.mark.parametrize(("r", "ranks"), [(4, [4, 2, 1]), (6, [6, 3, 1]), (7, [7, 3, 1])])
def test_ranks_that_do_not_halve_evenly(r: int, ranks: list[int]) -> None:
    assert msplora.MSPLoraConfig(r=r).ranks == ranks


def test_the_long_form() -> None:
    config = msplora.MSPLoraConfig(
        levels=["all", "halves", "pairs", "own"],
        ranks=[2, 5, 3, 1],
        groups=[1, 2, 6, 0],
        alphas=[4, 10, 3, 2],
    )
    assert config.r == 2
    assert config.lora_alpha == 4
    assert [level.scale for level in config.pyramid] == [2, 2, 1, 2]


def test_level_names_are_made_up_where_they_are_not_given() -> None:
    config = msplora.MSPLoraConfig(ranks=[4, 2], groups=[1, 0])
    assert config.levels == ["global", "local"]
    config = msplora.MSPLoraConfig(ranks=[4, 2, 2, 1], groups=[1, 2, 4, 0])
    assert config.levels == ["global", "mid0", "mid1", "local"]


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        ([1, 2, 0], ["global", "mid", "local"]),
        ([0, 3, 1], ["local", "mid", "global"]),
        ([1, 2, 4], ["global", "mid0", "mid1"]),
        ([0, 0, 0], ["local0", "local1", "local2"]),
        ([1, 1, 0], ["global0", "global1", "local"]),
    ],
    ids=str,
)
def test_three_levels_have_the_papers_names_where_they_are_the_papers(
    groups: list[int], names: list[str]
) -> None:
    config = msplora.MSPLoraConfig(ranks=[2, 4, 8], groups=groups)
    assert config.levels == names
    assert dataclasses.replace(config, groups=[1, 3, 0]).levels == ["global", "mid", "local"]


def test_split_alpha_shares_one_alpha_out() -> None:
    config = msplora.MSPLoraConfig(lora_alpha=24, split_alpha=True)
    assert config.alphas == [8, 8, 8]
    assert config.lora_alpha == 24


def test_rank_stabilised_scales() -> None:
    config = msplora.MSPLoraConfig(ranks=[16, 4], groups=[1, 0], use_rslora=True)
    assert [level.scale for level in config.pyramid] == [4, 8]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": 6, "lora_alpha": 10},
        {"split_alpha": True, "lora_alpha": 16},
        {"ranks": [3, 2], "groups": [2, 0], "alphas": [1.5, 7]},
        {"levels": ["z", "a", "m"]},
    ],
)
def test_a_saved_config_is_read_back_the_same(tmp_path: Path, options: dict) -> None:
    config = msplora.MSPLoraConfig(target_modules=["q"], **options)
    config.save_pretrained(str(tmp_path))
    again = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(again, msplora.MSPLoraConfig)
    assert again.pyramid == config.pyramid
    assert again.to_dict() == config.to_dict()
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["format_version"] == 1
    for name in ("levels", "ranks", "groups", "alphas"):
        assert len(written[name]) == len(config.pyramid)


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({}, {"r": 20}),
        ({"r": 8, "lora_alpha": 32}, {"r": 16, "lora_alpha": 4}),
        ({"ranks": [6, 2], "groups": [1, 0]}, {"lora_alpha": 3}),
        ({"split_alpha": True}, {"lora_alpha": 3}),
        ({"levels": ["z", "a", "m"], "groups": [1, 2, 0]}, {"r": 12}),
    ],
)
def test_replacing_a_field_derives_the_lists_anew(options: dict, changed: dict) -> None:
    old = copy.deepcopy(msplora.MSPLoraConfig(**options))
    expected = msplora.MSPLoraConfig(**{**options, **changed})
    assert dataclasses.replace(old, **changed).to_dict() == expected.to_dict()


def test_a_list_that_was_filled_in_and_then_edited_is_the_users() -> None:
    fields = msplora.MSPLoraConfig(r=8).to_dict()
    fields["ranks"][2] = 1
    del fields["alphas"], fields["peft_type"]
    assert msplora.MSPLoraConfig(**fields).ranks == [8, 4, 1]
    fields["ranks"][0] = 16
    with pytest.raises(ConfigError, match="r = 8"):
        msplora.MSPLoraConfig(**fields)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 3}, r"ranks=\[3, 1, 1\]"),
        ({"r": 0}, "1 or more"),
        ({"r": 8.0}, "whole number"),
        ({"r": True}, "whole number"),
        ({"ranks": [8, 4]}, "groups"),
        ({"ranks": [8, 4], "groups": [1, 3, 0]}, "one entry per level"),
        ({"ranks": [8, 4], "groups": [1, 0], "alphas": [1]}, "one entry per level"),
        ({"ranks": [8, 4], "groups": [1, 0], "levels": ["a"]}, "one entry per level"),
        ({"groups": [1, 0]}, "one entry per level"),
        ({"ranks": []}, "empty"),
        ({"ranks": [8, 0, 1]}, "1 or more"),
        ({"r": 4, "ranks": [8, 4, 2]}, "r = 4"),
        ({"groups": [1, -1, 0]}, "whole number"),
        ({"groups": [1, 1.5, 0]}, "whole number"),
        ({"levels": ["a", "a", "b"]}, "own name"),
        ({"levels": ["A", "b", "c"]}, "small letters"),
        ({"levels": ["msplora_x", "b", "c"]}, "msplora_"),
        ({"lora_alpha": 0}, "above 0"),
        ({"lora_alpha": float("nan")}, "finite"),
        ({"alphas": [16, 16, -1]}, "above 0"),
        ({"lora_alpha": 8, "alphas": [16, 16, 16]}, "lora_alpha = 8"),
        ({"split_alpha": True, "lora_alpha": 16, "alphas": [16, 16, 16]}, "split_alpha"),
        ({"format_version": 99}, "format_version 99"),
        ({"bias": "some"}, "bias"),
    ],
)
def test_impossible_combinations_are_refused(options: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        msplora.MSPLoraConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "eva"},
        {"lora_bias": True},
        {"layer_replication": [(0, 2), (1, 3)]},
        {"alora_invocation_tokens": [1, 2]},
        {"megatron_config": {"tensor_model_parallel_size": 2}},
        {"use_qalora": True},
        {"target_parameters": ["experts.w"], "lora_dropout": 0.1},
        {"target_parameters": ["experts.w"], "use_dora": True},
    ],
)
def test_what_a_pyramid_cannot_do_is_refused_with_a_reason(options: dict) -> None:
    with pytest.raises(UnsupportedError, match=": "):
        msplora.MSPLoraConfig(**options)


def test_the_peft_type_is_a_member_like_any_other() -> None:
    assert msplora.MSPLoraConfig().peft_type is PeftType.MSPLORA
    assert PeftType("MSPLORA") is PeftType["MSPLORA"] is PeftTypeOfModule.MSPLORA
    assert PeftType.MSPLORA in list(PeftType)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="rnak"):
        msplora.MSPLoraConfig(rnak=8)  # pyright: ignore[reportCallIssue]


def test_its_lists_are_plain_ones_for_whoever_writes_them() -> None:
    """YAML's safe writer refuses every subclass of a list."""
    written = msplora.MSPLoraConfig(r=8, target_modules=["q_proj"]).to_dict()
    assert {type(written[name]) for name in ("levels", "ranks", "groups", "alphas")} == {list}
