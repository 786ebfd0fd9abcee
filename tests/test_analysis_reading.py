"""What `msplora analyse` makes of adapters' files: LoRAs and pyramids, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import msplora
from adapted_llama import adapted
from msplora.analysis.reading import read_adapter
from msplora.analysis.stored import StoredKind
from msplora.errors import MSPLoraError
from msplora.loading import BaseOptions
from oracle import levels_of, plan_of
from tiny import EXPERTS_ARE_PARAMETERS, MODELS, llama

WEIGHTS = "adapter_model.safetensors"


def update(kind: StoredKind, place: int) -> Any:
    """The dense update of one layer, by the stored pairs."""
    pairs = [kind.pairs[its] for its in kind.sites[place].pairs]
    factors = [pair.read() for pair in pairs]
    return sum(
        pair.scale * b_OR.double() @ a_RI.double()
        for pair, (a_RI, b_OR) in zip(pairs, factors, strict=True)
    )


def save(model: Any, folder: Path, base: Any = None) -> Path:
    model.save_pretrained(folder / "adapter")
    if base is not None:
        base.save_pretrained(folder / "base")
    return folder / "adapter"


def edit(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama-all-linear", {}),
        ("llama", {"ranks": [4, 2], "groups": [2, 0], "use_rslora": True}),
        ("gemma", {"rank_pattern": {"q_proj": 12}, "alpha_pattern": {"down_proj": 3}}),
        ("gpt2", {}),
        ("t5", {}),
        ("llava", {}),
    ],
)
def test_a_pyramid_is_read_with_its_base_and_without(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    tiny = MODELS[name]
    model = adapted(tiny.model(), **{"target_modules": tiny.targets} | changes)
    folder = save(model, tmp_path, tiny.model())
    plan = plan_of(model)
    alone, nothing = read_adapter(folder)
    assert nothing is None
    planned, base = read_adapter(folder, BaseOptions(str(tmp_path / "base")))
    assert base is not None
    assert {site.key for kind in planned.kinds for site in kind.sites} == {
        site.key for site in plan.sites
    }
    counted = {kind.name: kind for kind in alone.kinds}
    for kind in planned.kinds:
        for place, site in enumerate(kind.sites):
            terms = levels_of(model, plan.site_of[site.key], plan)
            expected = sum(scale * b.double() @ a.double() for _, a, b, scale in terms)
            torch.testing.assert_close(update(kind, place), expected, rtol=1e-6, atol=1e-9)
            same = update(counted[kind.name], place)
            torch.testing.assert_close(same, expected, rtol=1e-6, atol=1e-9)
            assert site.layer == plan.site_of[site.key].block
            assert counted[kind.name].sites[place].layer == place
            if name != "llava":  # whose files call the weights by other names
                weight = base.weight(site.key)
                assert weight is not None
                assert tuple(weight.shape) == (kind.out_features, kind.in_features)


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


def test_embeddings_and_convolutions_and_a_site_outside_the_blocks(tmp_path: Path) -> None:
    tiny = MODELS["vit"]
    targets = r".*projection|.*query"
    model = adapted(tiny.model(), target_modules=targets)
    folder = save(model, tmp_path, tiny.model())
    (found,) = msplora.analyse(folder, base=str(tmp_path / "base")).adapters
    alone = [kind for kind in found.kinds if len(kind.sites) == 1]
    assert [kind.sites[0].layer for kind in alone] == [None]
    assert alone[0].similarity is None
    delta = model.get_base_model().get_submodule(alone[0].sites[0].key).get_delta_weight("default")
    norm = float(delta.detach().norm())
    assert math.isclose(alone[0].sites[0].update.norm, norm, rel_tol=1e-5)
    assert alone[0].relative_norm is not None


@pytest.mark.skipif(not EXPERTS_ARE_PARAMETERS, reason="before transformers 5 they are layers")
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


def test_blocks_that_are_skipped_keep_their_numbers(tmp_path: Path) -> None:
    folder = save(adapted(layers_to_transform=[1, 2, 3]), tmp_path)
    alone, _ = read_adapter(folder)
    assert [site.layer for site in alone.kinds[0].sites] == [1, 2, 3]


def test_a_pyramid_and_the_lora_that_it_is_have_the_same_updates(tmp_path: Path) -> None:
    model = adapted()
    folder = save(model, tmp_path, MODELS["llama"].model())
    from msplora.loading import write_json
    from msplora.plain_lora import lora_of

    tensors, config = lora_of(model)
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / WEIGHTS)
    write_json(tmp_path / "lora/adapter_config.json", config)
    found = msplora.analyse(folder, tmp_path / "lora")
    (comparison,) = found.comparisons
    assert (comparison.first, comparison.second) == ("adapter", "lora")
    assert [kind.kind for kind in comparison.kinds] == ["self_attn.q_proj", "self_attn.v_proj"]
    for kind in comparison.kinds:
        assert kind.layers == (0, 1, 2, 3)
        np.testing.assert_allclose([kind.cosine, kind.columns, kind.rows], 1, rtol=1e-6)


@pytest.mark.parametrize("method", [LoraConfig, msplora.MSPLoraConfig])
def test_an_encoder_is_compared_with_an_encoder(method: Any, tmp_path: Path) -> None:
    """Kinds of two stacks may have one name and shape: beside itself an adapter is itself."""
    model: Any = get_peft_model(MODELS["t5"].model(), method(target_modules=["q", "v"], r=4))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    for name in ("one", "other"):
        save(model, tmp_path / name)
    found = msplora.analyse(tmp_path / "one/adapter", tmp_path / "other/adapter")
    assert len(found.comparisons[0].kinds) == len(found.adapters[0].kinds)
    for kind in found.comparisons[0].kinds:
        np.testing.assert_allclose([kind.cosine, kind.columns, kind.rows], 1, rtol=1e-6)


def test_layers_that_are_only_counted_are_not_laid_beside_numbered_ones(tmp_path: Path) -> None:
    """Without the base nothing tells which block a pyramid's file skips; a LoRA's names do."""
    from msplora.loading import write_json
    from msplora.plain_lora import lora_of

    model = adapted(exclude_modules=["model.layers.1.self_attn.q_proj"])
    folder = save(model, tmp_path, MODELS["llama"].model())
    tensors, config = lora_of(model)
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / WEIGHTS)
    write_json(tmp_path / "lora/adapter_config.json", config)
    for base, layers in ((None, {}), (str(tmp_path / "base"), {"q_proj": (0, 2, 3)})):
        found = msplora.analyse(folder, tmp_path / "lora", base=base, intruder_vectors=0)
        compared = {its.kind.rpartition(".")[2]: its for its in found.comparisons[0].kinds}
        assert {name: its.layers for name, its in compared.items()} == {
            **layers,
            "v_proj": (0, 1, 2, 3),
        }
        for its in compared.values():
            np.testing.assert_allclose([its.cosine, its.columns, its.rows], 1, rtol=1e-6)


def test_two_adapters_that_have_nothing_in_common(tmp_path: Path) -> None:
    query = save(adapted(target_modules=["q_proj"]), tmp_path / "query")
    value = save(adapted(target_modules=["v_proj"]), tmp_path / "value")
    found = msplora.analyse(query, value)
    assert [its.name for its in found.adapters] == ["query/adapter", "value/adapter"]
    assert found.comparisons[0].kinds == ()


def test_an_untrained_adapter_has_no_shares_and_says_so(tmp_path: Path) -> None:
    folder = save(adapted(random=False), tmp_path)
    found = msplora.analyse(folder)
    (adapter,) = found.adapters
    assert adapter.levels[0].share is None
    assert adapter.kinds[0].similarity is None
    assert adapter.kinds[0].decoupling[0].columns == (None,) * 4
    assert "8 of 8 weights are not changed" in adapter.notes[-1]
    json.loads(found.to_json())
    assert "8 of 8 weights" in found.to_html()


def test_checkpoints_are_followed(tmp_path: Path) -> None:
    model = adapted()
    run = tmp_path / "run"
    for step in (5, 10, 100):
        with torch.no_grad():
            for address, (_, b, _) in msplora.factors(model).items():
                b.mul_(2 if address.startswith("local") else 1)
        model.save_pretrained(run / f"checkpoints/checkpoint-{step}")
    (found,) = msplora.analyse(run).adapters  # the last one stands for the run
    assert [its.step for its in found.history] == [5, 10, 100]
    assert found.history[-1].levels == found.levels
    norms = [its.levels[2].norm for its in found.history]
    np.testing.assert_allclose(norms, [norms[0], 2 * norms[0], 4 * norms[0]])
    assert len({its.levels[0].norm for its in found.history}) == 1
    np.testing.assert_allclose(
        found.history[-1].coarser_columns, found.inside_coarser("local")[0], rtol=1e-9
    )


def refused(*arguments: Any, match: str, **options: Any) -> None:
    with pytest.raises(MSPLoraError, match=match) as raised:
        msplora.analyse(*arguments, **options)
    assert "\n" not in str(raised.value)


def test_other_methods_are_named_and_refused(tmp_path: Path) -> None:
    loha = get_peft_model(llama(), peft.LoHaConfig(target_modules=["q_proj"]))
    refused(save(loha, tmp_path / "loha"), match="is a LOHA adapter")
    dora = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    refused(save(dora, tmp_path / "dora"), match="uses DoRA")
    unknown = save(adapted(), tmp_path / "unknown")
    edit(unknown, peft_type="BRAND_NEW")
    refused(unknown, match="BRAND_NEW")


def test_a_file_that_is_not_whole(tmp_path: Path) -> None:
    folder = save(adapted(), tmp_path)
    tensors = load_file(folder / WEIGHTS)

    def without(part: str) -> None:
        save_file({key: its for key, its in tensors.items() if part not in key}, folder / WEIGHTS)

    without(".mid/")
    refused(folder, match=r"lacks the level\(s\) mid of 'self_attn.q_proj'")
    without("mid/1/self_attn/q_proj")
    refused(folder, match=r"lacks 1 pair\(s\) of the level\(s\) mid: mid/1/self_attn.q_proj")
    without("local/2/self_attn/v_proj/pair.msplora_B")
    refused(folder, match=r"level\(s\) local: local/2/self_attn.v_proj")
    without("pyramid_store")
    refused(folder, match="holds no pair of a pyramid")
    misshapen = {
        key: its[:1] if "global/0/self_attn/q_proj/pair.msplora_A" in key else its
        for key, its in tensors.items()
    }
    save_file({key: its.contiguous() for key, its in misshapen.items()}, folder / WEIGHTS)
    refused(folder, match=r"global/0/self_attn.q_proj has A \(1, 32\)")
    (folder / WEIGHTS).write_bytes(b"cut")
    refused(folder, match="cannot be read")
    lora = save(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])), tmp_path / "lora")
    tensors = load_file(lora / WEIGHTS)
    save_file(dict(list(tensors.items())[1:]), lora / WEIGHTS)
    refused(lora, match="half of a pair")


def test_a_base_that_does_not_match(tmp_path: Path) -> None:
    folder = save(adapted(), tmp_path)
    MODELS["gpt2"].model().save_pretrained(tmp_path / "gpt2")
    refused(folder, base=str(tmp_path / "gpt2"), match="made for a llama, and this is a gpt2")
    lora = save(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])), tmp_path / "lora")
    refused(lora, base=str(tmp_path / "gpt2"), match="is a gpt2, and cannot be built as the Llama")
    llama(layers=5).save_pretrained(tmp_path / "deeper")  # pyright: ignore
    refused(folder, base=str(tmp_path / "deeper"), match="does not match .* have the hash")
    llama(layers=2).save_pretrained(tmp_path / "shallow")  # pyright: ignore
    refused(lora, base=str(tmp_path / "shallow"), match="the base has no such weight")
    llama(hidden_size=64).save_pretrained(tmp_path / "wide")  # pyright: ignore
    refused(lora, base=str(tmp_path / "wide"), match=r"of shape \(32, 32\), and the base has it")
    refused(folder, base=str(tmp_path / "nowhere"), match="there is no such folder")


def test_what_the_file_alone_does_not_say_needs_the_base(tmp_path: Path) -> None:
    folder = save(adapted(ranks=[4, 2], groups=[1, 2]), tmp_path, MODELS["llama"].model())
    refused(folder, match="the file alone does not say how many layers share. Pass --base")
    (found,) = msplora.analyse(folder, base=str(tmp_path / "base"), intruder_vectors=0).adapters
    assert len(found.kinds[0].sites) == 4
    assert found.kinds[0].intruders is None


def test_a_quantised_base_and_one_without_safetensors(tmp_path: Path) -> None:
    folder = save(adapted(), tmp_path, MODELS["llama"].model())
    base, file = str(tmp_path / "base"), tmp_path / "base/model.safetensors"
    tensors = load_file(file)
    save_file({key: its.to(torch.int8) for key, its in tensors.items()}, file)
    refused(folder, base=base, match="int8: it is quantised")
    file.unlink()
    refused(folder, base=base, match="no weights in safetensors")


def test_no_adapter_or_one_twice(tmp_path: Path) -> None:
    folder = save(adapted(), tmp_path)
    refused(match="no adapter to analyse")
    refused(folder, folder, match="is given more than once")
    refused(tmp_path / "nothing", match="there is no folder")
