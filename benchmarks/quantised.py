"""Pyramids on quantised bases, beside PEFT's LoRA: what installs on a CPU is run.

    python benchmarks/quantised.py --cache .environments --model stories260K/hf \
        --data instruction-data.json --output benchmarks/results/quantised.json

Makes an environment per library. Each scheme quantises two bases, a tiny random Llama and the model
that is given, and a process of its own (`quantised_base.py`) adapts, trains, merges, saves and
loads.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from environments import environment, run_in, versions_in
from transformers import LlamaConfig, LlamaForCausalLM

from msplora.bench.provenance import provenance

OURS = (
    "--constraint", "constraints.txt", "peft", "transformers", "accelerate", "typer", "rich",
    "safetensors", "packaging",
)  # fmt: skip


@dataclass(frozen=True)
class Library:
    """What is installed, and what `quantised_base.py` quantises with it."""

    package: str
    schemes: tuple[str, ...]
    requirements: tuple[str, ...] = ()
    without_theirs: tuple[str, ...] = ()


LIBRARIES = {
    "torchao": Library(
        "torchao",
        ("torchao int8, weights", "torchao int8, weights and activations"),
        ("torchao==0.18.0",),
    ),
    "hqq": Library("hqq", ("HQQ 8 bits", "HQQ 4 bits"), ("hqq==0.2.8.post1",)),
    # Its own requirements name a newer torch than the tests run with.
    "gptqmodel": Library(
        "gptqmodel",
        ("GPTQ 4 bits", "AWQ 4 bits"),
        (
            "optimum", "datasets", "device-smi", "pypcre", "tokenicer", "logbar", "jinja2", "ninja",
            "torchao==0.18.0", "defuser", "threadpoolctl", "protobuf", "pillow", "requests",
            "pyarrow", "dill", "maturin",
        ),
        ("gptqmodel==7.7.0",),
    ),
}  # fmt: skip

# gptqmodel's search asks for multiples of 64 outputs.
TOO_NARROW = {("AWQ 4 bits", "stories260K")}


def main() -> None:
    """Run every scheme on every base, write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="Where environments are kept.")
    parser.add_argument("--model", type=Path, required=True, help="The folder of stories260K.")
    parser.add_argument("--data", type=Path, required=True, help="Rows in alpaca form.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(LIBRARIES), help="Run these alone.")
    given = parser.parse_args()
    about = provenance("cpu")  # before the results change what is tracked
    before = json.loads(given.output.read_text()) if given.output.is_file() else {"bases": []}
    rows = [its for its in before["bases"] if its["library"] not in given.only]
    for name in given.only:
        for row in of_library(name, given):
            print(json.dumps(row, indent=1), flush=True)
            rows.append(row | {"commit": about["commit"]})
            rows.sort(key=lambda its: list(LIBRARIES).index(its["library"]))
            content = {**about, "bases": rows}
            given.output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def of_library(name: str, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each scheme and base."""
    library = LIBRARIES[name]
    python = environment(
        given.cache, name, *OURS, *library.requirements, without_theirs=library.without_theirs
    )
    versions = versions_in(python, library.package, "torch", "transformers", "peft")
    with tempfile.TemporaryDirectory() as scratch:
        bases = {"tiny Llama": tiny_llama(Path(scratch) / "tiny", given.model)}
        # A copy: what has to be quantised beforehand is kept beside the base.
        bases["stories260K"] = Path(shutil.copytree(given.model, Path(scratch) / "stories260K"))
        for scheme in library.schemes:
            for base, folder in bases.items():
                if (scheme, base) in TOO_NARROW:
                    continue
                done = run_in(
                    python, "benchmarks/quantised_base.py", scheme, str(folder),
                    str(given.data.absolute()), more={"GPTQMODEL_CPU_WORKERS": "2"},
                )  # fmt: skip
                found = json.loads(done.stdout.splitlines()[-1])
                about = {"library": name, "scheme": scheme, "base": base, "versions": versions}
                yield about | found


def tiny_llama(folder: Path, tokenizer: Path) -> Path:
    """A random Llama of four layers with the words of another model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=512, max_position_embeddings=512, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy2(file, folder)
    return folder


if __name__ == "__main__":
    main()
