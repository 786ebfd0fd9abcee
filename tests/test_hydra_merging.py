"""Biases of Hydra's have to be merged into biases: where a layer has none, nothing is merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import get_peft_model
from torch import Tensor, nn

from msplora.errors import UnsupportedError
from msplora.sisters import HydraConfig
from msplora.train.base_model import load_base
from msplora.train.data_classification import Classes
from msplora.train.methods import adapt
from msplora.train.model_card import model_card
from msplora.train.next_steps import next_steps
from msplora.train.settings_file import make_settings
from runs import config_on, msplora, save_decoder, save_encoder, tree

X = torch.linspace(-1, 1, 24).reshape(3, 8)
REFUSED = "biases.*'unbiased' has none to merge them into.*branch_bias=False"


class TwoLayers(nn.Module):
    """One with a bias and one without; PEFT comes to the one with it first."""

    def __init__(self) -> None:
        super().__init__()
        self.biased, self.unbiased = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.unbiased(torch.relu(self.biased(x)))


def config(*targets: str, branch_bias: bool = True) -> HydraConfig:
    return HydraConfig(
        target_modules=list(targets), branch_bias=branch_bias, init_lora_weights=False
    )


def adapted(*targets: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(TwoLayers(), config(*targets, **options)).eval()


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_a_refused_merge_leaves_every_layer_as_it_was(how: str, safe: bool) -> None:
    model = adapted("biased", "unbiased")
    expected, before = model(X), {name: its.clone() for name, its in model.state_dict().items()}
    with pytest.raises(UnsupportedError, match=REFUSED):
        getattr(model, how)(safe_merge=safe)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(its, before[name]) for name, its in after.items())
    assert torch.equal(model(X), expected)


def test_what_is_asked_of_is_the_adapters_that_are_merged() -> None:
    model = adapted("biased")
    model.add_adapter("other", config("biased", "unbiased"))
    model.add_adapter("plain", config("biased", "unbiased", branch_bias=False))
    with pytest.raises(UnsupportedError, match=REFUSED):
        model.merge_adapter(["other"])
    model.set_adapter("other")
    with pytest.raises(UnsupportedError, match=REFUSED):
        model.merge_adapter()
    model.set_adapter("plain")
    expected = model(X)
    model.merge_adapter()
    assert torch.allclose(model(X), expected, atol=1e-5)
    model.unmerge_adapter()
    model.set_adapter("default")
    expected = model(X)
    assert torch.allclose(model.merge_and_unload()(X), expected, atol=1e-5)


def test_the_command_says_why_and_writes_nothing(tmp_path: Path) -> None:
    """Not that a weight is beyond its dtype: the error is a `ValueError`, as PEFT's of that is."""
    save_decoder(tmp_path / "base")
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, config("q_proj")).save_pretrained(str(tmp_path / "adapter"))
    before = tree(tmp_path)
    done = msplora("convert", tmp_path / "adapter", tmp_path / "out", "--to", "merged")
    assert done.code == 1
    assert "has none to merge them into" in done.error
    assert "branch_bias=False" in done.error
    assert "not finite" not in done.error
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("task", "branch_bias", "merges"),
    [("sft", False, True), ("sft", True, False), ("classification", True, True)],
)
def test_a_run_names_no_merge_that_would_be_refused(
    tmp_path: Path, task: str, branch_bias: bool, merges: bool
) -> None:
    """The decoder's layers have no biases, and the encoder's have."""
    save_decoder(tmp_path / "decoder")
    save_encoder(tmp_path / "encoder")
    classifies = task == "classification"
    asked = config_on(tmp_path, task, method="hydra", hydra={"branch_bias": branch_bias})
    asked["adapter"] = {"target_modules": ["query"] if classifies else ["q_proj"]}
    settings = make_settings(asked, "a test")
    classes = Classes(("text",), "label", ("bad", "good")) if classifies else None
    found = adapt(load_base(settings, classes), settings)
    steps = [what for what, _ in next_steps(settings, tmp_path / "run", found)]
    assert ("merge" in steps) is merges
    metrics: dict[str, Any] = {"before": None, "evaluations": []}
    card = model_card(settings, found, metrics, {}, tmp_path / "run")
    assert ("--to merged" in card) is merges
