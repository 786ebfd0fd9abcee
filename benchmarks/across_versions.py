"""Write adapters with the installed PEFT and transformers, or read those that others wrote.

One process of `benchmarks/matrix.py`, which runs it in an environment per pair of versions. Every
one builds the same tiny models, on the same weights.

    python benchmarks/across_versions.py write FOLDER
    python benchmarks/across_versions.py read FOLDER...
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import msplora

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from oracle import randomise  # noqa: E402
from tiny import EXPERTS_ARE_PARAMETERS, MODELS  # noqa: E402

# Name -> the tiny model and what is asked of the adapter.
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, all linear, five levels": (
        "llama",
        {
            "target_modules": "all-linear",
            "levels": ["all", "halves", "thirds", "quarters", "own"],
            "ranks": [6, 4, 4, 2, 1],
            "groups": [1, 2, 3, 4, 0],
            "alphas": [16, 8, 8, 4, 2],
        },
    ),
    "llama, DoRA": ("llama", {"use_dora": True}),
    "llama, rank-stabilised, layers 1 and 2": (
        "llama",
        {"use_rslora": True, "layers_to_transform": [1, 2]},
    ),
    "llama, embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "gpt2 (Conv1D)": ("gpt2", {}),
    "bert, biases and head": (
        "bert",
        {"bias": "msplora_only", "modules_to_save": ["classifier"]},
    ),
    "t5": ("t5", {}),
    "mixtral, experts": ("mixtral", {}),
}


def write(folder: Path) -> None:
    """Write each adapter, the base's weights and what the two answer."""
    for name, (model_name, changes) in ADAPTERS.items():
        if model_name == "mixtral" and not EXPERTS_ARE_PARAMETERS:
            continue
        there, tiny = folder / name, MODELS[model_name]
        there.mkdir(parents=True)
        base = tiny.model()
        weights = {key: its.clone().contiguous() for key, its in base.state_dict().items()}
        save_file(weights, there / "base.safetensors")
        options: dict[str, Any] = {"target_modules": tiny.targets, **changes}
        if tiny.parameters:
            options["target_parameters"] = list(tiny.parameters)
        model = get_peft_model(base, msplora.MSPLoraConfig(**options)).eval()
        randomise(model)
        _learn_the_rest(model)
        model.save_pretrained(str(there / "adapter"))
        save_file({"logits": _logits(model, model_name)}, there / "logits.safetensors")


def _learn_the_rest(model: Any) -> None:
    """What trains with the pairs (biases, heads) moves, too."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, its in model.named_parameters():
            if its.requires_grad and "msplora_" not in name:
                its.add_(torch.randn(its.shape, generator=generator) * 0.1)


def read(folder: Path) -> dict[str, float | str]:
    """Return name -> the largest difference of a logit from the writer's, or why it was left."""
    found: dict[str, float | str] = {}
    for name, (model_name, _) in ADAPTERS.items():
        there = folder / name
        if not (there.is_dir() and (EXPERTS_ARE_PARAMETERS or model_name != "mixtral")):
            found[name] = "transformers 4 has experts as linear layers, 5 as parameters"
        else:
            base = MODELS[model_name].model()
            base.load_state_dict(load_file(there / "base.safetensors"))
            model = PeftModel.from_pretrained(base, str(there / "adapter")).eval()
            expected = load_file(there / "logits.safetensors")["logits"]
            found[name] = (_logits(model, model_name) - expected).abs().max().item()
    return found


def _logits(model: Any, model_name: str) -> Tensor:
    with torch.no_grad():
        return model(**MODELS[model_name].batch()).logits.contiguous()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    verb, *folders = sys.argv[1:]
    if verb == "write":
        write(Path(folders[0]))
    else:
        print(json.dumps([read(Path(folder)) for folder in folders]))
