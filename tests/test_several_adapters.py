"""Several adapters on one model: added, switched, combined, deleted, mixed in a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

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
    step,
    two_adapters,
)
from oracle import (
    assert_shared,
    plan_of,
    randomise,
    same_tensors,
    tensors_of,
    trainable,
)


def test_an_added_adapter_shares_within_itself_and_with_no_other() -> None:
    model = two_adapters(r=6, target_modules=["q_proj", "o_proj"])
    assert_shared(model, plan_of(model))
    assert_shared(model, plan_of(model, "second"), "second")
    names = ("default", "second")
    first, second = (
        {its.data_ptr() for pair in msplora.factors(model, name).values() for its in pair[:2]}
        for name in names
    )
    assert not first & second


def test_only_the_active_adapter_trains() -> None:
    model = two_adapters(r=6)
    for name, other in (("default", "second"), ("second", "default")):
        model.set_adapter(name)
        assert trainable(model) == plan_of(model, name).parameters
        before, untouched = tensors_of(model, name), tensors_of(model, other)
        step(model)
        assert not same_tensors(tensors_of(model, name), before)
        assert same_tensors(tensors_of(model, other), untouched)


def test_each_adapter_trains_the_tokens_it_names(tmp_path: Path) -> None:
    model = adapted(trainable_token_indices=[3, 7])
    model.add_adapter("second", config(r=6, trainable_token_indices=[1]))
    batch = {"input_ids": torch.tensor([[1, 3, 7, 9]])}
    expected = {}
    for name, tokens in (("default", 2), ("second", 1)):
        model.set_adapter(name)
        assert trainable(model) == plan_of(model, name).parameters + tokens * 32
        step(model, batch)
        expected[name] = logits(model, batch)
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("second", tmp_path / "second")):
        loaded = PeftModel.from_pretrained(LLAMA.model(), folder).eval()
        assert torch.equal(logits(loaded, batch), expected[name])
    model.delete_adapter("second")
    assert torch.equal(logits(model, batch), expected["default"])


def test_the_magnitudes_of_dora_are_switched_and_deleted_on_every_kind_of_layer() -> None:
    base = nn.Sequential(nn.Embedding(9, 8), nn.Conv1d(8, 8, 1), nn.Linear(5, 4))
    kinds = {"target_modules": ["0", "1", "2"], "use_dora": True}
    model: Any = get_peft_model(base, msplora.MSPLoraConfig(**kinds))
    model.add_adapter("second", msplora.MSPLoraConfig(r=4, **kinds))
    for active in ("second", "default"):
        model.set_adapter(active)
        training = [name for name, its in model.named_parameters() if its.requires_grad]
        assert {name.split(".")[-2] for name in training} == {active}
        assert sum("magnitude" in name for name in training) == 3
    model.delete_adapter("second")
    layers: list[Any] = list(model.base_model.model[:3])
    for layer in layers:
        assert set(layer.lora_magnitude_vector) == set(layer.lora_variant) == {"default"}
    assert not [name for name, _ in model.named_parameters() if ".second" in name]


def test_each_adapter_saves_its_own_numbers_only(tmp_path: Path) -> None:
    model = two_adapters(r=4)
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("second", tmp_path / "second")):
        tensors = load_file(folder / "adapter_model.safetensors")
        assert sum(its.numel() for its in tensors.values()) == plan_of(model, name).parameters
        model.set_adapter(name)
        loaded = PeftModel.from_pretrained(LLAMA.model(), folder).eval()
        assert torch.equal(logits(loaded), logits(model.eval()))


def test_an_adapter_loaded_for_inference_leaves_the_first_one_trainable(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "second")
    assert trainable(model) == plan_of(model).parameters


def test_switching_adapters_switches_the_output() -> None:
    model = two_adapters()
    for name in ("default", "second", "default"):
        model.set_adapter(name)
        assert close(logits(model), logits(delta_model(model, {name: 1.0})))


def test_two_active_adapters_add_their_deltas() -> None:
    model = two_adapters(r=5, target_modules=["v_proj", "o_proj"])
    model.base_model.set_adapter(["default", "second"])
    expected = logits(delta_model(model, {"default": 1.0, "second": 1.0}))
    assert close(logits(model), expected)
    merged = model.merge_and_unload(adapter_names=["default", "second"])
    assert close(logits(merged), expected)


def test_deleting_an_adapter_leaves_nothing_of_it() -> None:
    model = two_adapters()
    alone = adapted()
    model.delete_adapter("second")
    assert sorted(model.state_dict()) == sorted(alone.state_dict())
    assert torch.equal(logits(model), logits(alone))
    with pytest.raises(msplora.MSPLoraError, match=r"no MSPLoRA adapter 'second'.*default"):
        msplora.factors(model, "second")
    model.add_adapter("second", config(r=6))
    assert plan_of(model, "second").levels[0].rank == 6


def test_deleting_the_only_adapter_restores_the_output_of_the_base() -> None:
    model = adapted()
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model.model), base_logits())
    assert not [name for name in model.state_dict() if "msplora_" in name]


def test_disabling_gives_the_base() -> None:
    model = adapted()
    expected = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base_logits())
    assert torch.equal(logits(model), expected)


def test_a_mixed_batch_gives_each_row_its_own_adapter() -> None:
    model = two_adapters(r=6)
    rows = {"input_ids": torch.cat([BATCH["input_ids"]] * 2)[:3]}
    names = ["__base__", "second", "default"]
    mixed = logits(model, rows, adapter_names=names)
    with model.disable_adapter():
        assert close(mixed[0], logits(model, rows)[0])
    for row, name in ((1, "second"), (2, "default")):
        model.set_adapter(name)
        assert close(mixed[row], logits(model, rows)[row])


def test_a_mixed_batch_is_refused_in_training() -> None:
    model = two_adapters().train()
    with pytest.raises(ValueError, match="training mode"):
        model(**BATCH, adapter_names=["default", "second"])


def test_a_mixed_batch_with_an_unknown_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        adapted()(**BATCH, adapter_names=["default", "nonsense"])


@pytest.mark.parametrize("combination", ["cat", "linear"])
def test_a_weighted_adapter(combination: str) -> None:
    model = two_adapters(r=6 if combination == "cat" else 8)
    weights = {"default": 0.7, "second": -0.3}
    model.add_weighted_adapter(
        list(weights), list(weights.values()), "sum", combination_type=combination
    )
    model.set_adapter("sum")
    assert_shared(model, plan_of(model, "sum"), "sum")
    if combination == "cat":  # exact
        assert close(logits(model), logits(delta_model(model, weights)))
        return
    for address, (a, b, scale) in msplora.factors(model, "sum").items():
        parts = [msplora.factors(model, name)[address] for name in weights]
        roots = [
            abs(weight * part[2]) ** 0.5
            for part, weight in zip(parts, weights.values(), strict=True)
        ]
        signs = [1 if weight > 0 else -1 for weight in weights.values()]
        expected_a = sum(root * part[0] for root, part in zip(roots, parts, strict=True))
        expected_b = sum(
            s * root * part[1] for s, root, part in zip(signs, roots, parts, strict=True)
        )
        assert torch.allclose(scale * b @ a, expected_b @ expected_a, atol=1e-5)


def test_a_weighted_adapter_is_of_the_scales_that_were_set() -> None:
    model = two_adapters(r=6)
    layers = [its for its in model.modules() if hasattr(its, "borrowed")]
    for layer in layers:
        layer.set_scale("second", 0.5)
    weights = {"default": 0.7, "second": -0.3}
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum", combination_type="cat")
    model.set_adapter("sum")
    assert close(logits(model), logits(delta_model(model, weights | {"second": -0.15})))
    layers[0].set_scale("second", 2)
    with pytest.raises(msplora.MSPLoraError, match="other scales in other layers"):
        model.add_weighted_adapter(list(weights), [1.0, 1.0], "more", combination_type="cat")


def test_a_weighted_adapter_saves_and_reloads(tmp_path: Path) -> None:
    model = two_adapters(r=6)
    model.add_weighted_adapter(["default", "second"], [0.5, 2.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(LLAMA.model(), tmp_path / "sum").eval()
    assert torch.equal(logits(loaded), logits(model))


def test_modules_that_two_adapters_train_whole_are_not_combined() -> None:
    model = adapted(modules_to_save=["lm_head"])
    model.add_adapter("second", config(modules_to_save=["lm_head"]))
    with pytest.raises(msplora.MSPLoraError, match="modules_to_save, but found 1 such"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    assert sorted(model.peft_config) == ["default", "second"]


TOKENS = [int(token) for token in BATCH["input_ids"][0, :2]]


@pytest.mark.parametrize("owner", ["default", "second"])
@pytest.mark.parametrize(
    "changes", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": TOKENS}], ids=str
)
def test_a_weighted_adapter_has_the_head_and_the_tokens_that_one_has_trained(
    tmp_path: Path, owner: str, changes: dict[str, Any]
) -> None:
    model = adapted(**(changes if owner == "default" else {}))
    model.add_adapter("second", config(**(changes if owner == "second" else {})))
    randomise(model, "second", seed=11)
    (trained,) = [
        parameter
        for name, parameter in model.named_parameters()
        if f"modules_to_save.{owner}" in name or f"trainable_tokens_delta.{owner}" in name
    ]
    with torch.no_grad():
        trained.normal_()
    weights = {"default": 0.5, "second": 2.0}
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum", combination_type="cat")
    plain = delta_model(model, weights)
    with torch.no_grad():
        if "modules_to_save" in changes:
            plain.lm_head.weight.copy_(trained)
        else:
            plain.model.embed_tokens.weight[TOKENS] = trained
        trained_before = trained.clone()
    model.set_adapter("sum")
    assert close(logits(model), logits(plain))
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(LLAMA.model(), tmp_path / "sum").eval()
    assert torch.equal(logits(loaded), logits(model))
    step(model)  # a copy of its own
    assert torch.equal(trained, trained_before)


def test_tokens_that_two_adapters_train_are_not_combined() -> None:
    model = adapted(trainable_token_indices=[3])
    model.add_adapter("second", config(trainable_token_indices=[7]))
    with pytest.raises(msplora.MSPLoraError, match=r"'default', 'second'.*at most one trains"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    assert sorted(model.peft_config) == ["default", "second"]


@pytest.mark.parametrize(
    "changes", [{"use_dora": True}, {"rank_pattern": {"q_proj": 4}}, {"bias": "all"}], ids=str
)
def test_what_cannot_be_combined_is_refused_of_every_adapter(changes: dict[str, Any]) -> None:
    model = adapted()
    model.add_adapter("second", config(**changes))
    with pytest.raises(msplora.MSPLoraError, match="adapter 'second' has one of them"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", combination_type="cat")
    assert sorted(model.peft_config) == ["default", "second"]


@pytest.mark.parametrize("combination", ["svd", "ties", "dare_linear", "magnitude_prune"])
def test_other_combinations_are_refused(combination: str) -> None:
    model = two_adapters()
    with pytest.raises(msplora.MSPLoraError, match=r"shared.*'linear' or 'cat'"):
        model.add_weighted_adapter(
            ["default", "second"], [1.0, 1.0], "sum", combination_type=combination
        )
    assert sorted(model.peft_config) == ["default", "second"]
