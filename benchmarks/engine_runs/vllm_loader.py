"""vLLM's own reading of an adapter, and its own operations for the CPU, on transformers' base.

vLLM's engine needs a GPU, or a build for the CPU that the registry does not have. Its wheel brings
its Python code: PEFTHelper reads and judges the config, LoRAModel the tensors, LoRALayerWeights and
PackedLoRALayerWeights (q, k and v; gate and up) fold the scale in; each factor is copied into a
zeroed slot of the largest rank, as BaseLinearLayerWithLoRA.set_lora does, and bgmv_shrink and
bgmv_expand multiply.

Importing all of that asks for CUDA's libraries. So its folders are made known without what their
__init__.py import, and the modules of layers and models that lora/utils.py names, none of which the
reading of an adapter calls, are empty.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import torch
import transformers
from run import Asked, answer

FOLDERS = (
    "vllm", "vllm.config", "vllm.model_executor", "vllm.model_executor.layers",
    "vllm.model_executor.models", "vllm.transformers_utils",
)  # fmt: skip
EMPTY = (
    "vllm.lora.layers", "vllm.model_executor.custom_op", "vllm.model_executor.layers.fused_moe",
    "vllm.model_executor.layers.linear", "vllm.model_executor.layers.vocab_parallel_embedding",
    "vllm.model_executor.models.utils", "vllm.model_executor.utils",
    "vllm.transformers_utils.repo_utils",
)  # fmt: skip


class Empty(ModuleType):
    """A module in which every name is `object`."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


found = importlib.util.find_spec("vllm")
assert found is not None
assert found.submodule_search_locations is not None
root = Path(next(iter(found.submodule_search_locations))).parent
for name in FOLDERS:
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__path__ = [str(root.joinpath(*name.split(".")))]
for name in EMPTY:
    sys.modules[name] = Empty(name)

from vllm.config.lora import LoRAConfig  # noqa: E402
from vllm.lora.lora_model import LoRAModel  # noqa: E402
from vllm.lora.lora_weights import PackedLoRALayerWeights  # noqa: E402
from vllm.lora.ops.torch_ops import bgmv_expand, bgmv_shrink  # noqa: E402
from vllm.lora.peft_helper import PEFTHelper  # noqa: E402

RAN = (
    "PEFTHelper, LoRAModel.from_local_checkpoint, PackedLoRALayerWeights, bgmv_shrink and "
    "bgmv_expand of the wheel, on transformers' base"
)
PACKED = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
ALONE = ("o_proj", "down_proj")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def logits(asked: Asked, adapter: bool) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(asked.base).eval()
    if adapter:
        add_lora(model, asked.adapter)
    with torch.inference_mode():
        return model(torch.tensor([asked.ids])).logits[0]


def add_lora(model: torch.nn.Module, folder: str) -> None:
    rank = json.loads((Path(folder) / "adapter_config.json").read_text())["r"]
    limits = LoRAConfig(max_lora_rank=min(value for value in RANKS if value >= rank))
    helper = PEFTHelper.from_local_dir(folder, max_position_embeddings=None)
    helper.validate_legal(limits)
    lora = LoRAModel.from_local_checkpoint(
        folder,
        {*ALONE, *(name for names in PACKED.values() for name in names)},
        helper,
        lora_model_id=1,
        device="cpu",
        dtype=torch.float32,
    )
    used = set()
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        names = PACKED.get(parent.rpartition(".")[2], ())
        if name in names:
            members = [lora.get_lora(f"{parent}.{member}") for member in names]
            if not any(members):
                continue
            packed = PackedLoRALayerWeights.pack(members)
            place = names.index(name)
            a, b = packed.lora_a[place], packed.lora_b[place]
        elif (alone := lora.get_lora(path)) is not None:
            alone.optimize()
            a, b = alone.lora_a, alone.lora_b
        else:
            continue
        used.add(path)
        if a is not None:
            module.register_forward_hook(hook(slot(a, b, limits.max_lora_rank)))
    assert set(lora.loras) <= used, set(lora.loras) - used


def slot(a: torch.Tensor, b: torch.Tensor, max_rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeroed slots (1, 1, max_rank, in) and (1, 1, out, max_rank) with the factors in them."""
    stacked_a = torch.zeros(1, 1, max_rank, a.shape[1])
    stacked_b = torch.zeros(1, 1, b.shape[0], max_rank)
    stacked_a[0, 0, : a.shape[0], : a.shape[1]].copy_(a)
    stacked_b[0, 0, : b.shape[0], : b.shape[1]].copy_(b)
    return stacked_a, stacked_b


def hook(slots: tuple[torch.Tensor, torch.Tensor]):
    stacked_a, stacked_b = slots

    def add(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor):
        x, y = inputs[0].flatten(0, -2), output.flatten(0, -2).clone()
        mine = torch.zeros(len(x), dtype=torch.long)
        low = torch.zeros(len(x), stacked_a.shape[2])
        bgmv_shrink(x, stacked_a, low, mine, 1.0)
        bgmv_expand(low, stacked_b, y, mine, add_inputs=True)
        return y.reshape(output.shape)

    return add


if __name__ == "__main__":
    answer(logits, RAN, ["vllm", "torch", "transformers"])
