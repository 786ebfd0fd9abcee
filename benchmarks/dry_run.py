"""How far the memory that `msplora train --dry-run` foresees is from what is measured.

Each case is a run of its own: a model of a real architecture's shape, cut in depth, with random
weights, in a folder; rows of random words; a config. For each, one process makes the dry run with
`--measure` (bytes that tensors hold), another takes the same steps and reads its resident set.

    python benchmarks/dry_run.py --output benchmarks/results/dry-run.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

ROBERTA = {
    "family": "Roberta", "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
    "vocab_size": 50265, "max_position_embeddings": 514,
}  # fmt: skip
SMOLLM = {
    "family": "Llama", "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}  # fmt: skip
FEW_WORDS = {**SMOLLM, "vocab_size": 4096}
QWEN3 = {
    "family": "Qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
GPT2 = {
    "family": "GPT2", "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024,
}  # fmt: skip

QV, LLAMA_QV = ["query", "value"], ["q_proj", "v_proj"]


def _case(
    shape: dict[str, Any],
    layers: int,
    words: int,
    batch: int,
    adapter: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """A run: `words` is the length of its longest rows, `batch` its batch size."""
    training = {"batch_size": batch, "eval_batch_size": batch, **settings.pop("training", {})}
    return {
        "shape": shape, "layers": layers, "words": words, "adapter": adapter or {},
        "training": training, **settings,
    }  # fmt: skip


CASES: dict[str, dict[str, Any]] = {
    "RoBERTa-base, 4 layers, query and value": _case(ROBERTA, 4, 128, 16, {"target_modules": QV}),
    "RoBERTa-base, 4 layers, all linear, dropout 0.1": _case(
        ROBERTA, 4, 256, 8, {"target_modules": "all-linear", "lora_dropout": 0.1}
    ),
    "RoBERTa-base, 4 layers, plain LoRA": _case(
        ROBERTA, 4, 128, 16, {"target_modules": QV}, method="lora"
    ),
    "SmolLM2-135M, 6 layers": _case(SMOLLM, 6, 256, 4, {"target_modules": LLAMA_QV}),
    "SmolLM2-135M, 6 layers, bfloat16, all linear": _case(
        SMOLLM, 6, 256, 4, {"target_modules": "all-linear"}, dtype="bfloat16"
    ),
    "SmolLM2-135M, 6 layers, checkpointed": _case(
        SMOLLM, 6, 512, 4, {"target_modules": "all-linear"},
        training={"gradient_checkpointing": True},
    ),
    "SmolLM2-135M, 6 layers, everything trains, bfloat16": _case(
        SMOLLM, 6, 128, 4, method="full", dtype="bfloat16", training={"gradient_accumulation": 4}
    ),
    "SmolLM2-135M with 4,096 words, 6 layers, one long row": _case(
        FEW_WORDS, 6, 1536, 1, {"target_modules": "all-linear"}
    ),
    "SmolLM2-135M, 6 layers, 1 × 16 tokens": _case(
        SMOLLM, 6, 16, 1, {"target_modules": "all-linear"}
    ),
    "Qwen3-0.6B, 2 layers: 151,936 logits": _case(
        QWEN3, 2, 128, 4, {"target_modules": LLAMA_QV}, dtype="bfloat16"
    ),
    "GPT-2, 4 layers (Conv1D, dropout)": _case(
        GPT2, 4, 256, 4, {"target_modules": ["c_attn", "c_proj"]}
    ),
    "SmolLM2-135M with 4,096 words, 6 layers, packed": _case(
        FEW_WORDS, 6, 256, 2, {"target_modules": LLAMA_QV}, training={"packing": True},
        data={"max_length": 512},
    ),
    "SmolLM2-135M, 6 layers, 4 bits": _case(
        SMOLLM, 6, 256, 4, {"target_modules": "all-linear"}, quantization="4bit"
    ),
    "SmolLM2-135M, 6 layers, 4 bits, bfloat16, checkpointed": _case(
        SMOLLM, 6, 512, 4, {"target_modules": "all-linear"}, quantization="4bit",
        dtype="bfloat16", training={"gradient_checkpointing": True},
    ),
    "SmolLM2-135M with 4,096 words, 6 layers, 8 bits": _case(
        FEW_WORDS, 6, 256, 4, {"target_modules": "all-linear"}, quantization="8bit"
    ),
}  # fmt: skip


def make_run(case: dict[str, Any], folder: Path) -> Path:
    """Save the model and the rows of a case; return its config."""
    import torch
    import transformers
    import yaml
    from tokenizers import Tokenizer, models, pre_tokenizers

    shape = dict(case["shape"])
    family = shape.pop("family")
    layers = "n_layer" if family == "GPT2" else "num_hidden_layers"
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = getattr(transformers, f"{family}Config")(**shape, **{layers: case["layers"]}, **ends)
    classifies = family == "Roberta"
    kind = "Model" if classifies else "ForCausalLM" if family != "GPT2" else "LMHeadModel"
    options = {"add_pooling_layer": False} if classifies else {}
    torch.manual_seed(0)
    model = getattr(transformers, family + kind)(config, **options)
    if case.get("dtype") == "bfloat16" and case.get("method") != "full":
        model.bfloat16()
    model.save_pretrained(folder / "model")
    vocabulary = {word: place for place, word in enumerate(["<s>", "</s>", "<pad>", *_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder / "model")
    chance = random.Random(0)
    rows = []
    for number in range(64):
        count = case["words"] - number % 16
        text = " ".join(chance.choice(_WORDS) for _ in range(max(count, 4)))
        if classifies:
            rows.append({"text": text, "label": number % 2})
        else:
            prompt, _, completion = text.partition(" ")
            rows.append({"prompt": prompt, "completion": f" {completion}"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "model": str(folder / "model"),
        "task": "classification" if classifies else "sft",
        "output": str(folder / "run"),
        "data": {"train": str(folder / "rows.jsonl"), **case.get("data", {})},
        **{key: case[key] for key in KEYS if key in case},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return folder / "run.yaml"


KEYS = ("method", "dtype", "quantization", "adapter", "training")
_WORDS = [f"w{place}" for place in range(1000)]


def held(config: Path) -> dict[str, Any]:
    """The dry run of a case, and the bytes that tensors hold in its rehearsal."""
    from msplora.train.dry_run import dry_run
    from msplora.train.settings_file import read_settings

    return dry_run(read_settings(config), real=True).to_dict()


def resident(config: Path) -> dict[str, Any]:
    """How far the resident set of a process grows that takes the same steps, unobserved."""
    import psutil
    import torch

    from msplora.bench.memory import resident_bytes
    from msplora.train.quiet import quiet_libraries
    from msplora.train.rehearsal import Rehearsal, rehearsed
    from msplora.train.run import prepare_job
    from msplora.train.settings_file import read_settings

    settings = read_settings(config)
    torch.ones(64, 64) @ torch.ones(64, 64)  # the libraries of matrix products
    before = psutil.Process().memory_info().rss
    anonymous = Anonymous()
    with anonymous, quiet_libraries(), rehearsed(settings), tempfile.TemporaryDirectory() as folder:
        job = prepare_job(settings)
        rehearsal = Rehearsal(job.make_trainer(Path(folder)))
        rehearsal.train()
        if rehearsal.evaluates:
            rehearsal.evaluate()
    return {"resident_growth": resident_bytes() - before, "anonymous_growth": anonymous.growth}


class Anonymous:
    """Watches the part of the resident set that is no file: mapped checkpoints can be let go."""

    def __enter__(self) -> Anonymous:
        self._before = self._now()
        self.growth = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.growth = max(self.growth, self._now() - self._before)

    @staticmethod
    def _now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise SystemExit("the resident set is read from Linux's /proc")


def _apart(what: str, config: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--apart", what, "--config", str(config)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{what} of {config}: {ended.stderr[-2000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    """Measure the cases that the file does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", nargs="*", help="parts of the names of cases")
    parser.add_argument("--apart", choices=["held", "resident"], help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.apart:
        print(json.dumps({"held": held, "resident": resident}[asked.apart](asked.config)))
        return
    from msplora.bench.provenance import provenance

    there = asked.output and asked.output.is_file()
    lines = asked.output.read_text("utf-8").splitlines() if there else []
    done = {json.loads(line)["case"] for line in lines}
    for name, case in CASES.items():
        if name in done or (asked.only and not any(part in name for part in asked.only)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            config = make_run(case, Path(folder))
            row = _row(name, _apart("held", config), _apart("resident", config))
        print(json.dumps(row, ensure_ascii=False))
        if asked.output:
            with asked.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | provenance("cpu"), ensure_ascii=False) + "\n")


def _row(name: str, found: dict[str, Any], resident: dict[str, Any]) -> dict[str, Any]:
    measured = found["measured"]
    row: dict[str, Any] = {"case": name}
    for phase in ("training", "evaluation"):
        row[f"{phase}_estimate"] = found[phase]["total"]
        row[f"{phase}_measured"] = measured[phase]
        row[f"{phase}_error"] = round(found[phase]["total"] / measured[phase] - 1, 4)
    weights = sum(
        found["training"]["parts"].get(part, 0) for part in ("frozen weights", "weights that train")
    )
    above = (found["training"]["total"] - weights) / (measured["training"] - weights) - 1
    row["training_error_without_weights"] = round(above, 4)
    row["parts"] = found["training"]["parts"]
    row["peak_in"] = found["training"]["where"]
    peak = max(found["training"]["total"], found["evaluation"]["total"])
    for name, growth in resident.items():
        row[name] = growth
        row[name.replace("growth", "error")] = round(peak / growth - 1, 4)
    return row


if __name__ == "__main__":
    main()
