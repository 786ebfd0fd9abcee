"""Tiny random models saved with a tokenizer of bytes, so that any text goes in and comes out."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
_SPECIAL = ("<s>", "</s>", "<pad>")
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "vocab_size": len(_BYTES) + len(_SPECIAL),
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def save_language_model(folder: Path, chats: bool = False, positions: int = 512) -> Path:
    """A Llama of four layers."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(max_position_embeddings=positions, num_key_value_heads=2, **_SIZES)
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    if chats:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def save_encoder(folder: Path) -> Path:
    """A RoBERTa of four layers, pretrained as it were: with no classifier's head."""
    torch.manual_seed(0)
    # As many as RoBERTa's: positions start after the padding's.
    config = hf.RobertaConfig(max_position_embeddings=515, **_SIZES)
    hf.RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    byte_tokenizer(closing=True).save_pretrained(folder)
    return folder


def byte_tokenizer(closing: bool = False) -> hf.PreTrainedTokenizerFast:
    """Of bytes; with `closing`, sequences end in </s>, as an encoder's do."""
    words = {word: place for place, word in enumerate([*_SPECIAL, *_BYTES])}
    found = Tokenizer(models.BPE(vocab=words, merges=[]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    found.decoder = decoders.ByteLevel()  # pyright: ignore
    end = "</s>" if closing else ""
    found.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single=f"<s> $A {end}".strip(),
        pair=f"<s> $A </s> $B {end}".strip(),
        special_tokens=[("<s>", 0), ("</s>", 1)],
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=found, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
