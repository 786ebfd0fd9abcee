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
from analysed import WEIGHTS, edit, refused, save, update
from msplora.analysis.reading import read_adapter
from msplora.errors import BaseModelError
from msplora.loading import BaseOptions
from oracle import levels_of, plan_of
from tiny import MODELS, llama


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
            # Llava's files call the weights by other names.
            weight = base.weight(site.key, kind.matrix)
            assert weight is not None
            frozen = model.get_base_model().get_submodule(site.key).base_layer.weight
            torch.testing.assert_close(weight, frozen.T if name == "gpt2" else frozen)


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


def test_blocks_that_are_skipped_keep_their_numbers(tmp_path: Path) -> None:
    folder = save(adapted(layers_to_transform=[1, 2, 3]), tmp_path)
    alone, _ = read_adapter(folder)
    assert [site.layer for site in alone.kinds[0].sites] == [1, 2, 3]


def test_numbers_that_the_config_does_not_tell_are_counted(tmp_path: Path) -> None:
    """It lists three blocks, of which two have an adapted query: which ones is not known."""
    skipped = {"exclude_modules": ["model.layers.1.self_attn.q_proj"]}
    folder = save(adapted(layers_to_transform=[1, 2, 3], **skipped), tmp_path)
    alone, _ = read_adapter(folder)
    found = {kind.name: (kind.counted, [its.layer for its in kind.sites]) for kind in alone.kinds}
    assert found == {"self_attn.q_proj": (True, [0, 1]), "self_attn.v_proj": (False, [1, 2, 3])}
    assert any("the layers are counted" in note for note in alone.notes)
    listed, _ = read_adapter(save(adapted(layers_to_transform=[1, 2, 3]), tmp_path / "listed"))
    assert not any("the layers are counted" in note for note in listed.notes)


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


def test_noise_is_not_analysed_and_a_scale_of_zero_is_named(tmp_path: Path) -> None:
    """Orthogonal factors have a product of zero, but for rounding."""
    options = {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}
    model: Any = get_peft_model(llama(), LoraConfig(**options))
    folder = save(model, tmp_path)
    assert 0 < max(float(its.max()) for its in msplora.singular_values(model).values()) < 1e-4
    (found,) = msplora.analyse(folder).adapters
    assert found.levels[0].norm == 0
    assert found.kinds[0].similarity is None
    assert "4 of 4 weights are not changed" in found.notes[-1]
    (finding,) = msplora.inspect(folder).problems
    assert finding.rule == "no effect"
    edit(save(get_peft_model(llama(), LoraConfig(**options)), tmp_path / "scaled"), lora_alpha=0)
    (found,) = msplora.analyse(tmp_path / "scaled/adapter").adapters
    assert "alpha (lora_alpha) is 0" in found.notes[-1]


def test_other_methods_are_named_and_refused(tmp_path: Path) -> None:
    loha = get_peft_model(llama(), peft.LoHaConfig(target_modules=["q_proj"]))
    refused(save(loha, tmp_path / "loha"), match="is a LOHA adapter")
    dora = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    refused(save(dora, tmp_path / "dora"), match="uses DoRA")
    unknown = save(adapted(), tmp_path / "unknown")
    edit(unknown, peft_type="BRAND_NEW")
    refused(unknown, match="BRAND_NEW")
    pooled = save(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])), tmp_path / "pool")
    edit(pooled, use_qalora=True)
    refused(pooled, match="uses QALoRA, which pools")
    for field, name in (("kasa_config", "KaSA"), ("monteclora_config", "MonteCLoRA")):
        if hasattr(LoraConfig(), field):  # an earlier PEFT has none of them
            edit(pooled, **{"use_qalora": False, "kasa_config": None, field: {}})
            refused(pooled, match=f"uses {name}, which")


def test_what_velora_keeps_for_its_training_is_no_part_of_the_update(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    folder = save(get_peft_model(llama(), config), tmp_path)
    plain = msplora.analyse(folder).adapters[0].kinds
    tensors = load_file(folder / WEIGHTS)
    for name in list(tensors):
        if "lora_A" in name:
            tensors[name.replace("lora_A.weight", "lora_velora_embed")] = torch.ones(8)
    save_file(tensors, folder / WEIGHTS)
    assert msplora.analyse(folder).adapters[0].kinds == plain


@pytest.mark.parametrize(
    ("field", "value"),
    [("lora_alpha", None), ("lora_alpha", "16"), ("alpha_pattern", {"(": 4}), ("r", 0)],
)
def test_a_config_that_is_damaged_is_named(field: str, value: Any, tmp_path: Path) -> None:
    lora = save(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])), tmp_path)
    edit(lora, **{field: value})
    refused(lora, match=f"{field} is ")


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
    # A pair of another width than its kind's first is neither cut nor padded.
    narrow = {
        key: its[:, :-1] if "mid/1/self_attn/q_proj/pair.msplora_A" in key else its
        for key, its in tensors.items()
    }
    save_file({key: its.contiguous() for key, its in narrow.items()}, folder / WEIGHTS)
    refused(folder, match=r"mid/1/self_attn.q_proj has A \(4, 31\).* asks for \(4, 32\)")
    (folder / WEIGHTS).write_bytes(b"cut")
    refused(folder, match="cannot be read")
    lora = save(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])), tmp_path / "lora")
    tensors = load_file(lora / WEIGHTS)
    save_file(dict(list(tensors.items())[1:]), lora / WEIGHTS)
    refused(lora, match="half of a pair")


def test_ranks_that_are_not_the_configs_are_no_experts(tmp_path: Path) -> None:
    adapted(ranks=[16, 8, 4]).save_pretrained(tmp_path / "twice")
    folder = save(adapted(ranks=[8, 4, 2]), tmp_path)
    (folder / WEIGHTS).write_bytes((tmp_path / "twice" / WEIGHTS).read_bytes())
    refused(folder, match=r"has A \(16, 32\) and B \(32, 16\); the config asks for \(8, 32\)")


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
    refused(
        lora, base=str(tmp_path / "wide"), match=r"A \(8, 32\).* the base has it of shape 64x64"
    )
    refused(folder, base=str(tmp_path / "nowhere"), match="there is no such folder")


@pytest.mark.parametrize(
    ("name", "targets", "size", "wider"),
    [
        ("gpt2", ["c_attn"], "n_embd", 64),
        ("llama", ["embed_tokens"], "hidden_size", 64),
        ("vit", r".*projection", "patch_size", 4),
    ],
)
def test_a_base_of_another_size_under_any_layer(
    name: str, targets: Any, size: str, wider: int, tmp_path: Path
) -> None:
    base = MODELS[name].model()
    config = LoraConfig(target_modules=targets, init_lora_weights=False)
    lora = save(get_peft_model(base, config), tmp_path, MODELS[name].model())
    sound = msplora.analyse(lora, base=str(tmp_path / "base"), intruder_vectors=0)
    assert all(kind.relative_norm is not None for kind in sound.adapters[0].kinds)
    setattr(base.config, size, wider)
    type(MODELS[name].model())(base.config).save_pretrained(tmp_path / "other")
    refused(lora, base=str(tmp_path / "other"), match=r"and the base has it of shape")


def test_what_the_file_alone_does_not_say_needs_the_base(tmp_path: Path) -> None:
    folder = save(adapted(ranks=[4, 2], groups=[1, 2]), tmp_path, MODELS["llama"].model())
    refused(folder, match="the file alone does not say how many layers share. Pass --base")
    (found,) = msplora.analyse(folder, base=str(tmp_path / "base"), intruder_vectors=0).adapters
    assert len(found.kinds[0].sites) == 4
    assert found.kinds[0].intruders is None


@pytest.mark.parametrize("command", ["analyse", "doctor"])
def test_a_shard_of_the_base_that_is_damaged_is_named(command: str, tmp_path: Path) -> None:
    folder = save(adapted(), tmp_path)
    MODELS["llama"].model().save_pretrained(tmp_path / "base", max_shard_size="50KB")
    shard = sorted((tmp_path / "base").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    base = str(tmp_path / "base")

    def examined() -> None:
        if command == "analyse":
            msplora.analyse(folder, base=base)
        else:
            msplora.doctor(base, folder)

    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BaseModelError, match=f"{shard.name} .* is cut short or damaged"):
        examined()
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(BaseModelError, match=f"{shard.name} is a git-lfs pointer") as raised:
        examined()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("intruders", [0, 2])
def test_a_base_with_a_number_that_is_none(intruders: int, tmp_path: Path) -> None:
    folder = save(adapted(), tmp_path, MODELS["llama"].model())
    file = tmp_path / "base/model.safetensors"
    tensors, name = load_file(file), "model.layers.2.self_attn.v_proj.weight"
    tensors[name][3, 1] = math.nan
    save_file(tensors, file)
    said = rf"'{name}' holds values that are not finite"
    refused(folder, base=str(tmp_path / "base"), intruder_vectors=intruders, match=said)


@pytest.mark.parametrize("by", [1e100, 1e160])
def test_updates_beyond_float64(by: float, tmp_path: Path) -> None:
    """Where the product still has numbers, and its square has none; and where it has none."""
    folder = save(adapted(), tmp_path)
    tensors = {name: its.double() * by for name, its in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    refused(folder, match=r"the update s·BA of .*self_attn.q_proj' is too large")


def test_updates_beyond_the_base_s_dtype(tmp_path: Path) -> None:
    folder = save(adapted(), tmp_path, MODELS["llama"].model())
    tensors = {name: its * 1e20 for name, its in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    base = str(tmp_path / "base")
    refused(folder, base=base, match=r"the update s·BA of 'self_attn.q_proj' is too large")
    msplora.analyse(folder, base=base, intruder_vectors=0).to_json()


def test_no_adapter_or_one_twice(tmp_path: Path) -> None:
    folder = save(adapted(), tmp_path)
    refused(match="no adapter to analyse")
    refused(folder, folder, match="is given more than once")
    refused(tmp_path / "nothing", match="there is no folder")
