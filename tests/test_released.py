"""Checkpoints of the code released with the paper: what its forward computed, written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BertForSequenceClassification

import msplora
from msplora.errors import AdapterFileError, ConfigError, UnsupportedError
from msplora.loading import read_config
from msplora.released import created_levels, is_released, load_released
from tiny import MODELS, VOCABULARY, llama

# By hand, from the released code: 7 / 3 = 2.33 and 4.67, so the groups begin with 0, 3 and 5. The
# other blocks take the mid pair of block 0, 2 or 4, all of which is in the end block 0's.
LAYERS = 7
ACTING = {0: (0, 1, 2), 1: (2,), 2: (2,), 3: (1, 2), 4: (2,), 5: (1, 2), 6: (2,)}
MID_FROM = {0: 0, 1: 0, 2: 0, 3: 3, 4: 0, 5: 5, 6: 0}
RANKS, ALPHAS = [2, 8, 4], [16, 8, 4]  # as given; that code sorts the ranks and not the alphas
SCALES = (16 / 8, 8 / 4, 4 / 2)
IDS = torch.arange(2 * 9).reshape(2, 9) % VOCABULARY
Pairs = dict[tuple[str, int], tuple[Tensor, Tensor]]


def random_pairs() -> Pairs:
    """Of every module and level, those that are shared being the same tensors."""
    generator = torch.Generator().manual_seed(0)
    pairs: Pairs = {}
    for layer in range(LAYERS):
        for kind, out in (("q_proj", 32), ("v_proj", 16)):
            for level, rank in enumerate((8, 4, 2)):
                owner = (0, MID_FROM[layer], layer)[level]
                key = f"model.layers.{layer}.self_attn.{kind}", level
                if owner == layer:
                    a = torch.randn(rank, 32, generator=generator) / 8
                    pairs[key] = a, torch.randn(out, rank, generator=generator) / 8
                else:
                    pairs[key] = pairs[f"model.layers.{owner}.self_attn.{kind}", level]
    return pairs


def save_checkpoint(folder: Path, pairs: Pairs, others: Any = None, **changes: Any) -> Path:
    """In that code's layout: a pickle, the level in the name, a list for r."""
    tensors = {
        f"base_model.model.{key}.lora_{name}_{level}.weight": its
        for (key, level), pair in pairs.items()
        for name, its in zip("AB", pair, strict=True)
    }
    out = folder / "released"
    out.mkdir(parents=True)
    torch.save(tensors | (others or {}), out / "adapter_model.bin")
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": str(folder / "base"),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": ALPHAS,
        "lora_dropout": 0.05,
        "mode": "msp",
        "modules_to_save": None,
        "peft_type": "MSPLORA",
        "r": RANKS,
        "revision": None,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    (out / "adapter_config.json").write_text(json.dumps(config | changes))
    return out


@pytest.fixture
def released(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    llama(LAYERS).save_pretrained(tmp_path / "base")  # pyright: ignore
    return save_checkpoint(tmp_path, random_pairs())


def written_out(base: Any, pairs: Pairs) -> Tensor:
    """The released forward in float64: the base, and of each layer the pairs that act in it."""
    handles = []
    for (key, level), (a, b) in pairs.items():
        layer = int(key.split(".")[2])
        if level not in ACTING[layer]:
            continue

        def add(module: Any, args: Any, out: Tensor, a=a, b=b, scale=SCALES[level]) -> Tensor:
            return out + scale * (args[0] @ a.double().T @ b.double().T)

        handles.append(base.get_submodule(key).register_forward_hook(add))
    with torch.no_grad():
        logits = base(IDS).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("convert", [msplora.to_lora, msplora.to_msplora, msplora.to_merged])
def test_it_computes_what_the_released_forward_computed(
    released: Path, tmp_path: Path, convert: Any
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").double()
    plain = base(IDS).logits.detach()
    expected = written_out(base, random_pairs())
    assert (expected - plain).abs().max() > 0.1
    result = convert(released, tmp_path / "out")
    assert result.comparison is not None
    if convert is msplora.to_merged:
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    else:
        model = PeftModel.from_pretrained(base.float(), str(tmp_path / "out"))
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval().double()(IDS).logits, expected, rtol=1e-4, atol=1e-5
        )


@pytest.mark.slow
def test_without_ranks_nothing_is_lost_and_with_ranks_it_is_said(
    released: Path, tmp_path: Path
) -> None:
    exact = msplora.to_msplora(released, tmp_path / "exact")
    assert (exact.ranks, exact.groups) == ([14], [0])
    assert exact.explained == pytest.approx(1, abs=1e-9)
    nearest = msplora.to_msplora(released, tmp_path / "nearest", ranks=[8, 4, 2])
    assert nearest.groups == [1, 3, 0]
    assert 0.1 < nearest.explained < 0.999


@pytest.mark.parametrize(
    ("blocks", "with_mid"),
    [(3, [0, 1, 2]), (5, [0, 2, 4]), (12, [0, 4, 8]), (32, [0, 11, 22]), (-1, [])],
)
def test_which_pairs_act(blocks: int, with_mid: list[int]) -> None:
    for block in range(max(blocks, 4)):
        acting = created_levels(f"model.layers.{block}.q_proj", 3, blocks)
        assert acting == tuple(
            level for level, acts in enumerate((block == 0, block in with_mid, True)) if acts
        )


def test_the_first_number_of_a_name_counts_as_the_block() -> None:
    assert created_levels("encoder.block.0.layer.1.q", 3, 6) == (0, 1, 2)
    assert created_levels("encoder.block.1.layer.0.q", 3, 6) == (2,)
    assert created_levels("pooler.dense", 3, -1) == ()
    assert created_levels("layers.1.q", 1, 6) == ()  # with one level only block 0 has a pair
    assert created_levels("layers.1.q", 2, 6) == (1,)


def test_a_classifiers_head_survives(tmp_path: Path) -> None:
    base: Any = MODELS["bert"].model(3)
    base.save_pretrained(tmp_path / "base")
    pairs: Pairs = {}
    for layer in range(3):
        key = f"bert.encoder.layer.{layer}.attention.self.query"
        pairs[key, 0] = torch.ones(2, 32), torch.ones(32, 2)
        pairs[key, 1] = torch.ones(1, 32) / (layer + 1), torch.ones(32, 1)
    head = "base_model.model.classifier"
    others = {
        f"{head}.weight": torch.full((3, 32), 0.5),
        f"{head}.bias": torch.arange(3.0),
        f"{head}.original_module.weight": torch.zeros(3, 32),
        f"{head}.original_module.bias": torch.zeros(3),
    }
    changes = {"r": [2, 1], "target_modules": ["query"], "task_type": "SEQ_CLS"}
    released = save_checkpoint(tmp_path, pairs, others, **changes)
    for convert in (msplora.to_lora, msplora.to_msplora):
        out = tmp_path / convert.__name__
        convert(released, out)
        tensors = load_file(out / "adapter_model.safetensors")
        assert torch.equal(tensors[f"{head}.weight"], others[f"{head}.weight"])
        assert not [name for name in tensors if "original_module" in name]
        fresh = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
        model = PeftModel.from_pretrained(fresh, str(out))
        assert torch.equal(
            model.get_submodule("base_model.model.classifier")(  # pyright: ignore
                torch.zeros(1, 32)
            ),
            torch.arange(3.0)[None],
        )


class Harmful:
    """What no reader may run."""

    def __reduce__(self) -> Any:
        return (print, ("ran code of the checkpoint",))


@pytest.mark.parametrize(
    "damage", ["code", "truncate", "nan", "copy", "level", "rank", "embedding"]
)
def test_a_damaged_checkpoint_is_refused(
    released: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = released / "adapter_model.bin"
    tensors = torch.load(file, weights_only=True)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A_0.weight"
    if damage == "code":
        tensors["x"] = Harmful()
    elif damage == "nan":
        tensors[name] = torch.full_like(tensors[name], float("nan"))
    elif damage == "copy":
        tensors[name] = tensors[name] + 1
    elif damage == "level":
        del tensors[name], tensors[name.replace("lora_A", "lora_B")]
    elif damage == "rank":
        tensors[name] = tensors[name][:-1]
    elif damage == "embedding":
        tensors["base_model.model.model.embed_tokens.lora_embedding_A_0"] = tensors[name]
    torch.save(tensors, file)
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:-2000])
    for convert in (msplora.to_lora, msplora.to_msplora):
        with pytest.raises(AdapterFileError):
            convert(released, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "ran code" not in capsys.readouterr().out


def test_what_is_not_read_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    llama(LAYERS).save_pretrained(tmp_path / "base")  # pyright: ignore
    for place, (changes, error, said) in enumerate(
        (
            ({"bias": "all"}, UnsupportedError, "Biases of the released code are not read"),
            ({"r": [8, 4, 0]}, AdapterFileError, "a rank above 0 and an alpha for each"),
            ({"lora_alpha": [16]}, AdapterFileError, "a rank above 0 and an alpha for each"),
        )
    ):
        folder = save_checkpoint(tmp_path / str(place), random_pairs(), **changes)
        with pytest.raises(error, match=said):
            msplora.to_lora(folder, tmp_path / "out")


def test_without_its_target_modules_the_pairs_say_where_they_are(released: Path) -> None:
    expected = load_released(released)[0](IDS).logits
    config = json.loads((released / "adapter_config.json").read_text())
    del config["target_modules"]
    (released / "adapter_config.json").write_text(json.dumps(config))
    torch.testing.assert_close(load_released(released)[0](IDS).logits, expected)


def test_a_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    base: Any = MODELS["bert"].model(3)
    base.save_pretrained(tmp_path / "base")
    key = "bert.encoder.layer.0.attention.self.query"
    pairs: Pairs = {(key, 0): (torch.ones(2, 32), torch.ones(32, 2))}
    others = {"base_model.model.classifier.weight": torch.ones(3, 31)}
    changes = {"r": [2], "target_modules": ["query"], "layers_to_transform": [0]}
    released = save_checkpoint(tmp_path, pairs, others, task_type="SEQ_CLS", **changes)
    with pytest.raises(AdapterFileError, match=r"of shape \(3, 31\).*has \(3, 32\)"):
        msplora.to_lora(released, tmp_path / "out")


def test_another_base_is_refused(released: Path, tmp_path: Path) -> None:
    """With another number of blocks the pairs would act in others."""
    llama(12).save_pretrained(tmp_path / "deeper")  # pyright: ignore
    with pytest.raises(AdapterFileError, match="the base it was trained on"):
        msplora.to_lora(
            released,
            tmp_path / "out",
            base=msplora.loading.BaseOptions(str(tmp_path / "deeper")),  # pyright: ignore
        )


def test_it_is_told_from_ours_and_peft_says_what_to_do(released: Path, tmp_path: Path) -> None:
    assert is_released(released)
    msplora.to_msplora(released, tmp_path / "ours")
    assert not is_released(tmp_path / "ours")
    with pytest.raises(ConfigError, match="msplora convert FOLDER OUT --to msplora"):
        read_config(released)


def test_the_same_in_safetensors_is_read_too(released: Path, tmp_path: Path) -> None:
    tensors = torch.load(released / "adapter_model.bin", weights_only=True)
    tensors = {name: its.clone() for name, its in tensors.items()}
    save_file(tensors, released / "adapter_model.safetensors", {"format": "pt"})
    (released / "adapter_model.bin").write_bytes(b"not looked at")
    assert msplora.to_lora(released, tmp_path / "out").rank == 14
