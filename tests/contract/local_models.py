"""Tiny random models in a hub cache, by the names under which PEFT's tests load them.

Nothing is downloaded: each is built from its config class with random weights, and saved where
`huggingface_hub` would have put it. A tokenizer of single bytes goes with the language models.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import torch

_HEADS = {"hidden_size": 16, "num_attention_heads": 4, "vocab_size": 1000}
_OPT = {**_HEADS, "ffn_dim": 32, "num_hidden_layers": 5, "word_embed_proj_dim": 16, "dropout": 0.0,
        "max_position_embeddings": 128}  # fmt: skip
_LLAMA = {**_HEADS, "intermediate_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 4,
          "max_position_embeddings": 256}  # fmt: skip
_GPT2 = {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 128, "vocab_size": 1000}
_BERT = {**_HEADS, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 5,
         "max_position_embeddings": 128, "pad_token_id": 0}  # fmt: skip
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4, "vocab_size": 1000,
       "decoder_start_token_id": 0}  # fmt: skip
_BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 4, "decoder_ffn_dim": 4,
         "vocab_size": 1000, "max_position_embeddings": 128}  # fmt: skip
_MOE = {**_LLAMA, "head_dim": 8, "num_key_value_heads": 2}
_QWEN_MOE = {**_MOE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_CLIP = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4,
         "num_hidden_layers": 5, "projection_dim": 32, "vocab_size": 1000}  # fmt: skip

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", _OPT),
    "hf-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", _OPT),
    "peft-internal-testing/opt-125m": (
        "OPTForCausalLM",
        {**_OPT, "hidden_size": 64, "word_embed_proj_dim": 64, "num_hidden_layers": 12},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", _GPT2),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _GPT2),
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM",
        {**_GPT2, "rotary_dim": 4},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", _LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", _LLAMA),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", _LLAMA),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        {
            **_LLAMA,
            "head_dim": 8,
            "num_key_value_heads": 2,
            "sliding_window": 32,
            "query_pre_attn_scalar": 8,
        },
    ),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomForCausalLM",
        {"hidden_size": 32, "n_layer": 5, "n_head": 4, "vocab_size": 1000},
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": (
        "GPTNeoXForCausalLM",
        {**_HEADS, "intermediate_size": 64, "num_hidden_layers": 5, "hidden_size": 32},
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": (
        "GptOssForCausalLM",
        {**_MOE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32},
    ),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "Llama4ForCausalLM",
        {
            **_MOE,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 32,
            "pad_token_id": 0,
        },
    ),
    "hf-internal-testing/Mixtral-tiny": (
        "MixtralForCausalLM",
        {**_MOE, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": ("Qwen3MoeForCausalLM", _QWEN_MOE),
    "hf-internal-testing/tiny-qwen3-moe": ("Qwen3MoeForCausalLM", _QWEN_MOE),
    "tiiuae/falcon-mamba-tiny-dev": (
        "FalconMambaForCausalLM",
        {
            "vocab_size": 1000,
            "hidden_size": 32,
            "state_size": 4,
            "num_hidden_layers": 2,
            "intermediate_size": 64,
            "pad_token_id": 0,
        },
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        _T5,
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": (
        "T5ForConditionalGeneration",
        _T5,
    ),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", _T5),
    "google/flan-t5-small": ("T5ForConditionalGeneration", {**_T5, "tie_word_embeddings": False}),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        _BART,
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", _BERT),
    "hf-internal-testing/tiny-random-BertModel": ("BertModel", _BERT),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        _BERT,
    ),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", _BERT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        _BERT,
    ),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", _BERT),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", _BERT),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        {**_LLAMA, "pad_token_id": 0},
    ),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    ),
    "peft-internal-testing/tiny-clip-text-2": ("CLIPTextModelWithProjection", _CLIP),
}

# An adapter's name -> the model it is for, the class it is for, its task.
ADAPTERS: dict[str, tuple[str, str, str | None]] = {
    "peft-internal-testing/tiny-opt-lora-revision": (
        "hf-internal-testing/tiny-random-OPTForCausalLM", "OPTForCausalLM", "CAUSAL_LM",
    ),
    "peft-internal-testing/tiny-OPTForCausalLM-lora": (
        "hf-internal-testing/tiny-random-OPTForCausalLM", "OPTForCausalLM", "CAUSAL_LM",
    ),
    "peft-internal-testing/tiny_T5ForSeq2SeqLM-lora": (
        "peft-internal-testing/tiny-random-t5", "T5ForConditionalGeneration", "SEQ_2_SEQ_LM",
    ),
    "peft-internal-testing/tiny_OPTForSequenceClassification-lora": (
        "hf-internal-testing/tiny-random-OPTForCausalLM", "OPTForSequenceClassification", "SEQ_CLS",
    ),
    "peft-internal-testing/tiny_GPT2ForTokenClassification-lora": (
        "peft-internal-testing/tiny-random-gpt2", "GPT2ForTokenClassification", "TOKEN_CLS",
    ),
    "peft-internal-testing/tiny_OPTForQuestionAnswering-lora": (
        "hf-internal-testing/tiny-random-OPTForCausalLM", "OPTForQuestionAnswering",
        "QUESTION_ANS",
    ),
    "peft-internal-testing/tiny_OPTForFeatureExtraction-lora": (
        "hf-internal-testing/tiny-random-OPTForCausalLM", "OPTModel", "FEATURE_EXTRACTION",
    ),
    "peft-internal-testing/tiny_WhisperForConditionalGeneration-lora": (
        "peft-internal-testing/tiny-whisper", "WhisperForConditionalGeneration", None,
    ),
}  # fmt: skip

MODELS["peft-internal-testing/tiny-whisper"] = (
    "WhisperForConditionalGeneration",
    {**_BART, "num_mel_bins": 80, "max_source_positions": 30, "max_target_positions": 40,
     "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
     "begin_suppress_tokens": None, "suppress_tokens": None},
)  # fmt: skip

# A test with nothing of the kind of layer that a method adapts by default.
_TARGETS = {"WhisperForConditionalGeneration": ["q_proj", "v_proj"]}


def build(cache: Path, method: str) -> None:
    """Put what is missing into the hub cache `cache`; adapters are of the `method`."""
    import transformers

    transformers.logging.set_verbosity_error()
    for name, (architecture, settings) in MODELS.items():
        folder = _snapshot(cache, name)
        if folder is None:
            continue
        torch.manual_seed(0)
        model_class = getattr(transformers, architecture)
        model = model_class(model_class.config_class(**settings))
        model.save_pretrained(folder)
        if "vocab_size" in settings:
            _tokenizer().save_pretrained(folder)
        elif "ResNet" in architecture:
            transformers.ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder)
        _finish(folder)
    for name, (base, architecture, task) in ADAPTERS.items():
        folder = _snapshot(cache, name)
        if folder is None:
            continue
        torch.manual_seed(0)
        _adapt(cache, base, architecture, task, method).save_pretrained(folder)
        _finish(folder)


def _adapt(cache: Path, base: str, architecture: str, task: str | None, method: str) -> Any:
    import peft
    import transformers

    import msplora

    config_class = msplora.MSPLoraConfig if method == "msplora" else peft.LoraConfig
    config = config_class(
        task_type=task, target_modules=_TARGETS.get(architecture), base_model_name_or_path=base
    )
    model = getattr(transformers, architecture).from_pretrained(_folder(cache, base))
    model.config._name_or_path = base
    model.name_or_path = base
    return peft.get_peft_model(model, config)


def _folder(cache: Path, name: str) -> Path:
    revision = hashlib.sha1(name.encode()).hexdigest()
    return cache / f"models--{name.replace('/', '--')}" / "snapshots" / revision


def _snapshot(cache: Path, name: str) -> Path | None:
    """Where a model is to be saved; `None` if it is there."""
    folder = _folder(cache, name)
    if (folder.parents[1] / "refs" / "main").is_file():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _finish(folder: Path) -> None:
    references = folder.parents[1] / "refs"
    references.mkdir(exist_ok=True)
    for branch in ("test", "main"):  # one of PEFT's tests asks for the first
        (references / branch).write_text(folder.name)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = dict(zip(("pad", "bos", "eos", "unk", "mask"), special, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": its for name, its in names.items()}
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--method", choices=["lora", "msplora"], required=True)
    arguments = parser.parse_args()
    build(arguments.cache, arguments.method)
