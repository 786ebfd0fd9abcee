"""A tiny vision model on disk, and images of one colour to tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from PIL import Image

COLOURS = {"blue": (30, 40, 220), "green": (20, 200, 60), "red": (230, 30, 20)}
SIDE = 16


def save_vision_model(folder: Path, **changes: Any) -> Path:
    """A ViT of four layers with the head of ten other classes, as such models are published."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 4,
        "image_size": SIDE,
        "patch_size": 8,
        "num_labels": 10,
    }
    hf.ViTForImageClassification(hf.ViTConfig(**(options | changes))).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def processor(side: int = SIDE) -> Any:
    # Without torchvision newer transformers call it by another name.
    kind = getattr(hf, "ViTImageProcessorPil", None) or hf.ViTImageProcessor
    return kind(size={"height": side, "width": side})


def paint(file: Path, colour: str, shade: int, mode: str = "RGB") -> Path:
    """An image of one colour, each a little different."""
    file.parent.mkdir(parents=True, exist_ok=True)
    red, green, blue = (min(255, part + shade) for part in COLOURS[colour])
    image = Image.new("RGB", (20 + shade, 30), (red, green, blue))
    image.convert(mode).save(file)
    return file


def paint_folder(folder: Path, count: int) -> Path:
    for place in range(count):
        for colour in COLOURS:
            paint(folder / colour / f"{place}.png", colour, place)
    return folder
