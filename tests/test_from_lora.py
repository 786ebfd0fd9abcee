"""Back from LoRA, files to files."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import msplora
from msplora import loading
from msplora.cli.app import app
from msplora.errors import AdapterFileError, ConfigError, MSPLoraError, UnsupportedError
from msplora.folder_mark import CONVERSION as MARK
from msplora.folders import OutputError
from msplora.train.evaluation import evaluate_run
from msplora.verifying import VerificationError
from tiny import MODELS, Tiny
from tiny_saved import save_language_model


def save_base(tiny: Tiny, folder: Path) -> Any:
    tiny.model().save_pretrained(folder / "base")
    return type(tiny.model()).from_pretrained(folder / "base")


def save_pyramid(tiny: Tiny, folder: Path, **options: Any) -> Path:
    config = msplora.MSPLoraConfig(
        **(
            {"target_modules": tiny.targets, "init_lora_weights": False, "r": 4, "lora_alpha": 4}
            | ({"target_parameters": list(tiny.parameters)} if tiny.parameters else {})
            | options
        )
    )
    get_peft_model(save_base(tiny, folder), config).save_pretrained(folder / "adapter")
    return folder / "adapter"


def save_lora(tiny: Tiny, folder: Path, **options: Any) -> Path:
    config = LoraConfig(
        **(
            {"target_modules": tiny.targets, "init_lora_weights": False, "r": 4, "lora_alpha": 8}
            | options
        )
    )
    get_peft_model(save_base(tiny, folder), config).save_pretrained(folder / "lora")
    return folder / "lora"


def dense_updates(folder: Path, base: Any) -> dict[str, Tensor]:
    """What an adapter adds to every weight, as PEFT merges it: in float64."""
    base = base.double()
    before = {name: its.detach().clone() for name, its in base.state_dict().items()}
    model = PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False).double()
    after = model.merge_and_unload().state_dict()
    found = {name: after[name] - before[name] for name in before if name in after}
    return {name: its for name, its in found.items() if its.abs().max() > 0}


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "bert", "t5", "llava", "mixtral", "gpt-oss", "gemma"]
)
def test_a_converted_pyramid_is_found_again(name: str, tmp_path: Path) -> None:
    """There and back: all of it is explained, and the model answers as at first."""
    pyramid = save_pyramid(MODELS[name], tmp_path)
    msplora.to_lora(pyramid, tmp_path / "lora")
    ranks = [4, 2, 1]
    found = msplora.to_msplora(tmp_path / "lora", tmp_path / "back", ranks=ranks)
    assert all(abs(1 - its.share) <= 1e-6 for its in found.sites)
    assert found.converged
    assert found.comparison is not None
    assert not math.isinf(found.comparison.tolerance)
    assert found.comparison.difference <= 1e-3 * found.comparison.effect
    sites = {site.key for site in msplora.plan(MODELS[name].model(), _config_of(pyramid)).sites}
    assert {its.site for its in found.sites} == sites
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (config["ranks"], config["groups"]) == (ranks, [1, 3, 0])


@pytest.mark.parametrize("pattern", [None, "layers"])
def test_a_loras_parameters_may_lie_in_other_blocks_than_its_modules(
    pattern: str | None, tmp_path: Path
) -> None:
    """PEFT adapts parameters in all blocks whatever the layers, and a pyramid's are refused."""
    options = {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]}
    layers = {"layers_to_transform": [0, 2], "layers_pattern": pattern}
    lora = save_lora(MODELS["llama"], tmp_path, **options, **layers)
    found = msplora.to_msplora(lora, tmp_path / "out", ranks=[4], groups=[0])
    expected = {f"model.layers.{block}.self_attn.v_proj" for block in (0, 2)}
    expected |= {f"model.layers.{block}.self_attn.q_proj.weight" for block in range(4)}
    assert {its.site for its in found.sites} == expected
    assert all(abs(1 - its.share) <= 1e-6 for its in found.sites)


def _config_of(folder: Path) -> Any:
    return loading.read_config(folder)


def test_the_shares_are_those_of_the_dense_updates(tmp_path: Path) -> None:
    tiny = MODELS["llama"]
    lora = save_lora(tiny, tmp_path, rank_pattern={"v_proj": 6}, use_rslora=True)
    found = msplora.to_msplora(lora, tmp_path / "out", ranks=[3, 1, 1])
    wanted = dense_updates(lora, tiny.model())
    got = dense_updates(tmp_path / "out", tiny.model())
    assert {f"{its.site}.weight" for its in found.sites} == set(wanted)
    for its in found.sites:
        update, nearest = wanted[f"{its.site}.weight"], got[f"{its.site}.weight"]
        share = 1 - float((update - nearest).square().sum() / update.square().sum())
        assert its.share == pytest.approx(share, abs=1e-5)
        assert its.norm == pytest.approx(float(update.norm()), rel=1e-5)
        assert 0.2 < its.share < 0.999  # else this would say little
    total = sum(its.share * its.norm**2 for its in found.sites)
    assert found.explained == pytest.approx(total / sum(its.norm**2 for its in found.sites))
    assert found.comparison is not None
    assert math.isinf(found.comparison.tolerance)


class Mixed(nn.Module):
    """Layers of every kind that LoRA adapts, three of each."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "mixed"}
        self.blocks = nn.ModuleList([self.block() for _ in range(3)])

    @staticmethod
    def block() -> nn.Module:
        return nn.ModuleDict(
            {
                "embed": nn.Embedding(11, 8),
                "conv": nn.Conv1d(8, 12, 3, padding=1),
                "grouped": nn.Conv1d(12, 8, 1, groups=2),
                "attention": nn.MultiheadAttention(8, 2, batch_first=True),
                "linear": nn.Linear(8, 8),
            }
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.zeros(*ids.shape, 8)
        for block in self.blocks:
            its: Any = block
            x = its["linear"](x + its["embed"](ids))
            x = its["grouped"](its["conv"](x.mT)).mT
            x = x + its["attention"](x, x, x, need_weights=False)[0]
        return x


def test_updates_of_every_layout_are_laid_out_as_they_were(tmp_path: Path) -> None:
    """Embeddings, convolutions, attention: through the matrices and back."""
    from msplora.from_lora import fitted_pairs
    from msplora.plain_lora import lora_of
    from msplora.updates import updates_of

    torch.manual_seed(0)
    targets = ["embed", "conv", "grouped", "attention", "linear"]
    # So few ranks that the layers' inputs and outputs are not filled: then it is found exactly.
    config = msplora.MSPLoraConfig(
        target_modules=targets,
        levels=["all", "own"],
        ranks=[4, 2],
        groups=[1, 0],
        init_lora_weights=False,
    )
    pyramid: Any = get_peft_model(Mixed().eval(), config)
    with torch.no_grad():
        for a, b, _ in msplora.factors(pyramid).values():
            a *= 0.3
            b *= 0.3
    ids = torch.arange(10).reshape(2, 5)
    expected = pyramid(ids)
    tensors, content = lora_of(pyramid)
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    lora = PeftModel.from_pretrained(pyramid.unload(), str(tmp_path)).eval()
    torch.testing.assert_close(lora(ids), expected)
    updates = dict(updates_of(lora))
    plan = msplora.plan(lora, config)
    assert set(updates) == {site.key for site in plan.sites}
    pairs, _, _ = fitted_pairs(plan, updates)
    again: Any = get_peft_model(lora.unload(), config).eval()
    with torch.no_grad():
        for address, (a, b, _) in msplora.factors(again).items():
            a.copy_(pairs[address][0])
            b.copy_(pairs[address][1])
    torch.testing.assert_close(again(ids), expected, rtol=1e-4, atol=1e-4)


def test_a_pyramid_of_other_ranks_and_groups(tmp_path: Path) -> None:
    lora = save_lora(MODELS["llama"], tmp_path)
    found = msplora.to_msplora(
        lora, tmp_path / "out", ranks=[2, 3], groups=[0, 2], levels=["own", "halves"]
    )
    config = _config_of(tmp_path / "out")
    assert (config.ranks, config.groups, config.levels) == ([2, 3], [0, 2], ["own", "halves"])
    assert found.parameters == msplora.plan(MODELS["llama"].model(), config).parameters
    finer = msplora.to_msplora(lora, tmp_path / "exact", ranks=[4], groups=[0])
    assert found.explained < finer.explained == pytest.approx(1)


def test_a_smaller_pyramid_of_a_pyramid(tmp_path: Path) -> None:
    pyramid = save_pyramid(MODELS["llama"], tmp_path)
    with pytest.raises(ConfigError, match=r"is a pyramid already, of ranks \[4, 2, 1\]"):
        msplora.to_msplora(pyramid, tmp_path / "out")
    same = msplora.to_msplora(pyramid, tmp_path / "same", r=4)
    assert same.explained == pytest.approx(1, abs=1e-9)
    smaller = msplora.to_msplora(pyramid, tmp_path / "out", ranks=[2, 1, 1])
    assert 0.2 < smaller.explained < 0.99
    # A shared pair is one of its numbers once, not for each layer.
    assert same.source_parameters == smaller.source_parameters == same.parameters


def test_a_classifiers_head_and_trained_tokens_survive(tmp_path: Path) -> None:
    lora = save_lora(MODELS["bert"], tmp_path, task_type="SEQ_CLS")
    tensors = load_file(lora / "adapter_model.safetensors")
    head = "base_model.model.classifier.weight"
    tensors[head] += 1
    save_file(tensors, lora / "adapter_model.safetensors", {"format": "pt"})
    msplora.to_msplora(lora, tmp_path / "out", ranks=[4], groups=[0])  # exact: logits are compared
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(found[head], tensors[head])


def test_what_is_written_is_an_adapter_as_training_writes_it(tmp_path: Path) -> None:
    lora = save_lora(MODELS["llama"], tmp_path, task_type="CAUSAL_LM")
    msplora.to_msplora(lora, tmp_path / "out", r=4)
    trained = save_pyramid(MODELS["llama"], tmp_path / "trained", task_type="CAUSAL_LM")
    kept, written = (
        load_file(folder / "adapter_model.safetensors") for folder in (trained, tmp_path / "out")
    )
    assert {key: its.shape for key, its in written.items()} == {
        key: its.shape for key, its in kept.items()
    }
    config, other = _config_of(tmp_path / "out").to_dict(), _config_of(trained).to_dict()
    unlike = {name for name in config if config[name] != other[name]}
    assert unlike <= {"init_lora_weights", "lora_alpha", "alphas", "base_model_name_or_path"}
    assert sorted(os.listdir(tmp_path / "out")) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        MARK,
    ]
    assert "python -m msplora.autoload enable" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "uses DoRA, which scales the sum"),
        ({"bias": "all"}, "bias = 'all', which belongs to its layers"),
        ({"lora_bias": True}, "lora_bias=True: a pair has no bias of its own"),
        ({"init_lora_weights": "pissa"}, "changes the base's weights"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
    ],
)
def test_what_a_pyramid_cannot_take_is_refused(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    lora = save_lora(MODELS["llama"], tmp_path, **change)
    with pytest.raises(UnsupportedError, match=said):
        msplora.to_msplora(lora, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["nan", "missing", "extra", "zero", "other-method"])
def test_a_damaged_adapter_is_refused(damage: str, tmp_path: Path) -> None:
    lora = save_lora(MODELS["llama"], tmp_path)
    tensors = load_file(lora / "adapter_model.safetensors")
    name = next(iter(tensors))
    if damage == "nan":
        tensors[name][0, 0] = float("nan")
    elif damage == "missing":
        del tensors[name]
    elif damage == "extra":
        tensors[name.replace("layers.0", "layers.9")] = tensors[name].clone()
    elif damage == "zero":
        tensors = {key: its * 0 for key, its in tensors.items()}
    save_file(tensors, lora / "adapter_model.safetensors", {"format": "pt"})
    if damage == "other-method":
        config = json.loads((lora / "adapter_config.json").read_text())
        (lora / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises((AdapterFileError, UnsupportedError, MSPLoraError)):
        msplora.to_msplora(lora, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pyramid_that_was_written_wrong_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def halved(tensors: Any, *args: Any, **kwargs: Any) -> None:
        original({key: its * 0.5 for key, its in tensors.items()}, *args, **kwargs)

    lora = save_lora(MODELS["llama"], tmp_path)
    original = msplora.from_lora.save_file  # pyright: ignore
    monkeypatch.setattr("msplora.from_lora.save_file", halved)
    with pytest.raises(VerificationError, match="Nothing was written"):
        msplora.to_msplora(lora, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["base", "lora"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    lora = save_lora(MODELS["llama"], tmp_path)
    with pytest.raises(OutputError, match="would replace"):
        msplora.to_msplora(lora, lora, force=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    for force in (False, True):
        with pytest.raises(OutputError):
            msplora.to_msplora(lora, tmp_path / "out", force=force)
    assert os.listdir(tmp_path / "out") == ["mine.txt"]


@pytest.fixture
def language_model(tmp_path: Path) -> Path:
    """A LoRA of a language model with a tokenizer, and rows to measure it on."""
    save_language_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(model, config).save_pretrained(tmp_path / "lora")
    rows = [{"prompt": "the cat", "completion": " sat on the mat"}] * 4
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def run(*arguments: Any) -> None:
    app([str(its) for its in arguments], standalone_mode=False)


def test_the_command_prints_the_share_of_every_update_and_the_losses(
    language_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora, out = language_model / "lora", language_model / "out"
    data = language_model / "rows.jsonl"
    run("convert", lora, out, "--to", "msplora", "--ranks", "2,1,1", "--data", data, "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed["ranks"] == [2, 1, 1]
    before, after = printed["loss"]
    assert before == pytest.approx(evaluate_run(lora, str(data))["loss"])
    assert after == pytest.approx(evaluate_run(out, str(data))["loss"])
    assert before != pytest.approx(after, rel=1e-4)
    run("convert", lora, out, "--to", "msplora", "--ranks", "2,1,1", "--data", data, "--force")
    shown = capsys.readouterr().out
    for its in printed["sites"]:
        assert f"{its['share']:.2%}" in shown
    assert f"Loss on the data: {before:.4f} before, {after:.4f} after" in shown
    assert f"explains {printed['explained']:.2%}" in shown


def test_options_of_a_pyramid_are_refused_elsewhere(language_model: Path) -> None:
    with pytest.raises(typer.BadParameter, match="--ranks: for --to msplora only, not --to lora"):
        run("convert", language_model / "lora", "x", "--to", "lora", "--ranks", "4,2,1")
    for target in ("lora", "msplora"):
        with pytest.raises(typer.BadParameter, match=f"--to merged only, not --to {target}"):
            run("convert", language_model / "lora", "x", "--to", target, "--allow-quantized")
    with pytest.raises(typer.BadParameter, match="not a list of whole numbers"):
        run("convert", language_model / "lora", "x", "--to", "msplora", "--ranks", "4,two")
    with pytest.raises(ConfigError, match="r must be at least 4"):
        run("convert", language_model / "lora", "x", "--to", "msplora", "--r", "2")
    with pytest.raises(MSPLoraError, match="no-such-file"):
        run("convert", language_model / "lora", "x", "--to", "msplora", "--data", "no-such-file")
    assert not Path("x").exists()
