"""Which modules are adapted, and what the fields of the config do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

import msplora
from adapted_llama import (
    BATCH,
    LLAMA,
    adapted,
    base_logits,
    close,
    config,
    logits,
    step,
)
from oracle import (
    Untied,
    assert_shared,
    plan_of,
    randomise,
    root_of,
    trainable,
)
from tiny import MODELS, llama

# What is adapted


def sites(**changes: Any) -> list[str]:
    model = adapted(random=False, **changes)
    plan = plan_of(model)
    wrapped = [
        path
        for path, module in root_of(model).named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    ]
    assert sorted(wrapped) == sorted(site.key for site in plan.sites)
    return [re_layer(site.key) for site in plan.sites]


def re_layer(key: str) -> str:
    return key.removeprefix("model.layers.")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"target_modules": ["k_proj"]}, [f"{n}.self_attn.k_proj" for n in range(4)]),
        (
            {"target_modules": r".*\.[02]\..*\.(q|o)_proj"},
            [f"{n}.self_attn.{p}_proj" for p in "oq" for n in (0, 2)],
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [1, 3]},
            ["1.self_attn.q_proj", "3.self_attn.q_proj"],
        ),
        ({"target_modules": ["q_proj"], "layers_to_transform": 2}, ["2.self_attn.q_proj"]),
        (
            {
                "target_modules": ["q_proj"],
                "layers_to_transform": [0],
                "layers_pattern": "layers",
            },
            ["0.self_attn.q_proj"],
        ),
        (
            {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
            [f"{n}.self_attn.q_proj" for n in range(4)],
        ),
        (
            {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.[13]\..*"},
            ["0.self_attn.q_proj", "2.self_attn.q_proj"],
        ),
    ],
    ids=str,
)
def test_what_is_adapted(changes: dict[str, Any], expected: list[str]) -> None:
    assert sites(**changes) == expected


def test_all_linear_takes_no_head_and_no_embedding() -> None:
    found = sites(target_modules="all-linear")
    assert len(found) == 7 * 4
    assert not [key for key in found if "lm_head" in key or "embed" in key]


def test_the_default_targets_of_a_known_architecture() -> None:
    assert {key.rpartition(".")[2] for key in sites(target_modules=None)} == {"q_proj", "v_proj"}


def test_depth_counts_the_adapted_blocks() -> None:
    model = adapted(base=llama(9).eval(), layers_to_transform=[0, 4, 5, 8], groups=[1, 2, 0])
    plan = plan_of(model)
    mid = {pair.group: pair.blocks for pair in plan.pairs if pair.level == "mid"}
    assert mid == {0: (0, 4), 1: (5, 8)}
    assert "blocks [1, 2, 3, 6, 7] are not adapted" in str(plan)
    assert_shared(model, plan)


# Config options


def test_modules_to_save_train_are_saved_and_come_back(tmp_path: Path) -> None:
    tiny = MODELS["bert"]
    model: Any = get_peft_model(
        tiny.model(),
        msplora.MSPLoraConfig(target_modules=tiny.targets, modules_to_save=["classifier"]),
    )
    head = tiny.model().classifier
    head_numbers = sum(parameter.numel() for parameter in head.parameters())
    assert trainable(model) == plan_of(model).parameters + head_numbers
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == trainable(model)
    loaded = PeftModel.from_pretrained(tiny.model(), tmp_path).eval()
    expected = logits(model.eval(), tiny.batch())
    assert torch.equal(logits(loaded, tiny.batch()), expected)
    assert close(logits(loaded.merge_and_unload(), tiny.batch()), expected)


@pytest.mark.parametrize(
    ("name", "options", "head"),
    [
        ("BertForSequenceClassification", {"task_type": "SEQ_CLS"}, "classifier"),
        ("BertForTokenClassification", {"task_type": "TOKEN_CLS"}, "classifier"),
        ("BertForQuestionAnswering", {"task_type": "QUESTION_ANS"}, "qa_outputs"),
        ("BertForTokenClassification", {"modules_to_save": ["classifier", "score"]}, "classifier"),
        (
            "BertForNextSentencePrediction",
            {"task_type": "SEQ_CLS", "modules_to_save": ["seq_relationship"]},
            "cls.seq_relationship",
        ),
    ],
    ids=str,
)
def test_the_head_of_a_task_trains_by_whatever_name(
    name: str, options: dict[str, Any], head: str
) -> None:
    tiny = MODELS["bert"]
    base = getattr(transformers, name)(tiny.model(2).config)
    numbers = sum(its.numel() for its in base.get_submodule(head).parameters())
    asked = msplora.MSPLoraConfig(target_modules=tiny.targets, **options)
    model: Any = get_peft_model(base, asked)
    assert trainable(model) == plan_of(model).parameters + numbers
    whole = options.get("modules_to_save")
    second = msplora.MSPLoraConfig(target_modules=["key"], modules_to_save=whole)
    model.add_adapter("second", second)
    assert plan_of(model, "second").sites


def test_trainable_token_indices(tmp_path: Path) -> None:
    model = adapted(trainable_token_indices=[3, 7])
    assert trainable(model) == plan_of(model).parameters + 2 * 32
    step(model, {"input_ids": torch.tensor([[3, 7, 9, 3]])})
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.model(), tmp_path).eval()
    batch = {"input_ids": torch.tensor([[3, 7, 9, 3]])}
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert not torch.equal(logits(loaded, batch), logits(LLAMA.model(), batch))


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_autocast_adapter_dtype_takes_the_magnitudes_along(autocast_adapter_dtype: bool) -> None:
    model: Any = get_peft_model(
        LLAMA.model(dtype=torch.bfloat16),
        config(use_dora=True),
        autocast_adapter_dtype=autocast_adapter_dtype,
    )
    expected = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    assert {its.dtype for its in model.parameters() if its.requires_grad} == {expected}
    step(model)
    assert bool(torch.isfinite(logits(model)).all())


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_adapter_dtype(autocast_adapter_dtype: bool, dtype: torch.dtype) -> None:
    model: Any = get_peft_model(
        LLAMA.model(dtype=dtype), config(), autocast_adapter_dtype=autocast_adapter_dtype
    )
    expected = torch.float32 if autocast_adapter_dtype else dtype
    assert {a.dtype for a, _, _ in msplora.factors(model).values()} == {expected}
    assert {b.dtype for _, b, _ in msplora.factors(model).values()} == {expected}
    if Version(peft.__version__) < Version("0.21"):
        return  # there `add_adapter` takes no dtype
    model.add_adapter("second", config(), autocast_adapter_dtype=autocast_adapter_dtype)
    assert {a.dtype for a, _, _ in msplora.factors(model, "second").values()} == {expected}
    assert_shared(model, plan_of(model))
    assert_shared(model, plan_of(model, "second"), "second")


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted()
    model.print_trainable_parameters()
    assert f"trainable params: {plan_of(model).parameters:,} ||" in capsys.readouterr().out


def test_rslora_scales_by_the_root_of_each_rank() -> None:
    model = adapted(use_rslora=True)
    scales = {address.split("/")[0]: s for address, (_, _, s) in msplora.factors(model).items()}
    assert scales == pytest.approx(
        {"global": 16 / 8**0.5, "mid": 16 / 4**0.5, "local": 16 / 2**0.5}
    )


def test_dora_has_one_magnitude_per_site_and_starts_at_the_base(tmp_path: Path) -> None:
    model = adapted(random=False, use_dora=True)
    plan = plan_of(model)
    assert plan.magnitude_parameters == 4 * (32 + 16)
    assert trainable(model) == plan.parameters
    assert close(logits(model), base_logits())
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter *= 1.1
    # W = m (W0 + Σ s B A) / |W0 + Σ s B A|, rows
    untied = Untied(LLAMA.model(), model, plan)
    for site in plan.sites:
        weight = untied.weights[f"{site.key}.weight"].detach()
        magnitude = 1.1 * LLAMA.model().get_parameter(f"{site.key}.weight").norm(dim=1)
        untied.weights[f"{site.key}.weight"] = (magnitude / weight.norm(dim=1))[:, None] * weight
    expected = untied(**BATCH).logits.detach()
    assert close(logits(model), expected)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == plan.parameters
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(LLAMA.model(), tmp_path, **options).eval()
        assert torch.equal(logits(loaded), logits(model))
    native: Any = LLAMA.model()
    native.load_adapter(str(tmp_path))
    assert torch.equal(logits(native.eval()), logits(model))
    assert close(logits(model.merge_and_unload()), expected)


@pytest.mark.parametrize(
    ("bias", "extra"), [("none", 0), ("all", 4 * 2 * 32 + 3), ("msplora_only", 4 * 2 * 32)]
)
def test_bias(bias: Any, extra: int, tmp_path: Path) -> None:
    tiny = MODELS["bert"]
    base = tiny.model()
    if bias == "all":
        extra = sum(its.numel() for name, its in base.named_parameters() if name.endswith("bias"))
    model: Any = get_peft_model(base, msplora.MSPLoraConfig(target_modules=tiny.targets, bias=bias))
    assert trainable(model) == plan_of(model).parameters + extra
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == trainable(model)
    loaded = PeftModel.from_pretrained(tiny.model(), tmp_path).eval()
    assert torch.equal(logits(loaded, tiny.batch()), logits(model.eval(), tiny.batch()))


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_initialisations(init: Any) -> None:
    ranks = {"ranks": [8, 4, 2]}
    torch.manual_seed(0)
    model = adapted(random=False, init_lora_weights=init, **ranks)
    equal = close(logits(model), base_logits())
    assert equal is (init is not False)
    for a, b, _ in msplora.factors(model).values():
        assert bool(a.any())
        assert bool(b.any()) is (init not in (True, "gaussian"))
        assert bool(((b @ a).abs() < 1e-5).all()) is (init is not False)
    addresses = list(msplora.factors(model))
    same_shape = [address for address in addresses if address.startswith("local/")][:2]
    first, second = (msplora.factors(model)[address][0] for address in same_shape)
    assert not torch.equal(first, second)


def test_rank_and_alpha_patterns_of_a_kind() -> None:
    model = adapted(rank_pattern={"q_proj": 16}, alpha_pattern={r".*v_proj": 4})
    by_kind = {
        (pair.level, pair.kind.rpartition(".")[2]): (pair.rank, pair.scale)
        for pair in plan_of(model).pairs
    }
    assert by_kind["global", "q_proj"] == (16, 1.0)
    assert by_kind["local", "q_proj"] == (4, 4.0)
    assert by_kind["global", "v_proj"] == (8, 0.5)
    assert close(logits(model), Untied(LLAMA.model(), model, plan_of(model))(**BATCH).logits)
