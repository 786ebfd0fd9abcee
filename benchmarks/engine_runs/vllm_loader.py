"""vLLM's own reading of an adapter, and its own operations for the CPU, on transformers' base.

vLLM's engine needs a GPU, or a build for the CPU that the registry does not have. Its wheel brings
its Python code: PEFTHelper reads and judges the config, LoRAModel the tensors, LoRALayerWeights and
PackedLoRALayerWeights (q, k and v; gate and up) fold the scale in; each factor is copied into a
zeroed slot of the largest rank, as BaseLinearLayerWithLoRA.set_lora does, and bgmv_shrink and
bgmv_expand multiply.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from run import Asked, answer
from vllm.config.lora import LoRAConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import PackedLoRALayerWeights
from vllm.lora.ops.torch_ops import bgmv_expand, bgmv_shrink
from vllm.lora.peft_helper import PEFTHelper

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
