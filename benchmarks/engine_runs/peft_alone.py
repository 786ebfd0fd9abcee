"""PEFT in a process that cannot import msplora: AutoModelForCausalLM and PeftModel."""

from __future__ import annotations

import sys

import peft
import torch
import transformers
from run import Asked, answer

RAN = "PeftModel.from_pretrained, where msplora cannot be imported"

sys.modules["msplora"] = None  # type: ignore[assignment]  # importing it fails from here on


def logits(asked: Asked, adapter: bool) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(asked.base)
    if adapter:
        model = peft.PeftModel.from_pretrained(model, asked.adapter)
    with torch.inference_mode():
        return model.eval()(torch.tensor([asked.ids])).logits[0]


if __name__ == "__main__":
    answer(logits, RAN, ["peft", "transformers", "torch"])
