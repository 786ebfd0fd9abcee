"""Tiny real models, built from their configs with random weights: no network, no files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCABULARY = 64
# Since transformers 5 a layer's experts are one parameter; before, they were linear layers.
EXPERTS_ARE_PARAMETERS = int(hf.__version__.split(".")[0]) >= 5
IMAGE_TOKEN = VOCABULARY - 1


@dataclass(frozen=True)
class Tiny:
    """A model, what to adapt in it, and inputs for it."""

    build: Callable[..., nn.Module]
    targets: Any
    layers: int = 4
    parameters: tuple[str, ...] = ()
    """For `target_parameters`."""
    inputs: str = "text"

    def model(self, layers: int | None = None, dtype: torch.dtype = torch.float32) -> Any:
        torch.manual_seed(0)
        return self.build(layers or self.layers).to(dtype).eval()

    def batch(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(5, VOCABULARY, (2, 9), generator=generator)
        if self.inputs == "text":
            return {"input_ids": ids}
        if self.inputs == "text-to-text":
            return {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
        pixels = torch.rand((2, 3, 16, 16), generator=generator).to(dtype)
        if self.inputs == "image":
            return {"pixel_values": pixels}
        ids[ids == IMAGE_TOKEN] = 5
        ids[:, 1:5] = IMAGE_TOKEN  # four patches
        return {"input_ids": ids, "pixel_values": pixels}


def llama(layers: int = 4, **changes: Any) -> nn.Module:
    options = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
    }
    return hf.LlamaForCausalLM(hf.LlamaConfig(num_hidden_layers=layers, **(options | changes)))


def _gemma(layers: int) -> nn.Module:
    # Gemma 3n and 4 have layers of unequal shape; OpenELM too. Here: MLPs of two widths.
    config = hf.Gemma3nTextConfig(
        vocab_size=VOCABULARY,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=[48 if layer % 2 else 64 for layer in range(layers)],
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        layer_types=["full_attention"] * layers,
        num_kv_shared_layers=0,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * layers,
    )
    return hf.Gemma3nForCausalLM(config)


def _gpt2(layers: int) -> nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(n_layer=layers, n_embd=32, n_head=4, vocab_size=VOCABULARY, n_positions=64)
    )


_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "num_labels": 3,
}


def _bert(layers: int) -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(num_hidden_layers=layers, **_ENCODER))


def _roberta(layers: int) -> nn.Module:
    return hf.RobertaForSequenceClassification(
        hf.RobertaConfig(num_hidden_layers=layers, pad_token_id=1, **_ENCODER)
    )


def _deberta(layers: int) -> nn.Module:
    config = hf.DebertaV2Config(
        num_hidden_layers=layers,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        **_ENCODER,
    )
    return hf.DebertaV2ForSequenceClassification(config)


def _t5(layers: int) -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            d_model=32,
            d_ff=48,
            d_kv=8,
            num_heads=4,
            num_layers=layers,
            num_decoder_layers=layers,
            vocab_size=VOCABULARY,
            initializer_factor=0.5,  # its attention is unscaled, and would amplify rounding
        )
    )


_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def _vit(layers: int) -> nn.Module:
    return hf.ViTForImageClassification(
        hf.ViTConfig(num_hidden_layers=layers, num_labels=3, **_VISION)
    )


def _llava(layers: int) -> nn.Module:
    """A vision tower and a language model: two stacks in which q_proj means different things."""
    text = hf.LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    )
    vision = hf.CLIPVisionConfig(num_hidden_layers=3, **_VISION)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            text_config=text,
            vision_config=vision,
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=-1,  # so that every layer of the tower matters
        )
    )


def _mixtral(layers: int) -> nn.Module:
    return hf.MixtralForCausalLM(
        hf.MixtralConfig(
            num_hidden_layers=layers,
            hidden_size=32,
            intermediate_size=24,  # so that no expert is square
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
        )
    )


def _gpt_oss(layers: int) -> nn.Module:
    """Experts that are stored the other way round: (experts, in, out)."""
    return hf.GptOssForCausalLM(
        hf.GptOssConfig(
            num_hidden_layers=layers,
            hidden_size=32,
            intermediate_size=24,
            head_dim=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            layer_types=["full_attention"] * layers,
        )
    )


MODELS = {
    "llama": Tiny(llama, ["q_proj", "v_proj"]),
    "llama-all-linear": Tiny(llama, "all-linear"),
    "gemma": Tiny(_gemma, ["q_proj", "gate_proj", "down_proj"]),
    "gpt2": Tiny(_gpt2, ["c_attn", "c_fc"]),
    "bert": Tiny(_bert, ["query", "value"]),
    "roberta": Tiny(_roberta, ["query", "value"]),
    "deberta": Tiny(_deberta, ["query_proj", "value_proj"]),
    "t5": Tiny(_t5, ["q", "v"], inputs="text-to-text"),
    "vit": Tiny(_vit, r".*\.(query|value|q_proj|v_proj)", inputs="image"),
    "llava": Tiny(_llava, ["q_proj", "v_proj"], inputs="text-and-image"),
    "mixtral": Tiny(
        _mixtral, ["q_proj"], parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    )
    if EXPERTS_ARE_PARAMETERS
    else Tiny(_mixtral, ["q_proj", "w1", "w2"]),
    "gpt-oss": Tiny(
        _gpt_oss, ["o_proj"], parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    ),
}
