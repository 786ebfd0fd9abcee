"""Classifiers of images out of two towers (CLIP, SigLIP): the tower of images is their base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from msplora.errors import BaseModelError
from msplora.train.base_model import Base, load_base
from msplora.train.data_classification import Classes
from msplora.train.methods import Adapted, adapt
from msplora.train.settings_file import make_settings
from runs import msplora as command
from test_train_images import config, read_json, train
from tiny_images import COLOURS, SIDE, paint_folder, processor, save_vision_model

CLASSES = Classes(("image",), "label", tuple(sorted(COLOURS)))
HEAD = 16 * 3 + 3
LAYERS = 2
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": LAYERS,
}
NAMES = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}
FAMILIES = ("vit", *NAMES)


def save_towers(folder: Path, family: str) -> Path:
    """Both towers and no head, as such models are published; of a ViT the one that there is."""
    if family == "vit":
        return save_vision_model(folder, num_hidden_layers=LAYERS)
    name = NAMES[family]
    if not hasattr(hf, f"{name}Model"):
        pytest.skip(f"transformers {hf.__version__} has no {name}")
    torch.manual_seed(0)
    size = {"num_patches": 4} if family == "siglip2" else {"image_size": SIDE}
    both = getattr(hf, f"{name}Config")(
        vision_config={**TOWER, **size, "patch_size": 8},
        text_config={**TOWER, "vocab_size": 32, "max_position_embeddings": 8},
    )
    getattr(hf, f"{name}Model")(both).save_pretrained(folder)
    if family == "siglip2":
        kind: Any = getattr(hf, "Siglip2ImageProcessorPil", None) or hf.Siglip2ImageProcessor
        kind(patch_size=8, max_num_patches=4).save_pretrained(folder)
    else:
        processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint_folder(tmp_path_factory.mktemp("towers") / "pets", 12).parent


def adapted(folder: Path, family: str, method: str) -> tuple[Base, Adapted]:
    model = save_towers(folder / family, family)
    settings = make_settings(config(folder, "never", model=str(model), method=method), "test")
    base = load_base(settings, CLASSES)
    return base, adapt(base, settings)


def trained(found: Adapted) -> set[str]:
    return {name for name, its in found.model.named_parameters() if its.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_trains_the_head_alone(tmp_path: Path, family: str) -> None:
    base, found = adapted(tmp_path, family, "frozen")
    assert base.head == ("classifier",)
    assert trained(found) == {"classifier.weight", "classifier.bias"}
    assert found.trainable.head == HEAD


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_on_the_tower_and_the_head_beside_it(tmp_path: Path, family: str) -> None:
    _, found = adapted(tmp_path, family, "lora")
    head = {name for name in trained(found) if ".modules_to_save." in name}
    assert {name.rpartition("classifier.")[2] for name in head} == {
        "modules_to_save.default.weight",
        "modules_to_save.default.bias",
    }
    factors = trained(found) - head
    assert all(".lora_A." in name or ".lora_B." in name for name in factors)
    assert not any("classifier" in name for name in factors)
    # Four linear layers of attention in each block, and two of the perceptron.
    assert len([its for its in factors if ".layer" in its]) == 2 * 6 * LAYERS
    assert found.trainable.head == HEAD


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_that_lacks_weights_is_refused(tmp_path: Path, family: str) -> None:
    file = save_towers(tmp_path / family, family) / "model.safetensors"
    tensors = load_file(file)
    lost = next(its for its in sorted(tensors) if "text" not in its and ".layer" in its)
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    settings = make_settings(config(tmp_path, "never", model=str(file.parent)), "test")
    with pytest.raises(BaseModelError, match="1 weights of the base are missing"):
        load_base(settings, CLASSES)


@pytest.mark.parametrize(
    "family",
    ["clip", *(pytest.param(its, marks=pytest.mark.slow) for its in ("siglip", "siglip2"))],
)
def test_a_run_learns_is_evaluated_and_gone_on_from(folder: Path, family: str) -> None:
    model = str(save_towers(folder / "bases" / family, family))
    printed = train(folder, family, model=model).out
    assert "new, starting from random numbers: classifier" in printed
    assert read_json(folder / family / "plan.json")["trainable_head"] == HEAD
    metrics = read_json(folder / family / "metrics.json")
    assert metrics["best"]["loss"] < metrics["before"]["loss"]
    judged = command("eval", folder / family, "--json").json()
    assert judged["loss"] == pytest.approx(metrics["best"]["loss"], rel=1e-5)
    predicted = command("predict", folder / family, folder / "pets", "--json")
    assert len(predicted.out.splitlines()) == 36
    # `all-linear` means the same layers, which are those of the adapter that it starts from.
    shortly = {"max_steps": 1, "batch_size": 8}
    start = str(folder / family)
    train(folder, f"{family}-on", model=model, init_from=start, training=shortly)
