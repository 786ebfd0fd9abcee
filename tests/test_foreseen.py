"""What a conversion refuses is refused before the base's weights are loaded."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

import msplora
from msplora import _peft, loading
from msplora.adapted import load_adapted
from msplora.errors import BaseModelError, ConfigError, MSPLoraError, UnsupportedError
from msplora.loading import BaseOptions
from msplora.updates import updates_of
from tiny import MODELS, llama

SHAPE: dict[str, Any] = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama, a pyramid of it, one with DoRA, and a plain LoRA; a GPT-2 and a pyramid of it."""
    folder = tmp_path_factory.mktemp("adapters")
    model: Any = llama(layers=4)
    model.save_pretrained(folder / "base")
    names = ["q_proj", "v_proj"]
    adapters = {
        "pyramid": msplora.MSPLoraConfig(target_modules=names, **SHAPE),
        "dora": msplora.MSPLoraConfig(target_modules=names, use_dora=True, **SHAPE),
        "lora": LoraConfig(target_modules=names, **SHAPE),
        "lora-dora": LoraConfig(target_modules=names, use_dora=True, **SHAPE),
        "lora-uneven": LoraConfig(
            target_modules=names, use_rslora=True, alpha_pattern={"v_proj": 9}, **SHAPE
        ),
        "adalora": AdaLoraConfig(target_modules=names, total_step=9, **SHAPE),
    }
    for name, config in adapters.items():
        base = LlamaForCausalLM.from_pretrained(folder / "base")
        get_peft_model(base, config).save_pretrained(str(folder / name))
    gpt2: Any = MODELS["gpt2"].model()
    gpt2.save_pretrained(folder / "gpt2")
    config = msplora.MSPLoraConfig(target_modules=["c_attn"], **SHAPE)
    base = type(gpt2).from_pretrained(folder / "gpt2")
    get_peft_model(base, config).save_pretrained(str(folder / "of-gpt2"))
    return folder


@pytest.mark.parametrize(
    ("convert", "source", "options", "said"),
    [
        (msplora.to_lora, "pyramid", {"dtype": "fp16"}, "no dtype 'fp16'; there are float32"),
        (msplora.to_lora, "pyramid", {"pad_to": "pow3"}, "'none', 'pow2' or a rank above 0"),
        (msplora.to_lora, "pyramid", {"pad_to": "16"}, "above 0, not '16'"),
        (msplora.to_lora, "pyramid", {"pad_to": 0}, "above 0, not 0"),
        (msplora.to_lora, "pyramid", {"pad_to": 6}, "rank 7, which cannot be padded to 6"),
        (msplora.to_lora, "pyramid", {"server": "vllm", "max_lora_rank": 1}, "above the 1 of vLLM"),
        (msplora.to_lora, "dora", {"server": "vllm"}, "vLLM cannot serve.*DoRA"),
        (msplora.to_lora, "of-gpt2", {"server": "vllm"}, "vLLM cannot serve.*Conv1D"),
        (msplora.to_lora, "of-gpt2", {"form": "gguf"}, "transposed"),
        (msplora.to_lora, "of-gpt2", {"form": "mlx"}, "mlx-lm cannot serve"),
        (msplora.to_lora, "lora", {}, "a plain LoRA already"),
        (msplora.to_lora, "lora-dora", {"server": "vllm"}, "DoRA.*--to merged"),
        (
            msplora.to_lora,
            "lora-uneven",
            {"server": "sglang"},
            "use_rslora and alpha_pattern.*--to msplora --ranks 4 --groups 0",
        ),
        (msplora.to_lora, "lora", {"form": "gguf"}, "--to msplora --ranks 4 --groups 0"),
        (msplora.to_lora, "adalora", {}, "of type ADALORA.*merge it"),
        (msplora.to_msplora, "lora", {"dtype": "fp16"}, "no dtype 'fp16'"),
        (msplora.to_msplora, "lora", {"ranks": [8, 4]}, "say with groups"),
        (msplora.to_msplora, "lora", {"levels": ["A", "b", "c"]}, "level name 'A'"),
        (msplora.to_msplora, "lora", {"r": 2}, "r must be at least 4"),
        (msplora.to_msplora, "lora", {"r": 2, "ranks": [8, 4, 2]}, "Leave r out"),
        (msplora.to_msplora, "lora", {"data": "no-such.jsonl"}, "no-such.jsonl.*does not exist"),
    ],
)
def test_nothing_is_loaded_for_what_cannot_be(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    convert: Callable[..., Any],
    source: str,
    options: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.setattr("msplora.adapted.load_base_of", _not_yet)
    with pytest.raises((ConfigError, UnsupportedError), match=said):
        convert(folder / source, tmp_path / "out", **options)


def _not_yet(*_: object) -> None:
    raise AssertionError("the base was loaded")


@pytest.fixture
def attention(tmp_path: Path) -> Path:
    """A pyramid on an `nn.MultiheadAttention`, by the first in a process to adapt one."""
    config = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    transformers.SiglipVisionModel(config).save_pretrained(tmp_path / "base")
    base = transformers.SiglipVisionModel.from_pretrained(tmp_path / "base")
    options: dict[str, Any] = {"target_modules": ["head.attention"], "init_lora_weights": False}
    adapted = get_peft_model(base, msplora.MSPLoraConfig(**options))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    _peft.lora_counts_out_proj_twice.cache_clear()
    return tmp_path / "adapter"


@pytest.mark.filterwarnings("ignore:.*outside every list of blocks")
@pytest.mark.parametrize(
    ("options", "title"),
    [({"server": "vllm"}, "vLLM"), ({"form": "gguf"}, "llama.cpp"), ({"form": "mlx"}, "mlx-lm")],
)
def test_an_adapted_attention_is_refused_for_what_it_is(
    attention: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    title: str,
) -> None:
    monkeypatch.setattr("msplora.adapted.load_base_of", _not_yet)
    with pytest.raises(UnsupportedError, match=f"{title} cannot serve.*nn.MultiheadAttention"):
        msplora.to_lora(attention, tmp_path / "out", **options)


@pytest.mark.filterwarnings("ignore:.*outside every list of blocks")
def test_an_adapted_attention_is_padded(attention: Path, tmp_path: Path) -> None:
    assert msplora.to_lora(attention, tmp_path / "out", pad_to="pow2").rank == 16


def test_a_missing_library_is_missed_before_the_base_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msplora.adapted.load_base_of", _not_yet)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MSPLoraError, match=r"pip install -e '\.\[gguf\]' in msplora's clone"):
        msplora.to_lora(folder / "pyramid", tmp_path / "out", form="gguf")


def test_a_base_that_cannot_be_built_without_weights_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And then the same is refused."""

    def with_weights_only(*_: object) -> None:
        raise BaseModelError("no shapes without weights")

    monkeypatch.setattr("msplora.on_shapes.without_weights", with_weights_only)
    with pytest.raises(UnsupportedError, match=r"vLLM cannot serve.*DoRA"):
        msplora.to_lora(folder / "dora", tmp_path / "out", server="vllm")


def test_a_plain_lora_gets_another_form_by_way_of_a_pyramid(folder: Path, tmp_path: Path) -> None:
    """As the refusal says, and nothing is lost on the way."""
    pyramid = tmp_path / "pyramid"
    msplora.to_msplora(folder / "lora", pyramid, ranks=[4], groups=[0], verify=False)
    msplora.to_lora(pyramid, tmp_path / "back", verify=False)
    updates = [
        {key: [b @ a for a, b in blocks] for key, blocks in updates_of(load_adapted(its))}
        for its in (folder / "lora", tmp_path / "back")
    ]
    assert set(updates[0]) == set(updates[1])
    for key, (update,) in updates[0].items():
        torch.testing.assert_close(updates[1][key][0], update, rtol=1e-5, atol=1e-6)
    msplora.to_lora(pyramid, tmp_path / "mlx", form="mlx")


def test_a_dtype_of_the_base_is_one() -> None:
    with pytest.raises(ConfigError, match="no dtype 'half'"):
        BaseOptions(dtype="half")


class OfTheUser(LlamaForCausalLM):
    """A class that transformers does not know."""


class GemmaForCausalLM(LlamaForCausalLM):
    """One that has the name of another class there."""


def edited(folder: Path, out: Path, **values: Any) -> Path:
    shutil.copytree(folder, out)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | values))
    return out


def test_a_base_of_the_user_s_own_class_is_loaded_as_that(folder: Path, tmp_path: Path) -> None:
    own = {"base_model_class": "OfTheUser", "parent_library": __name__}
    adapter = edited(folder / "pyramid", tmp_path / "own", task_type=None, auto_mapping=own)
    assert type(load_adapted(adapter).get_base_model()) is OfTheUser
    assert msplora.to_lora(adapter, tmp_path / "out").comparison is not None
    own["base_model_class"] = "GemmaForCausalLM"
    config = loading.read_config(
        edited(folder / "pyramid", tmp_path / "named-alike", task_type=None, auto_mapping=own)
    )
    assert loading.base_class(config, str(folder / "base"), BaseOptions()) is GemmaForCausalLM
    # A module that nothing has imported is not imported because a file names it.
    own = {"base_model_class": "OfTheUser", "parent_library": "antigravity"}
    adapter = edited(folder / "pyramid", tmp_path / "other", task_type=None, auto_mapping=own)
    with pytest.raises(BaseModelError, match=r"OfTheUser of antigravity.*has imported OfTheUser"):
        load_adapted(adapter)
    assert "antigravity" not in sys.modules


def test_the_architecture_is_looked_up_at_the_adapter_s_revision(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    original = transformers.AutoConfig.from_pretrained

    def looked_up(source: str, **options: Any) -> Any:
        asked.append(options["revision"])
        return original(source)

    changes: dict[str, Any] = {"task_type": None, "auto_mapping": None, "revision": "v2"}
    config = loading.read_config(edited(folder / "pyramid", tmp_path / "adapter", **changes))
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", looked_up)
    source = str(folder / "base")
    assert loading.base_class(config, source, BaseOptions()) is LlamaForCausalLM
    loading.base_class(config, source, BaseOptions(revision="v3"))
    loading.base_class(config, source, BaseOptions(source))  # the one that the adapter names
    loading.base_class(config, source, BaseOptions(str(folder / "gpt2")))  # v2 is not one of it
    assert asked == ["v2", "v3", "v2", None]


@pytest.mark.filterwarnings("ignore:the adapter names '/nowhere/base'")
@pytest.mark.parametrize("named", [None, "/nowhere/base"])
def test_the_base_that_was_given_is_recorded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    monkeypatch.chdir(folder)
    base = BaseOptions("base")
    for source, convert in (("pyramid", msplora.to_lora), ("lora", msplora.to_msplora)):
        changes = {"base_model_name_or_path": named, "revision": "v2"}
        adapter = edited(folder / source, tmp_path / source, **changes)
        out = tmp_path / f"{source}-out"
        convert(adapter, out, base=base, verify=False)
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(folder / "base")
        assert config["revision"] is None
        assert "# base, adapted" in (out / "README.md").read_text()


def test_the_losses_are_measured_on_the_base_that_was_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measured(path: Path, data: str, base: BaseOptions | None) -> dict[str, float]:
        asked.append(base)
        return {"loss": 1.0}

    evaluation = SimpleNamespace(evaluate_run=measured)
    monkeypatch.setitem(sys.modules, "msplora.train.evaluation", evaluation)
    base = BaseOptions(str(folder / "base"), revision="v2", trust_remote_code=True)
    (tmp_path / "rows.jsonl").touch()
    found = msplora.to_msplora(
        folder / "lora",
        tmp_path / "out",
        base=base,
        data=str(tmp_path / "rows.jsonl"),
        verify=False,
    )
    assert found.loss == (1.0, 1.0)
    assert asked == [base, base]
