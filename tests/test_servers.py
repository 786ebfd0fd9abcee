"""Converted adapters as each server computes them, and the refusal of what a server lacks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers as hf
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor

import msplora
from msplora.adapted import load_adapted
from msplora.cli.convert import ServerName
from msplora.convert import to_lora
from msplora.errors import ConfigError, MSPLoraError, UnsupportedError
from msplora.plain_lora import lora_of
from msplora.server_limits import asked_server, check_served, features
from msplora.serving import SERVERS, Form, serve_command
from msplora.to_gguf import rotary_order
from oracle import randomise
from runs import msplora as command
from tiny import MODELS, Tiny, llama

FILES = {"lora": "adapter_model.safetensors", "mlx": "adapters.safetensors", "gguf": "adapter.gguf"}


def adapted(tiny: Tiny, **options: Any) -> Any:
    config = msplora.MSPLoraConfig(
        r=4, lora_alpha=6, **({"target_modules": tiny.targets} | options)
    )
    model = get_peft_model(tiny.model(), config)
    randomise(model)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with fewer heads for keys, and an adapter of all its linear layers."""
    folder = tmp_path_factory.mktemp("servers")
    llama(layers=3).save_pretrained(folder / "base")  # pyright: ignore
    base = hf.LlamaForCausalLM.from_pretrained(folder / "base")
    config = msplora.MSPLoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model: Any = get_peft_model(base, config)
    randomise(model)
    model.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def deltas(folder: Path) -> dict[str, Tensor]:
    """What the pyramid adds to each weight, (out, in)."""
    model: Any = load_adapted(folder / "adapter")
    return {
        path: layer.get_delta_weight("default").detach()
        for path, layer in model.get_base_model().named_modules()
        if hasattr(layer, "borrowed")
    }


# Each engine's formula, of nothing but the files: PEFT's names -> the update of a weight.


def _peft_like(folder: Path, factor: Callable[[dict[str, Any]], float]) -> dict[str, Tensor]:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / FILES["lora"])
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): factor(config)
        * tensors[name.replace("lora_A", "lora_B")]
        @ tensor
        for name, tensor in tensors.items()
        if "lora_A" in name
    }


def by_vllm(folder: Path) -> dict[str, Tensor]:
    """vllm/lora/peft_helper.py: alpha over r, or over its root; patterns by module."""

    def factor(config: dict[str, Any]) -> float:
        assert not config["rank_pattern"]
        assert not config["alpha_pattern"]
        return config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1)

    return _peft_like(folder, factor)


def by_sglang(folder: Path) -> dict[str, Tensor]:
    """sglang/srt/lora/lora.py: alpha over r whatever else is said; every rank is the config's."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / FILES["lora"])
    assert {its.shape[0] for name, its in tensors.items() if "lora_A" in name} == {config["r"]}
    return _peft_like(folder, lambda config: config["lora_alpha"] / config["r"])


def by_mlx(folder: Path) -> dict[str, Tensor]:
    """mlx_lm/tuner/lora.py: x @ a @ b times the scale; the layers are those its keys select."""
    parameters = json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]
    tensors = load_file(folder / FILES["mlx"])
    found = {}
    for name, a in tensors.items():
        path, _, factor = name.rpartition(".")
        if factor == "lora_a":
            assert a.shape[1] == parameters["rank"]
            assert path.split(".", 3)[3] in parameters["keys"]
            found[path] = parameters["scale"] * (a @ tensors[f"{path}.lora_b"]).T
    return found


def by_llama_cpp(folder: Path) -> dict[str, Tensor]:
    """llama-adapter.h: alpha over the rank of the tensor, or 1 where alpha is 0."""
    reader = gguf.GGUFReader(folder / FILES["gguf"])
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama"
    alpha = fields["adapter.lora.alpha"]
    tensors = {its.name: torch.from_numpy(its.data.copy()) for its in reader.tensors}
    found = {}
    for name, a in tensors.items():
        if name.endswith(".lora_a"):
            b = tensors[name.replace(".lora_a", ".lora_b")]
            found[name.removesuffix(".weight.lora_a")] = (alpha / b.shape[1]) * b @ a
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
             "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj"}  # fmt: skip
    deltas = {}
    for name, delta in found.items():
        _, block, kind = name.split(".")
        heads = {"attn_q": 4, "attn_k": 2}.get(kind)
        if heads:  # back from features 2 i and 2 i + 1 to i and i + d / 2
            size = delta.shape[0] // heads
            order = [
                head * size + 2 * (place % (size // 2)) + place // (size // 2)
                for head in range(heads)
                for place in range(size)
            ]
            delta = delta[order]
        deltas[f"model.layers.{block}.{names[kind]}"] = delta
    return deltas


@pytest.mark.parametrize(
    ("form", "formula"),
    [("lora", by_vllm), ("lora", by_sglang), ("mlx", by_mlx), ("gguf", by_llama_cpp)],
    ids=["vllm", "sglang", "mlx", "llama.cpp"],
)
@pytest.mark.parametrize("pad_to", ["none", 11])
def test_each_engine_s_formula_gives_the_pyramid_s_update(
    folder: Path, deltas: dict[str, Tensor], tmp_path: Path, form: Any, formula: Any, pad_to: Any
) -> None:
    result = msplora.to_lora(
        folder / "adapter", tmp_path / "out", form=form, pad_to=pad_to, verify=False
    )
    assert result.rank == {"none": 7, 11: 11}[pad_to]
    found = formula(tmp_path / "out")
    assert found.keys() == deltas.keys()
    for path, delta in deltas.items():
        torch.testing.assert_close(found[path], delta, rtol=1e-5, atol=1e-6)


def test_llama_cpp_s_rotation_of_reordered_rows_is_transformers_rotation() -> None:
    """Attention scores at any two positions are the same in either layout."""
    heads, size, wide = 3, 8, 5
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(heads * size, wide, generator=generator) for _ in range(2))
    x = torch.randn(6, wide, generator=generator)
    angles = torch.outer(torch.arange(6.0), 100.0 ** -torch.linspace(0, 1, size // 2))

    def halves(y: Tensor) -> Tensor:  # transformers: i with i + d / 2
        first, second = y.chunk(2, -1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def neighbours(y: Tensor) -> Tensor:  # llama.cpp's Llama: 2 i with 2 i + 1
        first, second = y[..., ::2], y[..., 1::2]
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)

    def scores(rotate: Callable[[Tensor], Tensor], q: Tensor, k: Tensor) -> Tensor:
        left, right = (rotate((x @ its.T).reshape(6, heads, size)) for its in (q, k))
        return torch.einsum("ihd,jhd->hij", left, right)

    reordered = scores(neighbours, rotary_order(q, heads), rotary_order(k, heads))
    torch.testing.assert_close(reordered, scores(halves, q, k))
    assert not torch.allclose(scores(neighbours, q, k), scores(halves, q, k))
    assert torch.equal(rotary_order(rotary_order(q, heads), heads, back=True), q)


@pytest.mark.parametrize(
    ("form", "dtype"), [("mlx", "float16"), ("gguf", "float16"), ("gguf", "bfloat16")]
)
def test_what_is_written_is_read_back_and_proved(
    folder: Path, tmp_path: Path, form: Any, dtype: Any
) -> None:
    exact = msplora.to_lora(folder / "adapter", tmp_path / "lora", dtype=dtype)
    result = msplora.to_lora(folder / "adapter", tmp_path / "out", form=form, dtype=dtype)
    assert result.comparison == exact.comparison  # the same numbers, so the same logits
    assert result.out_bytes == (tmp_path / "out" / FILES[form]).stat().st_size
    msplora.to_lora(folder / "adapter", tmp_path / "out", form=form, force=True)


def test_a_wrong_file_is_found_before_it_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unordered(b: Tensor, heads: int, *, back: bool = False) -> Tensor:
        return rotary_order(b, heads) if back else b

    monkeypatch.setattr("msplora.to_gguf.rotary_order", unordered)
    with pytest.raises(MSPLoraError, match="Nothing was written"):
        msplora.to_lora(folder / "adapter", tmp_path / "out", form="gguf")
    assert os.listdir(tmp_path) == []


def test_names_are_llama_cpp_s(folder: Path, tmp_path: Path) -> None:
    msplora.to_lora(folder / "adapter", tmp_path / "out", form="gguf", verify=False)
    names = {its.name for its in gguf.GGUFReader(tmp_path / "out" / FILES["gguf"]).tensors}
    assert names == {
        f"blk.{layer}.{kind}.weight.lora_{factor}"
        for layer in range(3)
        for kind in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        for factor in "ab"
    }


def test_servers_that_join_layers_find_each_part() -> None:
    """SGLang joins q, k, v from q on, and gate, up from gate on."""
    for target, filled in (("k_proj", {"q_proj", "v_proj"}), ("up_proj", {"gate_proj"})):
        tensors, config = lora_of(adapted(Tiny(llama, [target])))
        assert set(config["target_modules"]) == {target} | filled
        for name, tensor in tensors.items():
            assert bool(tensor.any()) is (target in name)


DENSE = Tiny(llama, ["q_proj", "v_proj"])
LACKING: dict[str, tuple[str, Callable[[], Any]]] = {
    "DoRA": ("use_dora", lambda: adapted(DENSE, use_dora=True)),
    "biases": ("bias='all'", lambda: adapted(DENSE, bias="all")),
    "saved modules": ("'lm_head'", lambda: adapted(DENSE, modules_to_save=["lm_head"])),
    "classifier's head": ("'classifier'", lambda: adapted(MODELS["bert"], task_type="SEQ_CLS")),
    "trained tokens": ("trainable_token", lambda: adapted(DENSE, trainable_token_indices=[1])),
    "embedding": ("embed_tokens", lambda: adapted(Tiny(llama, ["q_proj", "embed_tokens"]))),
    "experts": (
        "experts",
        lambda: adapted(MODELS["mixtral"], target_parameters=[*MODELS["mixtral"].parameters]),
    ),
    "outside the language model": ("vision_tower", lambda: adapted(MODELS["llava"])),
    "convolution": (
        "patch_embeddings",
        lambda: adapted(MODELS["vit"], target_modules=["projection"]),
    ),
    "Conv1D": ("c_", lambda: adapted(MODELS["gpt2"])),
    "encoder and decoder": ("a T5ForCond", lambda: adapted(MODELS["t5"])),
    "no language model": ("a ViTForImageClassification", lambda: adapted(MODELS["vit"])),
}


@pytest.mark.parametrize("feature", LACKING)
def test_what_a_server_lacks_is_refused_with_the_reason(feature: str) -> None:
    where, build = LACKING[feature]
    model = build()
    for server in SERVERS.values():
        if feature not in server.lacks:
            check_served(features(model), server, 7)
            continue
        with pytest.raises(
            UnsupportedError, match=rf"{server.title} cannot serve.*{where}"
        ) as said:
            check_served(features(model), server, 7)
        assert server.lacks[feature] in str(said.value)


@pytest.mark.parametrize("feature", ["experts", "outside the language model"])
def test_what_vllm_would_skip_without_a_word_is_refused(feature: str) -> None:
    with pytest.raises(UnsupportedError, match=r"vLLM cannot serve.*skips"):
        check_served(features(LACKING[feature][1]()), SERVERS["vllm"], 7)


def test_the_language_model_of_one_with_a_tower_is_served() -> None:
    """With its head."""
    targets = r".*language_model.*(q_proj|v_proj)|lm_head"
    assert features(adapted(Tiny(MODELS["llava"].build, targets))) == {}


def test_a_rank_above_a_server_s_limit_names_the_limit_and_the_flag() -> None:
    model = features(adapted(DENSE))
    vllm, sglang = SERVERS["vllm"], SERVERS["sglang"]
    check_served(model, vllm, 512)
    with pytest.raises(UnsupportedError, match=r"513.*--max-lora-rank goes up to 512.*merged"):
        check_served(model, vllm, 513)
    check_served(model, vllm, 28, max_lora_rank=32)
    with pytest.raises(
        UnsupportedError, match=r"28, above the 16.*Start it with --max-lora-rank 32"
    ):
        check_served(model, vllm, 28, max_lora_rank=16)
    check_served(model, sglang, 2000)
    with pytest.raises(UnsupportedError, match="--max-lora-rank 28"):
        check_served(model, sglang, 28, max_lora_rank=27)


@pytest.mark.parametrize(
    ("server", "form", "limit", "reason"),
    [
        ("vllm", "lora", 30, "takes 1, 8, 16, 32, 64, 128, 256, 320, 512, not 30"),
        ("llama.cpp", "gguf", 32, "no limit"),
        (None, "gguf", 32, "no limit"),
        (None, "lora", 32, "--for"),
        ("ollama", "lora", None, "vllm, sglang"),
        ("vllm", "gguf", None, "--to lora"),
    ],
)
def test_what_no_adapter_could_have_is_refused_before_one_is_read(
    tmp_path: Path, server: str | None, form: Form, limit: int | None, reason: str
) -> None:
    nowhere, out = tmp_path / "no-adapter", tmp_path / "out"
    with pytest.raises(ConfigError, match=reason):
        to_lora(nowhere, out, server=server, form=form, max_lora_rank=limit)


def test_without_a_server_nothing_is_refused_for_one() -> None:
    assert asked_server(None, "lora") is None  # PEFT reads them all
    assert asked_server(None, "gguf") is SERVERS["llama.cpp"]


def test_the_command_line_offers_every_server() -> None:
    assert {its.value for its in ServerName} == set(SERVERS)


def test_the_command_has_the_least_limit_that_lets_it_in() -> None:
    for rank, limit in ((7, 8), (14, 16), (28, 32), (257, 320), (448, 512)):
        assert f"--max-lora-rank {limit} " in serve_command("base", "a dir", rank, "name", "vllm")
    assert "merged" in serve_command("base", "lora", 513, "name")
    assert serve_command("base", "a dir", 14, "name", "sglang").endswith("name='a dir'")
    assert "'a dir/adapter.gguf'" in serve_command("base", "a dir", 14, "name", "llama.cpp")
    assert "--adapter-path 'a dir'" in serve_command("base", "a dir", 14, "name", "mlx")
    for server in ("vllm", "sglang"):  # what it is started with, where that was said
        assert "--max-lora-rank 64" in serve_command("base", "lora", 14, "name", server, 64)


def save(model: Any, base: Any, folder: Path) -> Path:
    base.save_pretrained(folder / "base")
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.mark.parametrize(
    ("name", "form", "said"),
    [
        ("gpt2", "gguf", "Conv1D|transposed"),
        ("gpt2", "mlx", "names"),
        ("llama-bare", "mlx", r"model\.layers"),
        ("mixtral", "gguf", "'mixtral' is not known here, only of gemma"),
    ],
)
def test_a_model_that_a_form_cannot_hold_is_refused(
    name: str, form: Any, said: str, tmp_path: Path
) -> None:
    if name == "llama-bare":  # without a head its blocks are called layers.0
        tiny = Tiny(lambda layers: llama(layers).model, ["q_proj"])  # pyright: ignore
    else:
        tiny = Tiny(MODELS[name].build, ["c_attn"] if name == "gpt2" else ["q_proj"])
    task = "FEATURE_EXTRACTION" if name == "llama-bare" else "CAUSAL_LM"
    adapter = save(adapted(tiny, task_type=task), tiny.model(), tmp_path)
    with pytest.raises(UnsupportedError, match=said):
        msplora.to_lora(adapter, tmp_path / "out", form=form)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_the_command_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = folder / "adapter"

    def refused(*options: object) -> str:
        result = command("convert", adapter, tmp_path / "no", *options)
        assert result.code in (1, 2)
        assert not os.listdir(tmp_path)
        return result.error

    assert "onnx" in refused("--to", "onnx")
    assert "ollama" in refused("--to", "lora", "--for", "ollama")
    assert "convert with --to gguf" in refused("--to", "lora", "--for", "llama.cpp")
    assert (
        "give a folder's name"
        in command("convert", adapter, tmp_path / "adapter.gguf", "--to", "gguf").error
    )
    with pytest.raises(ConfigError, match="lora, gguf, mlx"):
        msplora.to_lora(adapter, tmp_path / "out", form="onnx")  # pyright: ignore
    assert not (tmp_path / "out").exists()
    assert "none, pow2 or a rank" in refused("--to", "lora", "--pad-to", "many")
    assert "rank 7, which cannot be padded to 5" in refused("--to", "lora", "--pad-to", 5)
    assert "LoRAs only" in refused("--to", "merged", "--for", "vllm")
    limit = ("--for", "vllm", "--pad-to", 20, "--max-lora-rank", 16)
    assert "--max-lora-rank 32" in refused("--to", "lora", *limit)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "gguf", None)
        assert "pip install -e '.[gguf]' in msplora's clone" in refused("--to", "gguf")
    done = command("convert", adapter, tmp_path / "gguf", "--to", "gguf")
    assert done.code == 0, done.err
    assert "Checked" in done.out
    assert f"--lora {tmp_path}/gguf/adapter.gguf" in done.out.replace("\n", "")
    assert sorted(os.listdir(tmp_path / "gguf")) == ["adapter.gguf", "conversion.json"]
