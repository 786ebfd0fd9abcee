"""`msplora plan`: the library's plan, as a table or as JSON, before a weight is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

import msplora
from msplora.errors import TargetError
from runs import msplora as command
from runs import save_decoder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base in it."""
    folder = tmp_path_factory.mktemp("bases")
    save_decoder(folder / "decoder")
    return folder


def test_plan_prints_a_table_or_json_that_agree(bases: Path) -> None:
    base = bases / "decoder"
    shown = command("plan", base, "-t", "q_proj,v_proj").out
    found = command("plan", base, "-t", "q_proj ,v_proj", "--json").json()
    model = hf.AutoModelForCausalLM.from_pretrained(base)
    expected = msplora.plan(model, msplora.MSPLoraConfig(target_modules=["q_proj", "v_proj"]))
    assert found == json.loads(json.dumps(expected.to_dict()))
    assert str(expected) in shown
    assert f"{expected.parameters:,}" in shown


def test_plan_takes_the_shape_of_the_pyramid(bases: Path) -> None:
    arguments = ["-t", "q_proj", "--ranks", "8,2", "--groups", "1,0", "--layers", "0,2"]
    found = command("plan", bases / "decoder", *arguments, "--json").json()
    model = hf.AutoModelForCausalLM.from_pretrained(bases / "decoder")
    config = msplora.MSPLoraConfig(
        ranks=[8, 2], groups=[1, 0], layers_to_transform=[0, 2], target_modules=["q_proj"]
    )
    assert found == json.loads(json.dumps(msplora.plan(model, config).to_dict()))
    assert command("plan", bases / "decoder", "--ranks", "8,x").code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["./nowhere"], "there is no such folder"),
        (["decodr"], "cannot load"),
        (["decoder", "-t", "q_prj"], "Did you mean"),
        (["decoder", "-r", "2"], "ranks"),
        (["decoder", "-t", "all-linear", "--layers", "0"], "layers_to_transform"),
        (["decoder", "--layers", "9"], "9"),
        (["decoder", "--ranks", "8,4", "--groups", "1"], "groups"),
        (["empty"], "The folder holds: nothing"),
    ],
)
def test_plan_refuses_with_the_reason(
    bases: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(bases)
    (bases / "empty").mkdir(exist_ok=True)
    result = command("plan", *arguments)
    assert result.code == 1
    assert said in result.error


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, of no weights, whose model transformers does not know."""
    monkeypatch.setattr(hf.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")  # where transformers imports what it copies
    folder = tmp_path / "own"
    config = hf.LlamaConfig(
        num_hidden_layers=4,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        vocab_size=64,
        architectures=["OwnForCausalLM"],
        auto_map={
            "AutoConfig": "own_code.OwnConfig",
            "AutoModelForCausalLM": "own_code.OwnForCausalLM",
        },
    )
    config.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text()) | {"model_type": "own-llama"}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "own_code.py").write_text(OWN_CODE)
    return folder


def test_plan_runs_the_code_of_a_model_that_is_trusted(own_code: Path) -> None:
    arguments = ["-t", "q_proj,v_proj", "--json"]
    found = command("plan", own_code, *arguments, "--trust-remote-code")
    assert found.code == 0, found.error
    same = hf.LlamaForCausalLM(hf.LlamaConfig(**_sizes(own_code)))
    expected = msplora.plan(same, msplora.MSPLoraConfig(target_modules=["q_proj", "v_proj"]))
    assert found.json() == json.loads(json.dumps(expected.to_dict()))


def test_plan_runs_no_code_of_a_model_that_is_not_trusted(own_code: Path) -> None:
    refused = command("plan", own_code, "-t", "q_proj")
    assert refused.code == 1
    assert "opt in with trust_remote_code" in refused.error
    known = hf.AutoConfig.from_pretrained(own_code, trust_remote_code=True)
    with pytest.raises(TargetError, match=r"'own-llama'.*own_code.OwnForCausalLM.*trust_remote"):
        msplora.plan(known, msplora.MSPLoraConfig(target_modules=["q_proj"]))


def _sizes(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "config.json").read_text())
    return {key: its for key, its in content.items() if key.startswith(("num_", "hidden", "inter"))}
