"""What tests of `msplora train` and its verbs share: tiny bases on disk, rows, the command."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from msplora.cli.app import main
from tiny import llama

WORDS = [f"w{place}" for place in range(50)]
GOOD, BAD = WORDS[:10], WORDS[10:20]
"""Words that decide the class of a row."""


@dataclass(frozen=True)
class Result:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """What it printed as its error, on one line."""
        return " ".join(self.err.split())

    def json(self) -> Any:
        return json.loads(self.out)


def msplora(*arguments: object) -> Result:
    """Run the command in this process, through the very function that the script calls."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["msplora", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return Result(code, out.getvalue(), err.getvalue())
    finally:
        sys.argv = before
    return Result(0, out.getvalue(), err.getvalue())


def word_tokenizer(
    *special: str, opening: str = "", closing: str = "", pair: str = ""
) -> Tokenizer:
    """A tokenizer of whole words; `opening` and `closing` are put around each text."""
    vocabulary = {word: place for place, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    if opening or closing:
        around = [token for token in (opening, closing) if token]
        tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
            single=" ".join(filter(None, [opening, "$A", closing])),
            pair=pair or None,
            special_tokens=[(token, vocabulary[token]) for token in around],
        )
    return tokenizer


def save_decoder(folder: Path, layers: int = 4, opens: bool = True, **changes: Any) -> Path:
    """A tiny Llama whose tokenizer has a start token (which it puts first) and an end token."""
    torch.manual_seed(0)
    llama(layers, bos_token_id=1, eos_token_id=2, pad_token_id=0, **changes).save_pretrained(folder)  # pyright: ignore
    hf.PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer("<unk>", "<s>", "</s>", opening="<s>" if opens else ""),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    ).save_pretrained(folder)
    return folder


def save_encoder(folder: Path, layers: int = 4, positions: int = 32, **changes: Any) -> Path:
    """A tiny BERT without a head, as a pretrained encoder is published."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": positions,
        "num_hidden_layers": layers,
        "hidden_dropout_prob": 0.1,
    }
    hf.BertForMaskedLM(hf.BertConfig(**(options | changes))).save_pretrained(folder)
    tokenizer = word_tokenizer(
        "[UNK]", "[CLS]", "[SEP]", "[PAD]",
        opening="[CLS]", closing="[SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
    )  # fmt: skip
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    return folder


def labelled_rows(count: int, labels: tuple[str, str] = ("bad", "good")) -> list[dict[str, Any]]:
    """Rows whose label says which kind of word is in the text."""
    rows = []
    for place in range(count):
        kind = (GOOD if place % 2 else BAD)[place * 7 % 10]
        text = [WORDS[20 + place % 13], kind, WORDS[20 + place * 5 % 29], kind]
        rows.append({"text": " ".join(text[: 2 + place % 3]), "label": labels[place % 2]})
    return rows


def answered_rows(count: int) -> list[dict[str, str]]:
    """Prompts and completions in which the completion repeats the prompt."""
    rows = []
    for place in range(count):
        words = [WORDS[(place * 3 + step) % 50] for step in range(2 + place % 3)]
        rows.append({"prompt": " ".join(words), "completion": " " + " ".join(words)})
    return rows


def write_jsonl(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_config(file: Path, content: Mapping[str, Any]) -> Path:
    file.write_text(yaml.safe_dump(dict(content)), encoding="utf-8")
    return file


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder and a hash of what it holds: what a failed command must leave."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors that a run's weights folder holds."""
    from safetensors.torch import load_file

    return {
        key: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for key, tensor in load_file(file).items()
    }


def same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    """Whether two files hold the same tensors, bit for bit."""
    return list(first) == list(second) and all(
        torch.equal(first[key], second[key]) for key in first
    )


def save_bases(folder: Path, rows: int = 40, **encoder: Any) -> Path:
    """A decoder and an encoder, and rows for each."""
    save_encoder(folder / "encoder", positions=16, **encoder)
    save_decoder(folder / "decoder")
    write_jsonl(folder / "labelled.jsonl", labelled_rows(rows))
    write_jsonl(folder / "answered.jsonl", answered_rows(rows))
    return folder


def config_on(bases: Path, task: str = "sft", **changes: Any) -> dict[str, Any]:
    """A run on one of `save_bases`, in steps of 8 rows, each of them logged."""
    classifies = task == "classification"
    training = {"batch_size": 8, "learning_rate": 0.01, "logging_steps": 1}
    content = {
        "model": str(bases / ("encoder" if classifies else "decoder")),
        "task": task,
        "output": "run",
        "data": {"train": str(bases / ("labelled.jsonl" if classifies else "answered.jsonl"))},
        "training": training | changes.pop("training", {}),
    }
    return content | changes
