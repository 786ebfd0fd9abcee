"""What `msplora analyse` makes of plain LoRAs, and how PEFT's patterns know their weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import msplora
from analysed import WEIGHTS, edit, refused, save, update
from msplora.analysis.reading import read_adapter
from msplora.analysis.results import SiteResult
from msplora.loading import BaseOptions
from tiny import EXPERTS_ARE_PARAMETERS, MODELS, llama

experts_are_parameters = pytest.mark.skipif(
    not EXPERTS_ARE_PARAMETERS, reason="before transformers 5 they are layers"
)


@pytest.mark.parametrize("name", ["llama-all-linear", "bert", "gpt2"])
def test_a_plain_lora_is_read(name: str, tmp_path: Path) -> None:
    tiny = MODELS[name]
    config = LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=tiny.targets,
        init_lora_weights=False,
        rank_pattern={r".*\.1\..*": 5},
        alpha_pattern={r".*\.2\..*": 2},
        use_rslora=True,
    )
    model: Any = get_peft_model(tiny.model(), config)
    folder = save(model, tmp_path, tiny.model())
    for read in (
        read_adapter(folder)[0],
        read_adapter(folder, BaseOptions(str(tmp_path / "base")))[0],
    ):
        assert read.levels == ("lora",)
        found = {
            site.key: update(kind, at) for kind in read.kinds for at, site in enumerate(kind.sites)
        }
        assert set(found) == set(model.base_model.targeted_module_names)
        for kind in read.kinds:
            assert [site.layer for site in kind.sites] == list(range(4))
        for key, its in found.items():
            layer = model.get_base_model().get_submodule(key)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            expected = layer.scaling["default"] * b.detach().double() @ a.detach().double()
            torch.testing.assert_close(its, expected, rtol=1e-6, atol=1e-9)
    (analysed,) = msplora.analyse(folder).adapters
    for site in (site for kind in analysed.kinds for site in kind.sites):
        rank = 5 if site.layer == 1 else 3
        assert len(site.update.singular_values) == site.update.numerical_rank == rank


def mixtral(folder: Path, **changes: Any) -> tuple[Any, Path]:
    """A LoRA of random factors on a query and two parameters of four experts each."""
    tiny = MODELS["mixtral"]
    options = {"r": 8, "target_modules": ["q_proj"], "target_parameters": [*tiny.parameters]}
    config = LoraConfig(**(options | changes), init_lora_weights=False)
    model: Any = get_peft_model(tiny.model(), config)
    return model, save(model, folder, tiny.model())


def norms(model: Any) -> dict[str, float]:
    """Name of a parameter, or of a query, and its expert → the norm of what PEFT adds to it."""
    found = {}
    for layer, block in enumerate(model.get_base_model().model.layers):
        query = block.self_attn.q_proj.get_delta_weight("default")
        found[f"{layer}.self_attn.q_proj"] = float(query.detach().norm())
        wrapper = block.mlp.experts
        while hasattr(wrapper, "parameter_name"):
            for expert, delta in enumerate(wrapper.get_delta_weight("default")):
                name = f"{layer}.mlp.experts.{wrapper.parameter_name}[expert {expert}]"
                found[name] = float(delta.detach().norm())
            wrapper = wrapper.base_layer
    return found


def sites(folder: Path, **options: Any) -> list[SiteResult]:
    (found,) = msplora.analyse(folder, intruder_vectors=0, **options).adapters
    return [site for kind in found.kinds for site in kind.sites]


@experts_are_parameters
@pytest.mark.parametrize("config", [msplora.MSPLoraConfig, LoraConfig])
def test_every_expert_is_a_weight_of_its_own(config: Any, tmp_path: Path) -> None:
    tiny = MODELS["mixtral"]
    asked = config(
        r=4,
        target_modules=["q_proj"],
        target_parameters=list(tiny.parameters),
        init_lora_weights=False,
    )
    model: Any = get_peft_model(tiny.model(), asked)
    folder = save(model, tmp_path)
    (found,) = msplora.analyse(folder).adapters
    assert sum("expert 3" in kind.name for kind in found.kinds) == 2
    squares = sum(site.update.norm**2 for kind in found.kinds for site in kind.sites)
    expected = sum(
        float(values.square().sum()) for values in msplora.singular_values(model).values()
    )
    assert math.isclose(squares, expected, rel_tol=1e-6)


@experts_are_parameters
@pytest.mark.parametrize(
    "patterns",
    [
        {"alpha_pattern": {"down_proj": 64}},
        {"rank_pattern": {"down_proj": 4}},
        {"rank_pattern": {r"experts\.gate_up_proj": 2}, "alpha_pattern": {"down_proj": 1}},
        # Which PEFT matches against no parameter.
        {"alpha_pattern": {"experts": 64}, "rank_pattern": {"experts": 2}},
        {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"q_proj": 2}},
    ],
)
def test_patterns_know_a_parameter_by_its_name(patterns: dict[str, Any], tmp_path: Path) -> None:
    model, folder = mixtral(tmp_path, **patterns)
    expected = norms(model)
    found = sites(folder, base=str(tmp_path / "base"))
    assert len(found) == len(expected) == 4 * (1 + 2 * 4)
    for site in found:
        norm = expected[site.key.removeprefix("model.layers.")]
        assert math.isclose(site.update.norm, norm, rel_tol=1e-5)
    if "down_proj" in patterns.get("alpha_pattern", {}) and "rank_pattern" not in patterns:
        refused(folder, match=r"gate_up_proj.* does not tell their pairs apart\. Pass --base")
        return
    # Ranks that differ, of as many experts, tell without the base which pair is whose.
    alone = sites(folder)
    assert sorted(site.update.norm for site in alone) == pytest.approx(sorted(expected.values()))


@experts_are_parameters
def test_an_inspection_reads_them_alike_and_says_what_it_does_not_know(tmp_path: Path) -> None:
    model, folder = mixtral(tmp_path / "ranks", rank_pattern={"down_proj": 4})
    found = msplora.inspect(folder)
    assert found.problems == ()
    squares = sum((pair.norm or 0) ** 2 for pair in found.pairs)
    assert math.isclose(squares, sum(norm**2 for norm in norms(model).values()), rel_tol=1e-5)
    _, folder = mixtral(tmp_path / "alphas", alpha_pattern={"down_proj": 64})
    notes = [its.text for its in msplora.inspect(folder).findings if its.severity == "note"]
    assert any("names weights by paths that the file does not have" in its for its in notes)


@experts_are_parameters
def test_parameters_that_do_not_fit_the_config_or_the_base(tmp_path: Path) -> None:
    _, folder = mixtral(tmp_path)
    edit(folder, r=7, rank_pattern={"q_proj": 8})
    refused(folder, match="of no whole number of experts of rank 7")
    edit(folder, r=8, target_parameters=["mlp.experts.down_proj"])
    refused(folder, base=str(tmp_path / "base"), match=r"1 parameter.* and the file has 2 pair")
    edit(folder, target_parameters=[*MODELS["mixtral"].parameters])
    config: Any = MODELS["mixtral"].model().config
    config.num_local_experts = 2
    hf.MixtralForCausalLM(config).save_pretrained(tmp_path / "fewer")
    refused(folder, base=str(tmp_path / "fewer"), match=r"the base has it of shape 2\*")


@pytest.mark.parametrize("rank", [0, 2, 5])
def test_a_rank_that_the_config_does_not_ask_for(rank: int, tmp_path: Path) -> None:
    config = LoraConfig(r=3, target_modules=["q_proj"], rank_pattern={r".*\.1\..*": 5})
    folder = save(get_peft_model(llama(), config), tmp_path)
    msplora.analyse(folder)
    tensors = load_file(folder / WEIGHTS)
    for name in list(tensors):
        if "layers.1." not in name:
            its = torch.ones(5, 32)[:rank]
            tensors[name] = its if "lora_A" in name else its.T.contiguous()
    save_file(tensors, folder / WEIGHTS)
    refused(folder, match=rf"layers\.0\..* have rank {rank}, and the config asks for 3")


@pytest.mark.parametrize("method", [LoraConfig, msplora.MSPLoraConfig])
def test_an_attention_has_figures_against_the_base(method: Any, tmp_path: Path) -> None:
    """Its in_proj is a parameter, and its out_proj lies inside the adapted attention."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = hf.SiglipVisionConfig(num_hidden_layers=1, image_size=16, patch_size=8, **sizes)
    base = hf.SiglipVisionModel(config)
    patterns = {"alpha_pattern": {"attention": 3}} if method is LoraConfig else {}
    asked = method(target_modules=r".*head\.attention", r=4, init_lora_weights=False, **patterns)
    model: Any = get_peft_model(hf.SiglipVisionModel(config), asked)
    folder = save(model, tmp_path, base)
    found = {
        site.key.rpartition("head.")[2]: site for site in sites(folder, base=str(tmp_path / "base"))
    }
    assert set(found) == {"attention", "attention.out_proj"}
    attention = next(its for path, its in base.named_modules() if path.endswith("head.attention"))
    weights = {
        "attention": attention.in_proj_weight,
        "attention.out_proj": attention.out_proj.weight,
    }
    deltas = msplora.singular_values(model)
    for key, site in found.items():
        assert site.base_norm == pytest.approx(float(weights[key].detach().norm()), rel=1e-5)
        (values,) = [its for path, its in deltas.items() if path.endswith(f"head.{key}")]
        assert site.update.norm == pytest.approx(float(values.norm()), rel=1e-5)


def test_what_a_lora_does_beside_its_product_is_said(tmp_path: Path) -> None:
    gpt2 = LoraConfig(target_modules=["c_attn"], lora_bias=True, init_lora_weights=False)
    folder = save(get_peft_model(MODELS["gpt2"].model(), gpt2), tmp_path / "bias")
    (found,) = msplora.analyse(folder).adapters
    assert any("a bias beside s·BA in 4 weight(s) (lora_bias)" in note for note in found.notes)
    options = {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [5, 6]}
    activated = LoraConfig(target_modules=["q_proj"], **options)
    folder = save(get_peft_model(llama(), activated), tmp_path / "activated")
    (found,) = msplora.analyse(folder).adapters
    assert any("acts from these tokens on" in note for note in found.notes)


def test_a_model_inside_a_sequential_has_its_blocks(tmp_path: Path) -> None:
    """As sentence-transformers' models have: `0.auto_model.encoder.layer.3…`."""
    model = nn.Sequential(MODELS["bert"].model(), nn.Identity())
    folder = save(get_peft_model(model, LoraConfig(target_modules=["query"])), tmp_path)
    (kind,) = msplora.analyse(folder).adapters[0].kinds
    assert [site.layer for site in kind.sites] == [0, 1, 2, 3]
    (inspected,) = msplora.inspect(folder).kinds
    assert inspected.layers == 4
    # Blocks that are the sequence themselves stay what they are, whatever is in them.
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)))
    folder = save(get_peft_model(blocks, LoraConfig(target_modules=r"\d\.0")), tmp_path / "of")
    (kind,) = msplora.analyse(folder).adapters[0].kinds
    assert [site.layer for site in kind.sites] == [0, 1, 2]


@pytest.mark.parametrize(
    ("prefix", "more"),
    [
        ("0.auto_model.encoder.layer", ("2.linear",)),
        ("0.sub_modules.query.0.auto_model.encoder.layer", ()),
    ],
)
def test_a_model_inside_a_sequential_of_several_parts(
    prefix: str, more: tuple[str, ...], tmp_path: Path
) -> None:
    """As sentence-transformers' with a dense head that is adapted too, or with a router."""
    folder = save(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])), tmp_path)
    tensors = {
        name.replace("model.layers", prefix): its
        for name, its in load_file(folder / WEIGHTS).items()
    }
    for name in more:
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(8, 32)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(16, 8)
    save_file(tensors, folder / WEIGHTS)
    kinds = msplora.analyse(folder).adapters[0].kinds
    layers = {kind.name: [site.layer for site in kind.sites] for kind in kinds}
    assert layers == {"self_attn.q_proj": [0, 1, 2, 3], **{key: [None] for key in more}}


def test_experts_of_one_block_are_no_blocks(tmp_path: Path) -> None:
    folder = save(get_peft_model(llama(1), LoraConfig(target_modules=["q_proj"])), tmp_path)
    tensors = load_file(folder / WEIGHTS)
    for name in list(tensors):
        for expert in (10, 2, 0):
            place = f"mlp.experts.{expert}.up_proj"
            tensors[name.replace("self_attn.q_proj", place)] = tensors[name].clone()
    save_file(tensors, folder / WEIGHTS)
    kinds = msplora.analyse(folder).adapters[0].kinds
    # By number, and not 0, 10, 2.
    experts = [f"mlp.experts.{expert}.up_proj" for expert in (0, 2, 10)]
    assert [kind.name for kind in kinds] == [*experts, "self_attn.q_proj"]


def test_what_is_counted_are_the_numbers_in_the_file(tmp_path: Path) -> None:
    """As matrices, the factors of a grouped convolution have zeros beside its groups."""
    model = nn.Sequential(*(nn.Conv2d(16, 16, 3, groups=4) for _ in range(2)))
    folder = save(get_peft_model(model, LoraConfig(r=8, target_modules=["0", "1"])), tmp_path)
    stored = sum(its.numel() for its in load_file(folder / WEIGHTS).values())
    assert msplora.analyse(folder).adapters[0].parameters == stored
