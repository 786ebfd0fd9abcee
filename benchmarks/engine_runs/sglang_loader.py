"""SGLang's own reading of an adapter, and its own torch operations, on transformers' base.

SGLang's engine needs a GPU. Its wheel brings its Python code: LoRAConfig reads the config,
LoRAAdapter takes the tensors, joins q, k and v, and gate and up, and alpha over r for the scale;
sgemm_lora_a_fwd and sgemm_lora_b_fwd multiply. That every factor has exactly the config's rank,
which SGLang asserts when it fills its buffers on the GPU, is asserted here.

Importing the package itself asks for CUDA's libraries. So its folders are made known without what
their __init__.py import, and five names that its lora.py only annotates with, or reads files by,
are empty: the tensors are read by safetensors.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
import transformers
from run import Asked, answer
from safetensors.torch import load_file

FOLDERS = (
    "sglang", "sglang.srt", "sglang.srt.configs", "sglang.srt.layers", "sglang.srt.lora",
    "sglang.srt.lora.backend", "sglang.srt.lora.torch_ops", "sglang.srt.model_executor",
    "sglang.srt.model_loader", "sglang.srt.utils",
)  # fmt: skip
EMPTY = {
    "sglang.srt.configs.load_config": "LoadConfig",
    "sglang.srt.lora.backend.base_backend": "BaseLoRABackend",
    "sglang.srt.model_executor.forward_batch_info": "ForwardBatch",
    "sglang.srt.model_loader.loader": "DefaultModelLoader",
    "sglang.srt.utils.hf_transformers_utils": "AutoConfig",
}
found = importlib.util.find_spec("sglang")
assert found is not None
assert found.submodule_search_locations is not None
root = Path(next(iter(found.submodule_search_locations))).parent
for name in FOLDERS:
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__path__ = [str(root.joinpath(*name.split(".")))]
for name, member in EMPTY.items():
    sys.modules[name] = ModuleType(name)
    setattr(sys.modules[name], member, object)

from sglang.srt.lora.lora import LoRAAdapter  # noqa: E402
from sglang.srt.lora.lora_config import LoRAConfig  # noqa: E402
from sglang.srt.lora.torch_ops.lora_ops import (  # noqa: E402
    sgemm_lora_a_fwd,
    sgemm_lora_b_fwd,
)
from sglang.srt.lora.utils import (  # noqa: E402
    get_normalized_target_modules,
    get_target_module_name,
)

RAN = (
    "LoRAConfig, LoRAAdapter.initialize_weights_from_tensors, sgemm_lora_a_fwd and "
    "sgemm_lora_b_fwd of the wheel, on transformers' base"
)
STACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "o_proj": ("o_proj",),
    "down_proj": ("down_proj",),
}
PARENT = {"qkv_proj": "self_attn", "o_proj": "self_attn", "gate_up_proj": "mlp", "down_proj": "mlp"}


def logits(asked: Asked, adapter: bool) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(asked.base).eval()
    if adapter:
        add_lora(model, asked.adapter)
    with torch.inference_mode():
        return model(torch.tensor([asked.ids])).logits[0]


def add_lora(model: torch.nn.Module, folder: str) -> None:
    config = LoRAConfig(folder)
    assert not config.use_dora
    adapter = LoRAAdapter("adapter", config, model.config, None, None)
    adapter.initialize_weights_from_tensors(load_file(Path(folder) / "adapter_model.safetensors"))
    targets = get_normalized_target_modules(config.target_modules)
    for number, layer in enumerate(adapter.layers):
        block = model.model.layers[number]
        by_module: dict[str, dict[str, torch.Tensor]] = {}
        for name, weight in layer.weights.items():
            factor = "a" if "lora_A" in name else "b"
            by_module.setdefault(get_target_module_name(name, targets), {})[factor] = weight
        for name, factors in by_module.items():
            members = STACKED[name]
            # As load_lora_weight_to_buffer asserts: exactly the rank of the config, for all.
            assert factors["a"].shape[0] == config.r * len(members)
            assert factors["b"].shape[1] == config.r
            parent = getattr(block, PARENT[name])
            layers = [getattr(parent, member) for member in members]
            offsets = [0]
            for linear in layers:
                offsets.append(offsets[-1] + linear.out_features)
            for place, linear in enumerate(layers):
                linear.register_forward_hook(
                    hook(factors, config.r, adapter.scaling, offsets, place)
                )


def hook(
    factors: dict[str, torch.Tensor], rank: int, scaling: float, offsets: list[int], place: int
):
    a, b = factors["a"].unsqueeze(0), factors["b"].unsqueeze(0)
    slices = len(offsets) - 1
    one, ranks = torch.tensor([0]), torch.tensor([rank])

    def add(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor):
        x = inputs[0].flatten(0, -2)
        length = torch.tensor([len(x)])
        low = sgemm_lora_a_fwd(x, a, one, length, ranks, torch.tensor([scaling]), slices)
        update = sgemm_lora_b_fwd(
            low, b, one, length, ranks, torch.tensor(offsets, dtype=torch.int32)
        )
        mine = update[:, offsets[place] : offsets[place + 1]]
        return output + mine.reshape(output.shape)

    return add


if __name__ == "__main__":
    answer(logits, RAN, ["sglang", "torch", "transformers"])
