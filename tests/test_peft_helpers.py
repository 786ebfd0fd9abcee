"""What PEFT and transformers offer around a LoRA works here."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

import msplora
from adapted_llama import (
    BATCH,
    LLAMA,
    adapted,
    base_logits,
    close,
    config,
    delta_model,
    logits,
    take_the_installed_peft,
    two_adapters,
)
from msplora.plain_lora import lora_of
from oracle import (
    Untied,
    assert_shared,
    layer_of,
    plan_of,
    randomise,
    root_of,
    same_tensors,
    tensors_of,
    trainable,
)
from tiny import llama

# PEFT's helpers


def test_rescale_adapter_scale() -> None:
    from peft.helpers import rescale_adapter_scale

    model = adapted()
    expected = logits(model)
    with rescale_adapter_scale(model, 0.5):
        assert close(logits(model), logits(delta_model(model, {"default": 0.5})))
    assert torch.equal(logits(model), expected)
    with rescale_adapter_scale(model, 0.0):
        assert close(logits(model), base_logits())


def test_disable_input_dtype_casting() -> None:
    from peft.helpers import disable_input_dtype_casting

    model: Any = get_peft_model(LLAMA.model(dtype=torch.bfloat16), config()).eval()
    randomise(model)
    expected = logits(model)
    with disable_input_dtype_casting(model), torch.autocast("cpu", torch.bfloat16):
        found = logits(model)
    assert close(found.float(), expected.float(), 0.2)
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match=r"dtype|type"):
        logits(model)


def test_layer_and_model_status() -> None:
    model = two_adapters()
    status = model.get_model_status()
    assert status.base_model_type == "LlamaForCausalLM"
    assert status.peft_types == {"default": "MSPLORA", "second": "MSPLORA"}
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.merged_adapters == []
    assert status.available_adapters == ["default", "second"]
    assert status.trainable_params == plan_of(model).parameters
    assert status.requires_grad == {"default": True, "second": False}
    layers = model.get_layer_status()
    assert len(layers) == 8
    assert all(layer.available_adapters == ["default", "second"] for layer in layers)
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]


@pytest.mark.skipif(not hasattr(peft, "convert_to_lora"), reason="new in PEFT 0.19")
@pytest.mark.skipif(not hasattr(peft, "get_base_model_state_dict"), reason="new in PEFT 0.21")
def test_the_state_of_the_base_is_the_bases_own_again() -> None:
    original = llama().state_dict()
    model: Any = get_peft_model(llama(), config(modules_to_save=["lm_head"]))
    with torch.no_grad():
        for parameter in model.get_base_model().parameters():
            parameter += 0.1
    changed = tensors_of(model)
    assert peft.get_base_model_state_dict(model).keys() == original.keys()
    result = peft.set_base_model_state_dict(model, original)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert same_tensors(peft.get_base_model_state_dict(model), original)
    assert same_tensors(tensors_of(model), changed)


@pytest.mark.skipif(not hasattr(peft, "convert_to_lora"), reason="new in PEFT 0.19")
def test_peft_converts_it_to_a_lora() -> None:
    model = adapted()
    rank = sum(level.rank for level in plan_of(model).levels)
    lora_config, state_dict = peft.convert_to_lora(model, rank, progressbar=False)
    lora: Any = get_peft_model(LLAMA.model(), lora_config).eval()
    peft.set_peft_model_state_dict(lora, state_dict)
    assert close(logits(lora), logits(model), 1e-4)


def test_the_config_is_a_lora_config_to_others() -> None:
    assert isinstance(config(), peft.LoraConfig)
    assert adapted(random=False).peft_type.value == "MSPLORA"


# Without a PeftModel


def test_inject_adapter_in_model(tmp_path: Path) -> None:
    model: Any = inject_adapter_in_model(config(), LLAMA.model()).eval()
    assert torch.equal(logits(model), base_logits())
    randomise(model)
    plan = plan_of(model)
    assert trainable(model) == plan.parameters
    assert_shared(model, plan)
    assert close(logits(model), Untied(LLAMA.model(), model, plan)(**BATCH).logits)
    state_dict = peft.get_peft_model_state_dict(model)
    assert sum(tensor.numel() for tensor in state_dict.values()) == plan.parameters
    other: Any = inject_adapter_in_model(config(), LLAMA.model()).eval()
    outcome = peft.set_peft_model_state_dict(other, state_dict)
    assert not [key for key in outcome.missing_keys if "msplora" in key]
    assert not outcome.unexpected_keys
    assert torch.equal(logits(other), logits(model))


def test_transformers_adapter_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_the_installed_peft(monkeypatch)
    model: Any = LLAMA.model()
    model.add_adapter(config(), "one")
    model.add_adapter(config(r=6), "two")
    randomise(model, "one")
    randomise(model, "two", seed=8)
    outputs = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        outputs[name] = logits(model.eval())
        assert_shared(model, plan_of(model, name), name)
    model.disable_adapters()
    assert torch.equal(logits(model), base_logits())
    model.enable_adapters()
    assert torch.equal(logits(model), outputs["two"])
    model.save_pretrained(tmp_path)
    model.delete_adapter("two")
    model.set_adapter("one")
    assert torch.equal(logits(model), outputs["one"])
    assert not [key for key in model.state_dict() if ".two." in key]
    loaded: Any = LLAMA.model()
    loaded.load_adapter(str(tmp_path), "three")
    assert torch.equal(logits(loaded.eval()), outputs["two"])


# Tied weights


def tied() -> Any:
    torch.manual_seed(0)
    return llama(4, tie_word_embeddings=True).eval()


@pytest.mark.parametrize(
    "targets",
    [["embed_tokens", "lm_head", "q_proj"], ["lm_head", "q_proj"], r".*(lm_head|q_proj)"],
    ids=["both", "the head", "a pattern"],
)
def test_a_tied_head_borrows_the_pairs_of_the_embedding(tmp_path: Path, targets: Any) -> None:
    base = tied()
    before = logits(base)
    model = get_peft_model(base, config(target_modules=targets, ensure_weight_tying=True)).eval()
    assert close(logits(model), before)
    randomise(model)
    plan = plan_of(model)
    assert trainable(model) == plan.parameters
    assert [site.key for site in plan.sites if "head" in site.key] == []
    expected = logits(model)
    weight = base.model.embed_tokens.base_layer.weight.detach().clone()
    for pair in plan.pairs_of["model.embed_tokens"]:
        a, b, scale = msplora.factors(model)[pair.address]
        weight += (scale * b @ a).t().detach()
    head = layer_of(root_of(model), "lm_head")
    x = torch.randn(3, 32)
    assert close(head(x), x @ weight.t(), 1e-4)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tied(), tmp_path).eval()
    assert torch.equal(logits(loaded), expected)
    model.merge_adapter()  # both layers, the one weight once
    assert close(logits(model), expected, 1e-4)
    model.unmerge_adapter()
    assert close(logits(model), expected, 1e-4)
    tensors, lora_config = lora_of(model)
    lora: Any = get_peft_model(tied(), peft.LoraConfig(**lora_config)).eval()
    peft.set_peft_model_state_dict(lora, tensors)
    assert close(logits(lora), expected, 1e-4)
    merged = model.merge_and_unload(safe_merge=True)
    assert close(logits(merged), expected, 1e-4)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_embeddings_that_share_a_weight_with_the_heads_adapt_alike() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.embed_tokens = nn.Embedding(9, 6), nn.Embedding(9, 6)
            self.lm_head = nn.Linear(6, 9, bias=False)
            self.config = {"tie_word_embeddings": True}
            self._tied_weights_keys = {
                "embed_tokens.weight": "shared.weight", "lm_head.weight": "shared.weight"
            }  # fmt: skip
            self.embed_tokens.weight = self.lm_head.weight = self.shared.weight

        def get_input_embeddings(self) -> nn.Module:
            return self.shared

        def forward(self, x: Tensor) -> Tensor:
            return self.lm_head(torch.tanh(self.embed_tokens(x) * self.shared(x.flip(0))))

    base = Tied()
    weight = base.shared.weight.detach().clone()
    model: Any = get_peft_model(
        base, msplora.MSPLoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True)
    )
    randomise(model)
    weight += sum(scale * b @ a for a, b, scale in msplora.factors(model).values()).t().detach()
    x = torch.arange(9)
    expected = torch.tanh(weight * weight.flip(0)) @ weight.t()
    with torch.no_grad():
        assert close(model(x), expected, 1e-4)
        model.merge_adapter()
        assert close(model(x), expected, 1e-4)
        model.unmerge_adapter()
        assert close(model.merge_and_unload()(x), expected, 1e-4)


def test_a_tied_head_with_dora_is_refused() -> None:
    with pytest.raises(msplora.MSPLoraError, match="use_dora"):
        get_peft_model(
            tied(),
            config(
                target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True, use_dora=True
            ),
        )


# The common road


def test_nothing_warns_on_the_common_road(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # Older releases of PEFT, where the base has no path.
        warnings.filterwarnings("ignore", "Could not find a config file")
        model = adapted()
        model.save_pretrained(tmp_path)
        PeftModel.from_pretrained(LLAMA.model(), tmp_path)
        model.load_adapter(tmp_path, "other")
        model.delete_adapter("other")
        model.merge_and_unload()


def test_the_saved_folder_is_what_the_hub_takes(tmp_path: Path) -> None:
    """`push_to_hub` uploads what `save_pretrained` leaves: a card, a config, one safe file."""
    from huggingface_hub import ModelCard
    from safetensors import safe_open

    base = LLAMA.model()
    base.name_or_path = base.config._name_or_path = "some/base"
    model = adapted(base, task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model == "some/base"
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    text = (tmp_path / "adapter_config.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["base_model_name_or_path"] == "some/base"


def test_an_adapter_in_a_module_of_its_own() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = LLAMA.model()

        def forward(self, input_ids: Tensor) -> Any:
            return self.inner(input_ids=input_ids)

    model = get_peft_model(Around(), config()).eval()
    randomise(model)
    assert_shared(model, plan_of(model))
    expected = Untied(Around().eval(), model, plan_of(model))(**BATCH).logits
    assert close(logits(model), expected)


def test_a_layers_factors_are_found_as_in_a_lora() -> None:
    model = adapted()
    layer = layer_of(root_of(model), "model.layers.1.self_attn.q_proj")
    delta = layer.lora_B.default.weight @ layer.lora_A.default.weight
    assert close(delta, layer.get_delta_weight("default"))
    for view in (layer.lora_A, copy.deepcopy(layer).lora_B):
        assert hasattr(view, "default")
        assert not hasattr(view, "second")


@pytest.mark.skipif(
    not hasattr(peft, "get_base_model_state_dict"),
    reason="PEFT before 0.21 takes 'lora_' in a module's name for an adapter's, LoRA's own too",
)
def test_a_module_of_the_base_that_is_named_like_an_adapters(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
            self.lora_head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.lora_head(self.body(x))

    base, x = Model(), torch.randn(3, 4)
    options: Any = {"target_modules": r"body\.\d+", "modules_to_save": ["lora_head"]}
    model: Any = get_peft_model(copy.deepcopy(base), msplora.MSPLoraConfig(**options))
    randomise(model)
    model.base_model.model.lora_head.weight.data += 1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(loaded(x), model(x))
