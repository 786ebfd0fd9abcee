"""What cannot be done is refused: what was asked, why not, and the model stays as it was."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftMixedModel, get_peft_model, inject_adapter_in_model
from torch import nn

import msplora
from adapted_llama import LLAMA, TARGETS, adapted, config, logits
from msplora.errors import (
    ConfigError,
    MSPLoraError,
    TargetError,
    UnsupportedError,
)
from oracle import (
    assert_shared,
    plan_of,
    randomise,
    snapshot,
)
from tiny import EXPERTS_ARE_PARAMETERS, MODELS, llama


def reversed_inject(model: Any, wanted: Any) -> Any:
    return inject_adapter_in_model(wanted, model)


def add_second(model: Any, wanted: Any) -> None:
    model.add_adapter("second", wanted)


# What a pyramid does not do is refused


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_bias": True},
        {"layer_replication": [(0, 2), (1, 3)]},
        {"use_qalora": True},
        {"alora_invocation_tokens": [1, 2]},
        {"loftq_config": {"loftq_bits": 4}},
        {"megatron_config": {"a": 1}},
        {"target_parameters": ["q_proj.weight"], "lora_dropout": 0.1},
        {"target_parameters": ["q_proj.weight"], "use_dora": True},
    ],
    ids=lambda its: "-".join(its),
)
def test_what_a_pyramid_cannot_do_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=list(changes)[-1]):
        config(**changes)


def test_no_field_of_loras_config_is_ignored() -> None:
    """Every field of PEFT's LoraConfig is passed on, refused, or known here to work."""
    from msplora.config import _REFUSED

    works = """
        task_type peft_type auto_mapping peft_version base_model_name_or_path revision r bias
        inference_mode target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out
        use_rslora modules_to_save init_lora_weights layers_to_transform layers_pattern
        rank_pattern alpha_pattern megatron_core trainable_token_indices runtime_config use_dora
        target_parameters ensure_weight_tying qalora_group_size
    """
    fields = set(LoraConfig.__dataclass_fields__)
    assert fields - set(works.split()) - set(_REFUSED) == set()


def test_a_mixed_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"(?i)msplora|compatible"):
        get_peft_model(LLAMA.model(), config(), mixed=True)


def test_loading_into_a_mixed_model_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"(?i)msplora|compatible"):
        PeftMixedModel.from_pretrained(LLAMA.model(), str(saved))


@pytest.mark.parametrize("wrap", [get_peft_model, reversed_inject], ids=["peft", "inject"])
def test_a_foreign_lora_on_the_model_is_refused(wrap: Any) -> None:
    base: Any = LLAMA.model()
    inject_adapter_in_model(LoraConfig(target_modules=["o_proj"]), base, "foreign")
    before = snapshot(base)
    with pytest.raises(UnsupportedError, match=r"o_proj.*another method"):
        wrap(base, config())
    assert snapshot(base) == before


def test_a_lora_on_top_is_refused() -> None:
    model = adapted()
    expected, before = logits(model), snapshot(model)
    with pytest.raises(ValueError, match="MSPLORA"):  # PEFT's own refusal
        model.add_adapter("second", LoraConfig(target_modules=TARGETS))
    assert snapshot(model) == before
    assert torch.equal(logits(model), expected)


def test_a_lora_injected_into_an_adapted_model_is_refused() -> None:
    base: Any = inject_adapter_in_model(config(), LLAMA.model()).eval()
    expected = logits(base)
    with pytest.raises(ValueError, match=r"MSPLoRA|lora"):
        inject_adapter_in_model(LoraConfig(target_modules=TARGETS), base, "second")
    assert torch.equal(logits(base), expected)


@pytest.mark.parametrize(
    "again",
    [{}, {"target_modules": ["q_proj"]}, {"target_modules": ["q_prj"]}, {"use_dora": True}],
    ids=str,
)
@pytest.mark.parametrize("wrap", [get_peft_model, reversed_inject], ids=["peft", "inject"])
def test_a_second_adapter_of_the_same_name_is_refused(
    wrap: Any, again: dict[str, Any], tmp_path: Path
) -> None:
    """A cell of a notebook that runs again, on the base or on what the first run made of it."""
    base: Any = LLAMA.model()
    model: Any = wrap(base, config()).eval()
    randomise(model)
    expected, before = logits(model), [snapshot(its) for its in (base, model)]
    for once_more in (base, model):
        with pytest.raises(ConfigError, match=r"has an adapter 'default' already.*unload\(\)"):
            wrap(once_more, config(**again))
        assert [snapshot(its) for its in (base, model)] == before
        assert torch.equal(logits(model), expected)
    saved = {key: its.clone() for key, its in peft.get_peft_model_state_dict(model).items()}
    other: Any = wrap(LLAMA.model(), config()).eval()
    peft.set_peft_model_state_dict(other, saved)
    assert torch.equal(logits(other), expected)


def test_the_name_of_an_adapter_that_was_taken_off_is_free() -> None:
    model = adapted(use_dora=True)
    expected = logits(adapted(model.unload(), target_modules=["q_proj"]))
    fresh = adapted(target_modules=["q_proj"])
    assert torch.equal(expected, logits(fresh))
    fresh.add_adapter("second", config())
    fresh.delete_adapter("default")
    fresh.add_adapter("default", config())
    assert sorted(fresh.peft_config) == ["default", "second"]
    assert_shared(fresh, plan_of(fresh))


def test_injecting_from_a_state_dict_is_refused() -> None:
    state_dict = peft.get_peft_model_state_dict(adapted())
    with pytest.raises(UnsupportedError, match="config"):
        inject_adapter_in_model(config(), LLAMA.model(), state_dict=state_dict)


# Targets that match nothing


BAD_TARGETS = {
    "a target": ({"target_modules": ["q_prj", "v_proj"]}, r"'q_prj'.*Did you mean.*'q_proj'"),
    "a target of a BERT": ({"target_modules": ["query"]}, r"'query'"),
    "a regular expression": ({"target_modules": r".*\.q_prj"}, r"regular expression.*'"),
    "a layer": ({"layers_to_transform": [0, 9]}, r"\[9\].*'model.layers' has blocks 0 to 3"),
    "one layer": ({"layers_to_transform": 4}, r"\[4\].*0 to 3"),
    "a negative layer": ({"layers_to_transform": [-1]}, r"\[-1\]"),
    "a pattern of layers": (
        {"layers_to_transform": [0], "layers_pattern": "blocks"},
        r"'blocks'.*'model.layers'",
    ),
    "a module to leave out": ({"exclude_modules": ["k_prj"]}, r"'k_prj'.*'k_proj'"),
    "everything left out": ({"exclude_modules": ["q_proj", "v_proj"]}, r"exclude_modules"),
    "a rank pattern": ({"rank_pattern": {"k_proj": 4}}, r"rank_pattern.*'k_proj'"),
    "an alpha pattern": ({"alpha_pattern": {"k_proj": 4}}, r"alpha_pattern.*'k_proj'"),
    "a pattern for one layer of a kind": (
        {"rank_pattern": {"layers.0.self_attn.q_proj": 4}},
        r"share.*'q_proj'",
    ),
    "a parameter": ({"target_parameters": ["q_proj.wieght"]}, r"'q_proj.wieght'.*weight"),
    "a parameter that is excluded": (
        {
            "target_modules": [],
            "target_parameters": ["q_proj.weight"],
            "exclude_modules": r".*layers\.[13]\..*",
        },
        r"'model.layers.1.self_attn.q_proj.weight'.*exclude_modules.*in full.*'model.layers.0",
    ),
    "a parameter of another layer": (
        {
            "target_modules": ["v_proj"],
            "target_parameters": ["q_proj.weight"],
            "layers_to_transform": [0, 2],
        },
        r"'model.layers.1.self_attn.q_proj.weight'.*layers_to_transform = \[0, 2\].*in full",
    ),
    "a module to save": ({"modules_to_save": ["lm_haed"]}, r"'lm_haed'.*'lm_head'"),
    "a head of no task": ({"modules_to_save": ["classifier"]}, r"names 'classifier'"),
    "the head of a classifier": (
        {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]},
        r"'classifier'.*head would stay as it is.*'lm_head'",
    ),
    "the head for answers": ({"task_type": "QUESTION_ANS"}, r"'qa_outputs'.*would stay as it is"),
    "heads without a task": (
        {"modules_to_save": ["classifier", "score"]},
        r"'score'.*would stay as it is",
    ),
    "a norm": ({"target_modules": ["input_layernorm"]}, r"input_layernorm.*LlamaRMSNorm"),
    "a block": ({"target_modules": ["self_attn"]}, r"self_attn.*Inside.*q_proj"),
    "no target": ({"target_modules": []}, r"names nothing.*'q_proj'"),
    "a parent": ({"target_modules": ["attention.q_proj"]}, r"There is 'self_attn.q_proj'"),
    "a token's embedding": (
        {"trainable_token_indices": {"embed_token": [1]}},
        r"'embed_token'.*'embed_tokens'",
    ),
    "a token": ({"trainable_token_indices": [3, 999]}, r"999.*0 to 63"),
}


@pytest.mark.parametrize("name", BAD_TARGETS)
@pytest.mark.parametrize("wrap", [get_peft_model, reversed_inject, add_second, msplora.plan])
def test_a_target_that_matches_nothing(name: str, wrap: Any) -> None:
    changes, says = BAD_TARGETS[name]
    model: Any = adapted() if wrap is add_second else LLAMA.model()
    expected, before = logits(model), snapshot(model)
    with pytest.raises(MSPLoraError, match=re.compile(says, re.DOTALL)):
        wrap(model, config(**changes))
    assert snapshot(model) == before
    assert torch.equal(logits(model), expected)
    # And the right config still works on the same model.
    wrap(model, config())


def test_what_catches_pefts_error_for_no_match_catches_ours() -> None:
    pefts = getattr(peft, "NoMatchingPeftModuleError", ValueError)  # new in 0.21
    with pytest.raises(pefts, match=r"Target modules .* not found in the base model"):
        get_peft_model(LLAMA.model(), config(target_modules=["q_prj"]))


@pytest.mark.parametrize(
    ("model", "changes", "says"),
    [
        ("mixtral", {"target_modules": ["gate_up_proj"]}, r"parameter.*target_parameters"),
        ("mixtral", {"target_modules": ["w1"]}, r"parameter 'gate_up_proj'.*target_parameters"),
        ("mixtral", {"target_parameters": ["q_proj"]}, r"module 'q_proj'.*target_modules"),
        ("llama", {"target_modules": ["query"]}, r"differ in names.*'q_proj'"),
        ("bert", {"target_modules": ["q_proj"]}, r"differ in names.*'query'"),
    ],
)
def test_a_name_from_another_release_or_field(model: str, changes: dict, says: str) -> None:
    if model == "mixtral" and not EXPERTS_ARE_PARAMETERS:
        pytest.skip("before transformers 5, experts were linear layers")
    with pytest.raises(TargetError, match=says):
        msplora.plan(MODELS[model].model(1), msplora.MSPLoraConfig(**changes))


@pytest.mark.parametrize("model", ["gpt2", None, {}])
def test_a_plan_of_no_model_is_refused(model: Any) -> None:
    with pytest.raises(TargetError, match=rf"AutoConfig.*{type(model).__name__}"):
        msplora.plan(model, config())


def test_a_plan_of_another_methods_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="LoraConfig"):
        msplora.plan(LLAMA.model(), LoraConfig())  # pyright: ignore[reportArgumentType]


def test_no_targets_for_an_unknown_model() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(4, 4)

    with pytest.raises(TargetError, match=r"Please specify `target_modules`.*'project'"):
        get_peft_model(Own(), msplora.MSPLoraConfig())


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["q_proj", "lm_head"]], ids=str)
def test_a_tied_embedding_or_head_is_refused(targets: list[str]) -> None:
    base = llama(2, tie_word_embeddings=True)
    before = snapshot(base)
    with pytest.raises(TargetError, match=r"ensure_weight_tying"):
        get_peft_model(base, config(target_modules=targets))
    assert snapshot(base) == before
    assert base.lm_head.weight is base.model.embed_tokens.weight


@pytest.mark.skipif(not EXPERTS_ARE_PARAMETERS, reason="experts were linear layers")
def test_a_regular_expression_that_means_experts_too_warns() -> None:
    pattern = r".*\.(q_proj|gate_up_proj|down_proj)"
    experts = ["gate_up_proj", "down_proj"]
    with pytest.warns(UserWarning, match=r"experts.gate_up_proj.*Name them in target_parameters"):
        get_peft_model(MODELS["mixtral"].model(), config(target_modules=pattern))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "target_modules = ")
        named = config(target_modules=pattern, target_parameters=experts)
        get_peft_model(MODELS["mixtral"].model(), named)


def test_a_tie_that_the_config_of_the_base_denies_is_refused() -> None:
    base = llama(2, tie_word_embeddings=True)
    base.config.tie_word_embeddings = False
    before = snapshot(base)
    for targets in (["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]):
        with pytest.raises(TargetError, match="one weight, but the model's config says"):
            get_peft_model(base, config(target_modules=targets, ensure_weight_tying=True))
    assert snapshot(base) == before


# The config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"r": 3}, r"at least 4.*ranks="),
        ({"r": 1}, r"at least 4.*ranks="),
        ({"r": 0}, r"1 or more"),
        ({"r": -8}, r"1 or more"),
        ({"r": 8.0}, r"whole number"),
        ({"r": True}, r"whole number"),
        ({"ranks": [8, 4], "groups": [1, 3, 0]}, r"ranks has 2, groups has 3"),
        ({"ranks": [8, 4, 2], "alphas": [16]}, r"alphas has 1"),
        ({"ranks": [8, 4, 2], "levels": ["a", "b"]}, r"levels has 2"),
        ({"ranks": [8, 4]}, r"groups"),
        ({"ranks": []}, r"empty"),
        ({"ranks": [8, 0, 2]}, r"1 or more"),
        ({"ranks": [8, 4, 2], "r": 4}, r"r = 4"),
        ({"groups": [1, -3, 0]}, r"0 \(one pair per layer\) or more"),
        ({"groups": [1, 2.5, 0]}, r"whole number"),
        ({"levels": ["a", "a", "b"]}, r"own name"),
        ({"levels": ["A", "b", "c"]}, r"small letters"),
        ({"levels": ["a/b", "b", "c"]}, r"small letters"),
        ({"levels": ["a.b", "b", "c"]}, r"small letters"),
        ({"alphas": [16, float("nan"), 1]}, r"finite"),
        ({"alphas": [16, float("inf"), 1]}, r"finite"),
        ({"alphas": [16, 0, 1]}, r"above 0"),
        ({"lora_alpha": -1}, r"above 0"),
        ({"bias": "some"}, r"msplora_only"),
        ({"lora_dropout": 1.5}, r"lora_dropout.*0.*1"),
        ({"lora_dropout": -0.1}, r"lora_dropout.*0.*1"),
        ({"lora_dropout": "0.1"}, r"lora_dropout.*0.*1"),
        ({"ranks": 8}, r"ranks = 8.*a list"),
        ({"groups": 3}, r"groups = 3.*a list"),
        ({"levels": "abc"}, r"levels = 'abc'.*a list"),
        ({"rank_pattern": {"q_proj": "4"}}, r"rank_pattern holds '4'"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern holds 0"),
        ({"alpha_pattern": {"q_proj": -4}}, r"alpha_pattern holds -4"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, r"alpha_pattern.*finite"),
        ({"modules_to_save": "lm_head"}, r"\['lm_head'\]"),
        ({"target_modules": r".*\.(q_proj"}, r"target_modules.*regular expression.*none"),
        ({"exclude_modules": r".*\.(v_proj"}, r"exclude_modules.*expression.*list of names"),
        ({"rank_pattern": {"q_proj(": 4}}, r"rank_pattern holds 'q_proj\('.*expression.*none"),
        ({"alpha_pattern": {"*q_proj": 4}}, r"alpha_pattern holds.*expression.*none"),
        ({"modules_to_save": ["lm_head["]}, r"modules_to_save holds 'lm_head\['.*none"),
        ({"layers_pattern": ["h", "layers("], "layers_to_transform": [0]}, r"'layers\('.*none"),
        ({"layers_pattern": "layers(", "layers_to_transform": [0]}, r"list of names"),
        ({"init_lora_weights": "gausian"}, r"Did you mean 'gaussian'"),
        ({"format_version": 99}, r"format_version 99"),
    ],
    ids=str,
)
def test_impossible_configs_are_refused_when_made(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=re.compile(says, re.DOTALL)):
        config(**changes)


def test_a_layers_pattern_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="layers_to_transform"):
        get_peft_model(LLAMA.model(), config(layers_pattern="blocks"))


# An injection that fails half-way


@pytest.mark.parametrize("fails_at", [0, 3, 7])
@pytest.mark.parametrize("wrap", [get_peft_model, reversed_inject, add_second])
def test_a_failed_injection_leaves_the_model_as_it_was(
    fails_at: int, wrap: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from msplora.model import MSPLoraModel

    model: Any = adapted() if wrap is add_second else LLAMA.model()
    expected, before = logits(model), snapshot(model)
    lend = MSPLoraModel._lend
    count = 0

    def failing(self: Any, *args: Any) -> None:
        nonlocal count
        if count == fails_at:
            raise MemoryError("no memory left")
        count += 1
        lend(self, *args)

    wanted = config(target_modules=["q_proj", "o_proj"])
    with monkeypatch.context() as patched:
        patched.setattr(MSPLoraModel, "_lend", failing)
        with pytest.raises(MemoryError):
            wrap(model, wanted)
    assert snapshot(model) == before
    assert torch.equal(logits(model), expected)
    adapter_name = "second" if wrap is add_second else "default"
    again = wrap(model, wanted) or model
    assert_shared(again, plan_of(again, adapter_name), adapter_name)


# Registration


def test_it_works_after_only_importing_msplora(saved: Path) -> None:
    program = (
        "import sys, msplora\n"
        "assert 'torch' not in sys.modules and 'peft' not in sys.modules\n"
        "from peft import PeftConfig\n"
        f"config = PeftConfig.from_pretrained({str(saved)!r})\n"
        "print(type(config).__name__, config.ranks, config.peft_type.value)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "MSPLoraConfig [8, 4, 2] MSPLORA"
