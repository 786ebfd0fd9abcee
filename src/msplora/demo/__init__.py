"""The main job in small: a language model of our own, adapted with a pyramid and with LoRA."""

from __future__ import annotations

from pathlib import Path

MODEL_FOLDER = Path(__file__).resolve().parent / "model"
"""The pretrained base, which `scripts/pretrain_demo_model.py` makes; its README.md is its card."""
