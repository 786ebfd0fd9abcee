"""`msplora inspect`: the figures are those of an analysis, and it says what a thing is."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import msplora
from adapted_llama import adapted
from inspected import WEIGHTS, edit, lora, scaled, set_config
from msplora.errors import MSPLoraError
from msplora.inspection.tensor_file import TensorFiles
from msplora.loading import BaseOptions
from runs import msplora as command
from runs import tree
from tiny import EXPERTS_ARE_PARAMETERS, MODELS, llama


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("llama-all-linear", {}, marks=pytest.mark.slow),
        pytest.param(
            "gemma",
            {"rank_pattern": {"q_proj": 12}, "alpha_pattern": {"down_proj": 3}},
            marks=pytest.mark.slow,
        ),
        pytest.param("vit", {"target_modules": ".*projection|.*query"}, marks=pytest.mark.slow),
        ("gpt2", {"ranks": [4, 2], "groups": [2, 0], "use_rslora": True}),
    ],
)
def test_a_pyramid_has_the_figures_of_its_analysis(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    tiny = MODELS[name]
    adapted(tiny.model(), **{"target_modules": tiny.targets} | changes).save_pretrained(tmp_path)
    same_as_analysed(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not EXPERTS_ARE_PARAMETERS, reason="before transformers 5 they are layers")
@pytest.mark.parametrize("config", [msplora.MSPLoraConfig, LoraConfig])
def test_experts_are_measured_together(config: Any, tmp_path: Path) -> None:
    tiny = MODELS["mixtral"]
    parameters = list(tiny.parameters)
    asked = config(r=4, target_modules=["q_proj"], target_parameters=parameters)
    model: Any = get_peft_model(tiny.model(), asked)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    same_as_analysed(tmp_path, same_weights=False)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save (lm_head)"),
        ({"use_dora": True}, "use_dora"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ],
)
@pytest.mark.parametrize("method", ["lora", "pyramid"])
def test_what_the_config_asks_for_beside_the_pairs_has_to_be_there(
    method: str, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    if method == "lora":
        whole, lacking = lora(tmp_path / "a", **changes), lora(tmp_path / "b")
    else:
        for name, its in (("a", changes), ("b", {})):
            scaled(adapted(**its)).save_pretrained(tmp_path / name)
        whole, lacking = tmp_path / "a", tmp_path / "b"
    set_config(lacking, **changes)
    assert "missing part" not in {its.rule for its in msplora.inspect(whole).findings}
    problems = [its for its in msplora.inspect(lacking).findings if its.severity == "problem"]
    assert [its.rule for its in problems] == ["missing part"]
    assert named in problems[0].text


def test_a_head_is_missed_beside_another_module_that_was_trained_whole(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"task_type": "SEQ_CLS", "modules_to_save": ["pooler"]}
    bert = MODELS["bert"].model()
    bert.save_pretrained(tmp_path / "base")
    folder = lora(tmp_path / "adapter", bert, target_modules=["query"], **asked)
    assert msplora.inspect(folder).problems == ()
    edit(folder, lambda its: {key: t for key, t in its.items() if "classifier" not in key})
    (problem,) = msplora.inspect(folder).problems
    assert "modules_to_save (classifier, score)" in problem.text
    found = msplora.doctor(str(tmp_path / "base"), folder)
    assert "the file has no tensor" in found["made for this base"].said


def test_each_module_that_was_trained_whole_has_to_be_there(tmp_path: Path) -> None:
    folder = lora(tmp_path, modules_to_save=["embed_tokens", "lm_head"])
    assert msplora.inspect(folder).problems == ()
    edit(folder, lambda its: {key: t for key, t in its.items() if "lm_head" not in key})
    (problem,) = msplora.inspect(folder).problems
    assert problem.rule == "missing part"
    assert "modules_to_save (lm_head)" in problem.text
    # Of the heads that PEFT names for a classifier a model has one.
    bert = MODELS["bert"].model()
    head = lora(tmp_path / "head", bert, target_modules=["query"], task_type="SEQ_CLS")
    assert {"classifier", "score"} <= set(
        json.loads((head / "adapter_config.json").read_text())["modules_to_save"]
    )
    assert msplora.inspect(head).problems == ()
    edit(head, lambda its: {key: t for key, t in its.items() if "classifier" not in key})
    (problem,) = msplora.inspect(head).problems
    assert "(classifier, score)" in problem.text


def test_a_lora_has_the_figures_of_its_analysis(tmp_path: Path) -> None:
    pattern = {r".*\.1\..*": 5}
    same_as_analysed(lora(tmp_path, rank_pattern=pattern, alpha_pattern=pattern, use_rslora=True))


def same_as_analysed(folder: Path, same_weights: bool = True) -> None:
    """Norms of single pairs, and of levels where both count the same weights."""
    found, (analysed,) = msplora.inspect(folder), msplora.analyse(folder).adapters
    assert found.problems == ()
    assert found.parameters == sum(its.numel() for its in load_file(folder / WEIGHTS).values())
    squares: dict[str, float] = {level.level: 0.0 for level in found.levels}
    for pair in found.pairs:
        squares[pair.level] += (pair.norm or 0) ** 2 * max(len(pair.layers), 1)
    sites = [site for kind in analysed.kinds for site in kind.sites]
    for level, summary in zip(found.levels, analysed.levels, strict=True):
        expected = sum(site.levels[level.level].norm ** 2 for site in sites)
        assert math.isclose(squares[level.level], expected, rel_tol=1e-9)
        assert level.share is not None
        assert summary.share is not None
        assert math.isclose(level.share, summary.share, rel_tol=1e-9)
        if same_weights:
            assert level.norm is not None
            assert math.isclose(level.norm, summary.norm, rel_tol=1e-9)


def test_it_says_what_a_pyramid_is_and_who_shares(pyramid: Path) -> None:
    set_config(pyramid, base_model_name_or_path="some/model", task_type="CAUSAL_LM")
    found = msplora.inspect(pyramid)
    assert (found.what, found.found_as, found.base) == ("MSPLoRA", "adapter", "some/model")
    assert (found.model_type, found.task) == ("llama", "CAUSAL_LM")
    assert found.files == {WEIGHTS: (pyramid / WEIGHTS).stat().st_size}
    assert found.dtypes == {"float32": found.parameters}
    assert [(level.groups, level.rank) for level in found.levels] == [(1, 8), (3, 4), (0, 2)]
    query = found.kinds[0]
    assert (query.kind, query.layers, query.ranks) == ("self_attn.q_proj", 4, (8, 4, 2))
    assert query.group_sizes == ((4,), (2, 1, 1), (1, 1, 1, 1))
    shared = {pair.address: pair.layers for pair in found.pairs}
    assert shared["mid/0/self_attn.q_proj"] == (0, 1)
    assert not found.suspicious
    assert json.loads(found.to_json()) == json.loads(json.dumps(found.to_dict()))


def test_a_run_its_checkpoints_and_a_model_are_known(tmp_path: Path) -> None:
    model = scaled(adapted())
    model.save_pretrained(tmp_path / "run/adapter")
    (tmp_path / "run/metrics.json").write_text("{}")
    assert msplora.inspect(tmp_path / "run").found_as == "run"
    model.save_pretrained(tmp_path / "new.unfinished/checkpoints/checkpoint-20")
    model.save_pretrained(tmp_path / "new.unfinished/checkpoints/checkpoint-100")
    found = msplora.inspect(tmp_path / "new.unfinished")
    assert found.found_as == "unfinished run's checkpoint of step 100"
    for step in (20, 100):
        llama().save_pretrained(tmp_path / f"whole/checkpoint-{step}")  # pyright: ignore
    found = msplora.inspect(tmp_path / "whole")
    assert (found.what, found.found_as) == ("model", "run's checkpoint of step 100")
    llama().save_pretrained(tmp_path / "full/model")  # pyright: ignore
    (tmp_path / "full/metrics.json").write_text("{}")
    found = msplora.inspect(tmp_path / "full")
    assert (found.what, found.found_as, found.task) == ("model", "run", "LlamaForCausalLM")
    assert found.parameters == sum(its.numel() for its in llama().parameters())
    assert found.findings == ()


@pytest.mark.slow
def test_conversions_name_their_source(pyramid: Path, tmp_path: Path) -> None:
    MODELS["llama"].model().save_pretrained(tmp_path / "base")
    set_config(pyramid, base_model_name_or_path=str(tmp_path / "base"))
    msplora.to_lora(pyramid, tmp_path / "lora", verify=False)
    found = msplora.inspect(tmp_path / "lora")
    assert (found.what, found.found_as) == ("LoRA", "converted from adapter")
    assert not found.suspicious
    msplora.to_merged(pyramid, tmp_path / "merged", verify=False)
    merged = msplora.inspect(tmp_path / "merged")
    assert (merged.what, merged.found_as) == ("model", "converted from adapter")
    assert not merged.suspicious


@pytest.mark.slow
def test_a_lora_padded_for_servers_is_not_suspicious(tmp_path: Path) -> None:
    model = scaled(adapted(MODELS["llama"].model(), layers_to_transform=[1, 2, 3]))
    model.save_pretrained(tmp_path / "adapter")
    MODELS["llama"].model().save_pretrained(tmp_path / "base")
    options = BaseOptions(str(tmp_path / "base"))
    msplora.to_lora(tmp_path / "adapter", tmp_path / "lora", base=options, verify=False)
    found = msplora.inspect(tmp_path / "lora")
    assert not found.suspicious
    assert any("2 pair(s) are zero in A and B" in its.text for its in found.findings)


def test_a_tensor_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msplora.inspection.tensor_file._BLOCK", 10)
    stored = {
        "a": torch.randn(7, 3),
        "b": torch.arange(4),
        "c": torch.tensor(2.5),
        "d": torch.ones(0, 3),
    }
    save_file(stored, tmp_path / WEIGHTS)
    files = TensorFiles([tmp_path / WEIGHTS])
    parts = list(files.blocks("a"))
    assert [len(its) for its in parts] == [3, 3, 1]
    assert torch.equal(torch.cat(parts), stored["a"].double())
    assert list(files.blocks("b")) == []
    assert list(files.blocks("c")) == [torch.tensor(2.5)]
    assert files.dtypes() == {"float32": 22, "i64": 4}


def refused(path: Path, said: str) -> None:
    result = command("inspect", path)
    assert result.code == 1
    assert result.out == ""
    assert said in result.error
    with pytest.raises(MSPLoraError) as raised:
        msplora.inspect(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        *({"r": its} for its in ("8", None, 0, True)),
        *({"lora_alpha": its} for its in ("16", None, math.nan)),
        *({"rank_pattern": its} for its in ([1], {"q_proj": "x"}, {"(": 4})),
        *({"alpha_pattern": its} for its in ("x", {"(": 4}, {"q_proj": math.inf})),
        *({"base_model_name_or_path": its} for its in (5, ["a"])),
        *({"layers_to_transform": its} for its in ("a", ["0"])),
        *({"task_type": 7}, {"target_modules": 5}, {"target_parameters": 5}, {"model_type": [1]}),
    ],
)
@pytest.mark.parametrize("method", ["LORA", "MSPLORA"])
def test_fields_of_a_wrong_type_are_named(
    method: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    content = {"peft_type": method, "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content | changes))
    ((name, value),) = changes.items()
    if method == "MSPLORA" and value is None:
        return  # which a pyramid derives
    with pytest.raises(MSPLoraError, match=f"{name} is "):
        msplora.inspect(tmp_path)


def test_ranks_of_a_pattern_are_told_as_a_range(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    config.rank_pattern = {"layers.0.self_attn.q_proj": 16}
    get_peft_model(llama(), config).save_pretrained(str(tmp_path))
    query, value = msplora.inspect(tmp_path).kinds
    assert (query.lowest_ranks, query.ranks) == ((4,), (16,))
    assert (value.lowest_ranks, value.ranks) == ((4,), (4,))
    assert "4–16" in command("inspect", str(tmp_path)).out


def test_what_cannot_be_inspected(
    pyramid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(tmp_path / "adaptr", "Did you mean")
    refused(pyramid / WEIGHTS, "is a file; give the folder")
    (tmp_path / "run.unfinished").mkdir()
    refused(tmp_path / "run", "run.unfinished' is unfinished: continue it")
    (tmp_path / "run").mkdir()
    refused(tmp_path / "run", "run.unfinished' is unfinished: continue it")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "neither an adapter nor a run nor a model")
    monkeypatch.chdir(tmp_path / "empty")
    refused(Path(), "neither an adapter nor a run nor a model")
    refused(Path("/"), "neither an adapter nor a run nor a model")
    assert "is unfinished" not in command("inspect", "/").error
    loha: Any = get_peft_model(llama(), peft.LoHaConfig(target_modules=["q_proj"]))
    loha.save_pretrained(tmp_path / "loha")
    refused(tmp_path / "loha", "is a LOHA adapter")
    set_config(tmp_path / "loha", peft_type=None)
    refused(tmp_path / "loha", "peft_type is None")
    set_config(tmp_path / "loha", peft_type="BRAND_NEW")
    refused(tmp_path / "loha", "is a BRAND_NEW adapter")
    set_config(tmp_path / "loha", peft_type="MSPLORA", r=[8, 4, 2])
    refused(tmp_path / "loha", "of the code released with the paper")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf/adapter.gguf").write_bytes(b"")
    refused(tmp_path / "gguf", "a LoRA for llama.cpp")
    (tmp_path / "loha/adapter_config.json").write_text('{"fine_tune_type": "lora"}')
    refused(tmp_path / "loha", "a LoRA for mlx-lm")
    (tmp_path / "loha/adapter_config.json").write_text("[]")
    refused(tmp_path / "loha", "holds a list")
    whole = (pyramid / WEIGHTS).read_bytes()
    (pyramid / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    refused(pyramid, "cut short or damaged")
    (pyramid / WEIGHTS).unlink()
    refused(pyramid, "as a pickle (.bin) is not read")
    shutil.rmtree(pyramid)
    llama().save_pretrained(pyramid)  # pyright: ignore
    (pyramid / "model.safetensors").unlink()
    refused(pyramid, "without weights in safetensors")


def test_the_command_prints_and_exits_by_what_it_finds(pyramid: Path) -> None:
    before = tree(pyramid)
    result = command("inspect", pyramid)
    assert result.code == 0
    assert "4 | 2+1+1 | 4×1" in result.out
    assert "Nothing suspicious" in result.out
    assert command("inspect", pyramid, "--json").json() == msplora.inspect(pyramid).to_dict() | {
        name: json.loads(msplora.inspect(pyramid).to_json())[name]
        for name in ("levels", "kinds", "pairs", "findings")
    }
    assert tree(pyramid) == before
    set_config(pyramid, base_model_name_or_path="[bold]/evil[/]")
    edit(pyramid, lambda its: {k: t for k, t in its.items() if "mid/1" not in k})
    result = command("inspect", pyramid)
    assert result.code == 1
    assert "[bold]/evil[/]" in result.out
    assert "✗ missing pair" in result.out
    content = command("inspect", pyramid, "--json")
    assert content.code == 1
    assert content.json()["suspicious"]


def test_it_asks_no_network(pyramid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def no_network(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", no_network)
    set_config(pyramid, base_model_name_or_path="some/model")
    assert not msplora.inspect(pyramid).suspicious
