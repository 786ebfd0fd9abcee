"""The plug-ins of msplora.integrations, in the trainers that they are for, on a real small model.

    python benchmarks/plugins.py --cache .environments --model stories260K/hf \
        --data instruction-data.json --output benchmarks/results/plugins.json

Each trainer is run as its users run it, by its own commands, in an environment of its own on the
CPU: train, go on from a checkpoint, merge. What it leaves is then read here, with PEFT.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from environments import environment, run_in, versions_in
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import msplora.integrations
from msplora.bench.provenance import commit, provenance

STEPS, HALFWAY, RATE = 20, 10, 1e-2
# As docs/compatibility.md shows them.
AXOLOTL_BLOCK = {
    "plugins": ["msplora.integrations.axolotl.MSPLoRAPlugin"],
    "adapter": "msplora",
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_target_modules": ["q_proj", "v_proj"],
    "msplora": {"split_alpha": True},
}
SWIFT_OPTIONS = {
    "--tuner_type": "msplora",
    "--lora_rank": "8",
    "--lora_alpha": "16",
    "--target_modules": "q_proj v_proj",
}
AXOLOTL, SWIFT = "axolotl==0.19.0", "ms-swift==4.6.0"
# What Axolotl names but for kernels of GPUs and clients of clouds, in the versions that it names.
AXOLOTL_NEEDS = (
    "peft==0.20.0", "transformers==5.16.1", "trl==1.9.0", "accelerate==1.13.0",
    "datasets==4.8.4", "huggingface_hub==1.17.0", "tokenizers==0.23.1", "hf_xet==1.4.3",
    "packaging==26.0", "kernels<0.17.0,>=0.16.0", "trackio==0.19.0", "typing-extensions==4.15.0",
    "hf_transfer", "sentencepiece", "pydantic==2.12.5", "addict", "fire", "PyYAML==6.0.3",
    "requests", "wandb", "einops", "colorama", "numba<1.0,>=0.63.1", "numpy<3.0,>=2.1",
    "typer==0.25.1", "evaluate==0.4.1", "scipy", "nvidia-ml-py==12.560.30", "art", "tensorboard",
    "python-dotenv==1.0.1", "s3fs==2025.10.0", "zstandard==0.22.0", "fastcore",
    "lm_eval==0.4.11", "langdetect==1.0.9", "immutabledict==4.2.0",
    "antlr4-python3-runtime==4.13.2", "schedulefree==1.4.1", "axolotl-contribs-lgpl==0.0.7",
    "axolotl-contribs-mit==0.0.6", "posthog==6.7.11", "mistral-common==1.11.5",
    "bitsandbytes==0.50.2", "torchao==0.17.0", "liger-kernel==0.8.1", "optimum==1.16.2",
    "gradio==6.10.0",
)  # fmt: skip


def axolotl(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Axolotl's own commands, with `adapter: msplora` in its YAML file."""
    python = environment(given.cache, "axolotl", *AXOLOTL_NEEDS, without_theirs=(AXOLOTL,))
    common = {
        "base_model": str(given.model),
        **AXOLOTL_BLOCK,
        "special_tokens": {"pad_token": "</s>"},
        "datasets": [{"path": str(given.rows), "ds_type": "json", "type": "alpaca"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "val_set_size": 0,
        "sequence_len": 256,
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "save_steps": HALFWAY,
        "logging_steps": 1,
        "learning_rate": RATE,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "seed": 0,
    }

    def call(verb: str, name: str, **changes: Any) -> None:
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**common, "output_dir": str(folder / name), **changes}))
        run_in(python, "-m", f"axolotl.cli.{verb}", str(file), more=_QUIET)

    call("train", "straight")
    halfway = folder / "straight" / f"checkpoint-{HALFWAY}"
    call("train", "resumed", resume_from_checkpoint=str(halfway))
    call("merge_lora", "straight", merge_method="legacy", lora_model_dir=str(folder / "straight"))
    return {
        "trainer": "axolotl",
        "versions": versions_in(python, "axolotl", "torch", "transformers", "peft", "trl"),
        **judged(given.model, folder / "straight", folder / "resumed", folder / "straight/merged"),
        "refused": refusals(python, folder / "straight.yaml"),
    }


REFUSED = {
    "load_in_4bit": {"load_in_4bit": True},
    "lora_qkv_kernel": {"lora_qkv_kernel": True},
    "merge-lora": {"merge_lora": True, "merge_method": "memory_efficient"},
}
_QUIET = {"AXOLOTL_DO_NOT_TRACK": "1"}
"""Without a network its telemetry may wait for ever."""

# Axolotl's reading of a config, as each of its commands begins.
_READING = """
import json, sys
from axolotl.cli.config import load_cfg
from msplora.errors import ConfigError
said = {}
for name, changes in json.loads(sys.argv[2]).items():
    try:
        load_cfg(sys.argv[1], **changes)
        said[name] = "not refused"
    except ConfigError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


def refusals(python: Path, config: Path) -> dict[str, str]:
    """What the plug-in says to options that Axolotl would ignore or misapply."""
    done = run_in(python, "-c", _READING, str(config), json.dumps(REFUSED), more=_QUIET)
    # Libraries print there, too.
    (said,) = (line for line in done.stdout.splitlines() if line.startswith("{"))
    return json.loads(said)


def swift(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """ms-swift's own commands, with `--external_plugins` and `--tuner_type msplora`."""
    python = environment(given.cache, "ms-swift", SWIFT)
    plugin = Path(*msplora.integrations.__path__) / "ms_swift.py"
    chosen = ["--external_plugins", str(plugin), "--tuner_type", SWIFT_OPTIONS["--tuner_type"]]
    asked = [word for option in SWIFT_OPTIONS.items() for part in option for word in part.split()]
    common = [
        "--model", str(given.model), "--model_type", "llama", "--template", "default",
        "--dataset", str(given.rows), *chosen[:2], *asked,
        "--torch_dtype", "float32", "--use_cpu", "true",
        "--bf16", "false", "--fp16", "false", "--max_length", "256", "--max_steps", str(STEPS),
        "--save_steps", str(HALFWAY), "--logging_steps", "1", "--learning_rate", str(RATE),
        "--lr_scheduler_type", "constant", "--per_device_train_batch_size", "8",
        "--gradient_accumulation_steps", "1", "--split_dataset_ratio", "0", "--seed", "0",
        "--add_version", "false", "--gradient_checkpointing", "false", "--report_to", "none",
    ]  # fmt: skip
    run_in(python, "-m", "swift.cli.sft", *common, "--output_dir", str(folder / "straight"))
    halfway = folder / "straight" / f"checkpoint-{HALFWAY}"
    run_in(
        python, "-m", "swift.cli.sft", *common, "--output_dir", str(folder / "resumed"),
        "--resume_from_checkpoint", str(halfway),
    )  # fmt: skip
    last = folder / "straight" / f"checkpoint-{STEPS}"
    run_in(
        python, "-m", "swift.cli.export", "--adapters", str(last), *chosen,
        "--merge_lora", "true", "--output_dir", str(folder / "merged"),
    )  # fmt: skip
    resumed = folder / "resumed" / f"checkpoint-{STEPS}"
    return {
        "trainer": "ms-swift",
        "versions": versions_in(python, "ms-swift", "torch", "transformers", "peft", "trl"),
        **judged(given.model, last, resumed, folder / "merged"),
    }


def judged(base: Path, adapter: Path, resumed: Path, merged: Path) -> dict[str, Any]:
    """What a trainer left: the adapter, the one that was resumed, and the merged model."""
    state = max(adapter.rglob("trainer_state.json"), key=lambda file: file.stat().st_mtime)
    losses = [its["loss"] for its in json.loads(state.read_text())["log_history"] if "loss" in its]
    model = PeftModel.from_pretrained(_load(base), str(adapter)).eval()
    plan = msplora.plan(model, model.peft_config["default"])
    tensors, again = (_tensors(folder) for folder in (adapter, resumed))
    ids = torch.randint(3, 512, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        found = _load(merged)(input_ids=ids).logits
        before = _load(base)(input_ids=ids).logits
    return {
        "steps": STEPS,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "parameters": sum(its.numel() for its in tensors.values()),
        "planned": plan.parameters,
        "levels_that_learnt": sorted(
            {
                address.partition("/")[0]
                for address, (_, b, _) in msplora.factors(model).items()
                if bool(b.any())
            }
        ),
        "moved": (expected - before).abs().max().item(),
        "resumed_differs_by": max(
            (tensors[key] - again[key]).abs().max().item() for key in tensors
        ),
        "merged_differs_by": (found - expected).abs().max().item(),
    }


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def main() -> None:
    """Run the trainers and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="Where environments are kept.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="Rows in alpaca form.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=["axolotl", "ms-swift"])
    given = parser.parse_args()
    hosts: dict[str, Callable[..., dict[str, Any]]] = {"axolotl": axolotl, "ms-swift": swift}
    before = json.loads(given.output.read_text()) if given.output.is_file() else {"trainers": []}
    rows = {its["trainer"]: its for its in before["trainers"]}
    for name in given.only:
        with tempfile.TemporaryDirectory() as folder:
            given.rows = Path(folder) / "rows.jsonl"
            with given.rows.open("w") as file:
                for row in json.loads(given.data.read_text())[: STEPS * 8]:
                    file.write(json.dumps(row) + "\n")
            rows[name] = {**hosts[name](given, Path(folder)), "commit": commit()}
        print(json.dumps(rows[name], indent=1), flush=True)
    content = {**provenance("cpu"), "trainers": [rows[name] for name in hosts if name in rows]}
    given.output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
