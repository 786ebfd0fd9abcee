"""`msplora plan`: the library's plan, as a table or as JSON, before a weight is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers as hf

import msplora
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
    found = command("plan", base, "-t", "q_proj,v_proj", "--json").json()
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
