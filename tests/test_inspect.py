"""`msplora inspect`: the figures are those of an analysis, and each rule finds what it is for."""

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
from msplora.errors import MSPLoraError
from msplora.inspection.results import Finding, Inspection
from msplora.inspection.suspicions import RULES
from msplora.inspection.tensor_file import TensorFiles
from msplora.loading import BaseOptions, check_finite
from runs import msplora as command
from runs import tree
from tiny import EXPERTS_ARE_PARAMETERS, MODELS, llama

WEIGHTS = "adapter_model.safetensors"


def scaled(model: Any, by: float = 0.1) -> Any:
    """Random factors, made small enough to be an adapter's."""
    with torch.no_grad():
        for _, b, _ in msplora.factors(model).values():
            b.mul_(by)
    return model


def lora(folder: Path, model: Any = None, **changes: Any) -> Path:
    options = {"r": 3, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    adapter: Any = get_peft_model(model or llama(), LoraConfig(**(options | changes)))
    adapter.save_pretrained(folder)
    return folder


@pytest.fixture
def pyramid(tmp_path: Path) -> Path:
    scaled(adapted()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, change: Any) -> None:
    """Change the tensors of an adapter's file."""
    tensors = change(load_file(folder / WEIGHTS))
    save_file({key: its.contiguous() for key, its in tensors.items()}, folder / WEIGHTS)


def set_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def the(found: Inspection, rule: str) -> Finding:
    """The one finding of a rule, and nothing else that is suspicious."""
    (finding,) = [its for its in found.findings if its.severity != "note"]
    assert finding.rule == rule
    assert rule in RULES
    assert "\n" not in finding.text
    return finding


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


def test_an_untrained_adapter_has_no_effect(tmp_path: Path) -> None:
    adapted(random=False).save_pretrained(tmp_path)
    finding = the(msplora.inspect(tmp_path), "no effect")
    assert finding.severity == "problem"
    assert len(finding.where) == 16


def test_pairs_that_learned_nothing(pyramid: Path) -> None:
    def no_mid(tensors: Any) -> Any:
        return {k: its * ("mid/" not in k or "msplora_A" in k) for k, its in tensors.items()}

    edit(pyramid, no_mid)
    found = msplora.inspect(pyramid)
    assert the(found, "zero B").severity == "warning"
    assert len(the(found, "zero B").where) == 6
    assert found.levels[1].norm == 0
    assert {pair.zero for pair in found.pairs if pair.level == "mid"} == {("B",)}


def test_a_product_of_zero(pyramid: Path) -> None:
    edit(pyramid, lambda its: {k: t * ("mid/1" not in k or "_B" in k) for k, t in its.items()})
    assert len(the(msplora.inspect(pyramid), "zero product").where) == 2


def test_norms_that_exploded(pyramid: Path) -> None:
    part = "local/2/self_attn/q_proj/pair.msplora_B"
    edit(pyramid, lambda its: {key: t * (30 if part in key else 1) for key, t in its.items()})
    finding = the(msplora.inspect(pyramid), "exploded norm")
    assert finding.where == ("local/2/self_attn.q_proj",)
    assert "times an identity's" in finding.text
    # Far above its level's others, and still small.
    edit(pyramid, lambda its: {k: t * (0.01 if "_B" in k else 1) for k, t in its.items()})
    finding = the(msplora.inspect(pyramid), "exploded norm")
    assert finding.where == ("local/2/self_attn.q_proj",)
    assert "times the median of level local" in finding.text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite(value: float, pyramid: Path) -> None:
    name = next(key for key in load_file(pyramid / WEIGHTS) if "mid/1/self_attn/v_proj" in key)

    def spoil(tensors: Any) -> Any:
        tensors[name][0, 0] = value
        return tensors

    edit(pyramid, spoil)
    found = msplora.inspect(pyramid)
    assert the(found, "not finite").where == (name,)
    (pair,) = [its for its in found.pairs if its.address == "mid/1/self_attn.v_proj"]
    assert pair.norm is None
    json.loads(found.to_json())


@pytest.mark.parametrize(
    ("part", "count", "said"),
    [
        (".mid/", 6, "of the level(s) mid"),
        ("local/1/self_attn/q_proj/pair.msplora_B", 1, "of the level(s) local"),
        (".local/", 2, "of the level(s) local"),
        ("pyramid_store", 0, "no low-rank pair"),
    ],
)
def test_a_file_that_misses_pairs(part: str, count: int, said: str, pyramid: Path) -> None:
    head = {"classifier.weight": torch.ones(2, 2)}
    edit(pyramid, lambda its: head | {key: t for key, t in its.items() if part not in key})
    finding = the(msplora.inspect(pyramid), "missing pair")
    assert said in finding.text
    assert len(finding.where) == count


def test_a_lost_last_layer_shows_as_kinds_of_unequal_depth(pyramid: Path) -> None:
    lost = "local/3/self_attn/q_proj"
    edit(pyramid, lambda its: {key: t for key, t in its.items() if lost not in key})
    notes = [its.text for its in msplora.inspect(pyramid).findings]
    assert any("self_attn.q_proj 3, self_attn.v_proj 4" in its for its in notes)
    assert "Nothing suspicious" not in command("inspect", pyramid).out


def test_a_file_that_misses_whole_targets_or_layers(pyramid: Path, tmp_path: Path) -> None:
    edit(pyramid, lambda its: {k: t for k, t in its.items() if "q_proj" not in k})
    assert the(msplora.inspect(pyramid), "missing target").where == ("q_proj",)
    scaled(adapted(layers_to_transform=[0, 1, 2, 3])).save_pretrained(tmp_path / "listed")
    assert not msplora.inspect(tmp_path / "listed").suspicious
    edit(tmp_path / "listed", lambda its: {k: t for k, t in its.items() if "local/3/" not in k})
    assert "lists 4 block(s)" in the(msplora.inspect(tmp_path / "listed"), "missing layer").text
    plain = lora(tmp_path / "lora")
    assert not msplora.inspect(plain).suspicious
    whole = load_file(plain / WEIGHTS)
    edit(plain, lambda its: {k: t for k, t in its.items() if "layers.2." not in k})
    assert "lacks block 2" in the(msplora.inspect(plain), "missing layer").text
    edit(plain, lambda _: {k: t for k, t in whole.items() if "v_proj" not in k})
    assert the(msplora.inspect(plain), "missing target").where == ("v_proj",)


def test_pairs_that_no_layer_borrows(pyramid: Path) -> None:
    def one_more(tensors: Any) -> Any:
        more = {k.replace("mid/2", "mid/7"): t.clone() for k, t in tensors.items() if "mid/2" in k}
        return tensors | more

    edit(pyramid, one_more)
    found = msplora.inspect(pyramid)
    assert the(found, "unused pair").where == ("mid/7/self_attn.q_proj", "mid/7/self_attn.v_proj")
    assert len(found.pairs) == 16


def test_factors_that_do_not_fit(pyramid: Path, tmp_path: Path) -> None:
    part = "global/0/self_attn/q_proj/pair.msplora_A"
    edit(pyramid, lambda its: {key: t[:5] if part in key else t for key, t in its.items()})
    finding = the(msplora.inspect(pyramid), "misshapen")
    assert finding.where == ("global/0/self_attn.q_proj",)
    assert "A (5, 32) and B (32, 8), where its rank is 8" in finding.text
    plain = lora(tmp_path / "lora")
    lost = "1.self_attn.v_proj.lora_B"
    edit(plain, lambda its: {key: t[:, :1] if lost in key else t for key, t in its.items()})
    assert the(msplora.inspect(plain), "misshapen").where == ("model.layers.1.self_attn.v_proj",)
    edit(plain, lambda its: {key: t for key, t in its.items() if lost not in key})
    assert the(msplora.inspect(plain), "missing pair").where == ("model.layers.1.self_attn.v_proj",)


@pytest.mark.parametrize("is_pyramid", [True, False])
def test_factors_of_unusual_types(is_pyramid: bool, pyramid: Path, tmp_path: Path) -> None:
    folder = pyramid if is_pyramid else lora(tmp_path / "lora")
    whole = load_file(folder / WEIGHTS)
    first = next(iter(whole))
    edit(folder, lambda its: its | {first: torch.tensor(1.0)})
    assert the(msplora.inspect(folder), "misshapen").where
    small = {key: its.to(torch.float8_e4m3fn) for key, its in whole.items()}
    edit(folder, lambda _: small)
    found = msplora.inspect(folder)
    assert not found.suspicious
    edit(folder, lambda _: {key: its.float() for key, its in small.items()})
    assert found.pairs == msplora.inspect(folder).pairs
    check_finite(small, "the file")
    edit(folder, lambda _: {key: its.double() * 1e160 for key, its in whole.items()})
    found = msplora.inspect(folder)
    assert len(the(found, "exploded norm").where) == len(found.pairs)
    assert {pair.norm for pair in found.pairs} == {math.inf}
    assert json.loads(found.to_json())["pairs"][0]["norm"] is None
    assert command("inspect", folder).code == 0


def test_a_group_of_a_huge_number_is_left_over(pyramid: Path) -> None:
    huge = f"local/{10**12}"
    edit(pyramid, lambda its: {k.replace("local/3", huge): t for k, t in its.items()})
    finding = the(msplora.inspect(pyramid), "unused pair")
    assert finding.where[0] == f"{huge}/self_attn.q_proj"


def test_without_a_level_per_layer_the_layers_are_not_known(tmp_path: Path) -> None:
    scaled(adapted(ranks=[4, 2], groups=[1, 2])).save_pretrained(tmp_path)
    found = msplora.inspect(tmp_path)
    assert not found.suspicious
    assert found.kinds[0].layers is None
    assert {pair.layers for pair in found.pairs} == {()}
    assert "?" in command("inspect", tmp_path).out


@pytest.mark.slow
def test_what_else_a_reader_should_know(tmp_path: Path) -> None:
    model: Any = get_peft_model(
        MODELS["bert"].model(), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    )
    randomise_lora(model)
    model.save_pretrained(tmp_path / "head")
    found = msplora.inspect(tmp_path / "head")
    assert not found.suspicious
    assert any("2 more tensor(s)" in its.text for its in found.findings)
    assert found.other_parameters == 3 * 32 + 3
    dora = lora(tmp_path / "dora", use_dora=True)
    found = msplora.inspect(dora)
    assert [its.text for its in found.findings if "DoRA" in its.text]
    assert not any("more tensor(s)" in its.text for its in found.findings)
    gone = str(tmp_path / "gone")
    set_config(dora, base_model_name_or_path=gone, init_lora_weights="pissa")
    assert "there is no such folder" in the(msplora.inspect(dora), "base not found").text
    assert any("init_lora_weights='pissa'" in its.text for its in msplora.inspect(dora).findings)


def randomise_lora(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)


def test_patterns_that_only_the_base_tells_apart(tmp_path: Path) -> None:
    pattern = {"model.layers.*.q_proj": 4}
    adapted(alpha_pattern=pattern).save_pretrained(tmp_path)
    found = msplora.inspect(tmp_path)
    assert any("ranks and scales are taken to be" in its.text for its in found.findings)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "model")  # pyright: ignore
    return tmp_path / "model"


def edit_model(folder: Path, change: Any) -> None:
    tensors = {key: its.clone() for key, its in load_file(folder / "model.safetensors").items()}
    save_file(change(tensors) or tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_model_that_was_not_merged(model_folder: Path) -> None:
    model: Any = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    model.get_base_model().save_pretrained(model_folder)
    finding = the(msplora.inspect(model_folder), "unmerged")
    assert "merge_and_unload" in finding.text


def test_weights_of_a_model_that_are_not_right(model_folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_model(model_folder, lambda its: its[name].mul_(30).numpy() is None)
    assert the(msplora.inspect(model_folder), "exploded weight").where == (name,)
    edit_model(model_folder, lambda its: its[name].zero_().numpy() is None)
    assert the(msplora.inspect(model_folder), "zero weight").where == (name,)
    edit_model(model_folder, lambda its: its[name].fill_(math.nan).numpy() is None)
    assert the(msplora.inspect(model_folder), "not finite").where == (name,)


def test_a_model_of_several_files_of_which_one_is_missing(model_folder: Path) -> None:
    llama().save_pretrained(model_folder, max_shard_size="50KB")  # pyright: ignore
    (model_folder / "model.safetensors").unlink()
    assert msplora.inspect(model_folder).findings == ()
    file = sorted(model_folder.glob("model-*.safetensors"))[1]
    file.unlink()
    assert the(msplora.inspect(model_folder), "missing tensor").where == (file.name,)


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


def test_what_cannot_be_inspected(pyramid: Path, tmp_path: Path) -> None:
    refused(tmp_path / "adaptr", "Did you mean")
    refused(pyramid / WEIGHTS, "is a file; give the folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "neither an adapter nor a run nor a model")
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
