"""`layers_to_transform` where PEFT, which goes by names, does not find the blocks."""

from __future__ import annotations

import ast
import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftModel, get_peft_model
from torch import nn

import msplora
from adapted_llama import LLAMA, adapted, config, logits
from msplora.errors import TargetError
from oracle import plan_of, snapshot
from tiny import MODELS


class Experts(nn.Module):
    """Blocks at the top of a model, of numbered experts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"experts": nn.ModuleList(expert() for _ in range(2))}) for _ in range(3)
        )


def expert() -> nn.Module:
    return nn.Sequential(OrderedDict(w1=nn.Linear(4, 4)))


BASES: dict[str, Any] = {
    "llama": lambda: (MODELS["llama"].model().base_model, ["q_proj", "v_proj"]),
    "gpt2": lambda: (MODELS["gpt2"].model().base_model, ["c_attn"]),
    "sequential": lambda: (nn.Sequential(*(expert() for _ in range(4))), ["w1"]),
    "experts": lambda: (Experts(), ["w1"]),
    "blocks that are layers": lambda: (
        nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(4, 4) for _ in range(4))}),
        ["0", "1", "2", "3"],
    ),
}


def as_advised(said: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options, changed as a refusal says."""
    pattern = re.search(r"Set layers_pattern=('.*')\.$", said)
    if pattern:
        return options | {"layers_pattern": ast.literal_eval(pattern[1])}
    (targets,) = re.findall(r"target_modules=('.*')\.$", said)
    return {"target_modules": ast.literal_eval(targets)}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("layers", [[1], 1, [0, 2]], ids=str)
def test_blocks_that_peft_does_not_find_are_refused_with_what_finds_them(
    name: str, layers: Any
) -> None:
    base, targets = BASES[name]()
    before = snapshot(base)
    options = {"target_modules": targets, "layers_to_transform": layers}
    with pytest.raises(TargetError, match=r"lies in block \d of .*, but PEFT") as caught:
        get_peft_model(base, msplora.MSPLoraConfig(**options))
    assert snapshot(base) == before
    advised = as_advised(str(caught.value), options)
    sites = plan_of(get_peft_model(base, msplora.MSPLoraConfig(**advised))).sites
    assert {site.block for site in sites} == ({layers} if isinstance(layers, int) else {*layers})


def test_an_experts_number_is_not_taken_for_a_blocks() -> None:
    with pytest.raises(TargetError, match=r"'layers.0.experts.1.w1' lies in block 0 .* adapts it"):
        msplora.plan(Experts(), config(target_modules=["w1"], layers_to_transform=[1]))


@pytest.mark.skipif(
    Version(peft.__version__) < Version("0.21"),
    reason="PEFT before 0.21 finds a layers_pattern below a parent only",
)
def test_layers_pattern_is_the_way_out() -> None:
    model = MODELS["llama"].model().base_model
    with pytest.raises(TargetError, match=r"'layers.0.*Set layers_pattern='layers'\.$"):
        msplora.plan(model, config(layers_to_transform=[0, 2]))
    found = msplora.plan(model, config(layers_to_transform=[0, 2], layers_pattern="layers"))
    assert {site.block for site in found.sites} == {0, 2}


def test_a_module_that_is_named_in_full_in_another_block_is_refused() -> None:
    targets = ["v_proj", "model.layers.3.self_attn.q_proj"]
    with pytest.raises(TargetError, match=r"layers.3.self_attn.q_proj' lies in block 3.*in full"):
        msplora.plan(LLAMA.model(), config(target_modules=targets, layers_to_transform=[0]))
    found = msplora.plan(LLAMA.model(), config(target_modules=targets, layers_to_transform=[0, 3]))
    assert [site.block for site in found.sites if site.kind.endswith("q_proj")] == [3]


def test_what_lies_in_no_block_may_be_named_in_full_beside_layers() -> None:
    options = {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]}
    found = msplora.plan(LLAMA.model(), config(**options))
    assert {site.key: site.block for site in found.sites} == {
        "model.layers.1.self_attn.q_proj": 1,
        "lm_head": None,
    }


def test_an_adapter_that_was_trained_so_is_loaded_as_it_was(tmp_path: Path) -> None:
    named = [f"model.layers.{number}.self_attn.q_proj" for number in range(4)]
    model = adapted(target_modules=named)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text()) | {"target_modules": named, "layers_to_transform": [0]}
    file.write_text(json.dumps(content))
    loaded = PeftModel.from_pretrained(LLAMA.model(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    file.write_text(json.dumps(content | {"fingerprint": None}))
    with pytest.raises(TargetError, match="in full"):
        PeftModel.from_pretrained(LLAMA.model(), tmp_path)
