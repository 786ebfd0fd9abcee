"""What a conversion's check proves: a wrong result is refused, however faint the adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import msplora
from msplora.convert import RoundedAwayWarning
from msplora.probing import Probe
from msplora.verifying import Comparison, VerificationError
from tiny import llama


def save(
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    factor: float = 1.0,
    config: Any = msplora.MSPLoraConfig,
    **options: Any,
) -> Path:
    """A base and an adapter of it, whose updates are multiplied by a factor."""
    torch.manual_seed(0)
    base: Any = llama(2)
    base.to(dtype).save_pretrained(folder / "base")
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(str(folder / "base")),
        config(
            r=4,
            target_modules=["q_proj", "v_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
            **options,
        ),
    )
    with torch.no_grad():
        for name, its in model.named_parameters():
            if "_B" in name:
                its.mul_(factor)
    model.save_pretrained(str(folder / "adapter"))
    return folder / "adapter"


def without_b(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert wrong: what is written does nothing."""
    right = msplora.convert.lora_of  # pyright: ignore

    def wrong(*args: Any, **kwargs: Any) -> Any:
        tensors, config = right(*args, **kwargs)
        return {key: its * ("lora_B" not in key) for key, its in tensors.items()}, config

    monkeypatch.setattr("msplora.convert.lora_of", wrong)


@pytest.mark.parametrize(
    ("dtype", "factor", "options"),
    [
        (torch.bfloat16, 1.0, {}),
        (torch.float32, 1e-6, {}),
        (torch.bfloat16, 1e-3, {"use_dora": True}),
    ],
)
def test_a_lora_that_does_nothing_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    factor: float,
    options: dict[str, Any],
) -> None:
    adapter = save(tmp_path, dtype, factor, **options)
    without_b(monkeypatch)
    with pytest.raises(VerificationError, match=r"off by 1\.0e\+00 of its size"):
        msplora.to_lora(adapter, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_where_half_precision_hides_an_adapter_float32_shows_it(tmp_path: Path) -> None:
    adapter = save(tmp_path, torch.bfloat16, 1e-3)
    # Rounded on its way, so that not even the same bits come out of the same sums.
    its = msplora.to_lora(adapter, tmp_path / "lora", dtype="bfloat16").comparison
    assert its is not None
    assert its.update_error is not None
    assert 0 < its.update_error <= 1e-2
    assert its.dtype == "float32"
    assert its.shown
    assert 0 < its.effect < 1e-2  # of which bfloat16 shows nothing


def test_a_pyramid_that_is_the_lora_is_shown_in_float32_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rounding flips a router, the logits of equal updates differ as adapters do."""

    def flipped(self: Probe, *given: Any) -> Comparison:
        its = right(self, *given)
        return replace(its, difference=10.0) if self.dtype == torch.bfloat16 else its

    right = Probe.compared
    monkeypatch.setattr(Probe, "compared", flipped)
    lora = save(tmp_path, torch.bfloat16, 1.0, LoraConfig)
    its = msplora.to_msplora(lora, tmp_path / "out", ranks=[4], groups=[0]).comparison
    assert its is not None
    assert its.dtype == "float32"
    assert its.shown


@pytest.mark.parametrize("config", [msplora.MSPLoraConfig, LoraConfig])
def test_a_merge_says_what_rounding_took(tmp_path: Path, config: Any) -> None:
    adapter = save(tmp_path, torch.bfloat16, 1e-5, config)
    with pytest.warns(RoundedAwayWarning, match="little of the adapter survives in bfloat16"):
        its = msplora.to_merged(adapter, tmp_path / "merged").comparison
    assert its is not None
    base, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    unmerged = msplora.to_merged(
        adapter, tmp_path / "exact", base=msplora.loading.BaseOptions(dtype="float32")
    )
    exact = load_file(tmp_path / "exact" / "model.safetensors")
    missed = kept = lost = 0.0
    for key, its_base in base.items():
        update = exact[key] - its_base.float()
        change = merged[key].float() - its_base.float()
        missed += float((change - update).square().sum())
        lost += float(update[change == 0].square().sum())
        kept += float(update.square().sum())
    assert its.update_error == pytest.approx((missed / kept) ** 0.5, rel=1e-2)
    assert its.update_lost == pytest.approx(lost / kept, rel=1e-2)
    assert unmerged.comparison is not None
    assert unmerged.comparison.update_error is not None
    assert unmerged.comparison.update_error < 1e-2


@pytest.mark.parametrize("share", [0.0, 2.0])
def test_a_wrong_merge_is_refused_in_half_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    def merge(self: Any, safe_merge: bool = False, adapter_names: Any = None) -> None:
        self.base_layer.weight.data += share * self.get_delta_weight("default").bfloat16()
        self.merged_adapters.append("default")

    adapter = save(tmp_path, torch.bfloat16, 1e-1)
    monkeypatch.setattr(Linear, "merge", merge)
    with pytest.raises(VerificationError, match="not the sum of weight and update"):
        msplora.to_merged(adapter, tmp_path / "merged")


def test_a_merge_of_something_else_is_refused_in_half_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is added is held against the factors, not only against itself."""
    right = Linear.get_delta_weight
    adapter = save(tmp_path, torch.bfloat16, 1e-1)
    monkeypatch.setattr(Linear, "get_delta_weight", lambda *its: right(*its) / 2)
    with pytest.raises(VerificationError, match="not what its factors say"):
        msplora.to_merged(adapter, tmp_path / "merged")


def test_a_merged_model_that_was_not_saved_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save(tmp_path)
    base = LlamaForCausalLM.from_pretrained(str(tmp_path / "base"))
    monkeypatch.setattr(
        LlamaForCausalLM, "save_pretrained", lambda _, out: _write(base, out, original)
    )
    with pytest.raises(VerificationError, match="once it is saved and loaded"):
        msplora.to_merged(adapter, tmp_path / "merged")


original = LlamaForCausalLM.save_pretrained


def _write(model: Any, out: Any, how: Any) -> None:
    how(model, out)
