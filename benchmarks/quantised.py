"""A pyramid on bases that other libraries quantise, on the CPU.

    python benchmarks/quantised.py --cache .environments --output benchmarks/results/quantised.json

Each library has an environment of its own, in which this file runs once more per kind of base.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environments import environment, run_in

COMMON = ("--constraint", "constraints.txt", "peft", "transformers", "accelerate", "typer", "rich")
# The package -> what it needs beside PEFT and transformers, and the kinds of base it makes.
LIBRARIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bitsandbytes": (("bitsandbytes==0.50.2",), ("4 bits (nf4)", "8 bits")),
    "torchao": (("torchao==0.17.0",), ("8 bits, weights only", "8 bits, activations too")),
    "hqq": (("hqq==0.2.8.post1",), ("4 bits", "8 bits")),
    "gptqmodel": (("gptqmodel==7.7.0",), ("4 bits (GPTQ)",)),
}


def quantisation_config(library: str, kind: str) -> Any:
    """What transformers takes to load such a base."""
    import transformers as hf

    if library == "bitsandbytes":
        import torch

        four = kind.startswith("4")
        return hf.BitsAndBytesConfig(
            load_in_4bit=four,
            load_in_8bit=not four,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
        )
    if library == "torchao":
        from torchao import quantization

        if "weights" in kind:
            return hf.TorchAoConfig(quantization.Int8WeightOnlyConfig())
        return hf.TorchAoConfig(quantization.Int8DynamicActivationInt8WeightConfig())
    if library == "hqq":
        return hf.HqqConfig(nbits=int(kind[0]), group_size=64)
    return hf.GPTQConfig(bits=4, group_size=32, dataset=["a few words to calibrate on"] * 4)


def judge(library: str, kind: str) -> dict[str, Any]:
    """Go through the steps; return what was measured, or which step failed and how."""
    import torch
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    import msplora

    torch.manual_seed(0)
    torch.set_num_threads(1)
    ids = torch.randint(5, 64, (2, 9), generator=torch.Generator().manual_seed(1))

    def logits(model: Any) -> Any:
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits.float()

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            f"{folder}/base",
            quantization_config=quantisation_config(library, kind),
            device_map={"": "cpu"},
            dtype=torch.float32,
        )

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=4, vocab_size=64, max_position_embeddings=64,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(f"{folder}/base")

        def start() -> None:
            base = load()
            found["layer"] = type(base.model.layers[0].self_attn.q_proj).__name__
            found["base"] = logits(base)
            asked = msplora.MSPLoraConfig(target_modules="all-linear")
            found["model"] = get_peft_model(base, asked)
            _same("an adapter that starts at zero", logits(found["model"]), found["base"])

        def train() -> None:
            model = found["model"].train()
            learning = [its for its in model.parameters() if its.requires_grad]
            optimizer = torch.optim.AdamW(learning, lr=1e-2)
            losses = []
            for _ in range(8):
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            if losses[-1] >= losses[0]:
                raise AssertionError(f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}")
            still = [its for its, (_, b, _) in msplora.factors(model).items() if not b.any()]
            if still:
                raise AssertionError(f"pairs that learnt nothing: {still}")
            found["first_loss"], found["last_loss"] = losses[0], losses[-1]

        def reload() -> None:
            found["model"].save_pretrained(f"{folder}/adapter")
            found["adapted"] = logits(found["model"])
            loaded = PeftModel.from_pretrained(load(), f"{folder}/adapter")
            _same("the reloaded adapter", logits(loaded), found["adapted"])

        def merge() -> None:
            moved = (found["adapted"] - found["base"]).abs().max()
            try:
                merged = logits(found["model"].merge_and_unload())
            except (ValueError, NotImplementedError, AttributeError, TypeError) as error:
                found["merge_refused"] = f"{type(error).__name__}: {_first_line(error)}"
                return
            found["merged_differs_by"] = ((merged - found["adapted"]).abs().max() / moved).item()

        steps: list[Callable[[], None]] = [start, train, reload, merge]
        for step in steps:
            try:
                step()
            except (
                Exception
            ) as error:  # what a library raises cannot be foreseen, and is the result
                return {
                    "step": step.__name__,
                    "failed": f"{type(error).__name__}: {_first_line(error)}",
                }
    return {key: found.get(key) for key in KEPT}


KEPT = ("layer", "first_loss", "last_loss", "merged_differs_by", "merge_refused")


def _same(what: str, found: Any, expected: Any) -> None:
    difference = (found - expected).abs().max().item()
    if difference:
        raise AssertionError(f"{what} differs by {difference:.1e}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:160]


def main() -> None:
    """Make the environments, run each kind of base in its own, write the rows."""
    from environments import versions_in

    from msplora.bench.provenance import provenance

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="Where environments are kept.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(LIBRARIES))
    given = parser.parse_args()
    rows = []
    for library in given.only:
        needs, kinds = LIBRARIES[library]
        python = environment(given.cache, library, *COMMON, *needs)
        version = versions_in(python, library)[library]
        for kind in kinds:
            done = run_in(python, __file__, library, kind, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            last = done.stderr.strip().splitlines()[-1:] or ["it ended without a word"]
            found = json.loads(lines[-1]) if lines else {"step": "start", "failed": last[0][:160]}
            rows.append({"library": library, "version": version, "kind": kind, **found})
            print(json.dumps(rows[-1]), flush=True)
    content = {**provenance("cpu"), "bases": rows}
    given.output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in LIBRARIES:
        warnings.simplefilter("ignore")
        print(json.dumps(judge(*sys.argv[1:])))
    else:
        main()
