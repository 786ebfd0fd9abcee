"""What the README shows is run, and its numbers are those of the plan and of the result files."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

import msplora
from runs import msplora as msplora_command
from tiny import VOCABULARY, llama

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_ID = "Qwen/Qwen3-0.6B"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the README's model id and files exist."""
    words = {"<unk>": 0, "</s>": 1} | {f"w{place}": place + 2 for place in range(VOCABULARY - 2)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    folder = tmp_path / HUB_ID
    llama(layers=3, eos_token_id=1, bos_token_id=1).save_pretrained(folder)  # pyright: ignore
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    ).save_pretrained(folder)
    row = json.dumps({"prompt": "w1 w2 w3", "completion": " w4 w5"})
    (tmp_path / "train.jsonl").write_text("\n".join([row] * 8))
    examples = tmp_path / "examples"
    examples.mkdir()
    for file in (ROOT / "examples").glob("*.yaml"):
        (examples / file.name).write_text(file.read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_python_blocks_run_in_order(workspace: Path) -> None:
    script = "\n".join(blocks("python"))
    # A short run on any machine: three steps instead of three epochs, and no GPU.
    assert 'SFTConfig("out")' in script
    script = script.replace(
        'SFTConfig("out")', 'SFTConfig("out", max_steps=3, report_to="none", use_cpu=True)'
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=500)
    assert (workspace / "out/lora/adapter_config.json").is_file()


@pytest.mark.slow
def test_the_commands_run_in_order(workspace: Path) -> None:
    commands = [
        line.partition("#")[0].strip()
        for block in blocks("sh")
        for line in block.splitlines()
        if line.startswith("msplora")
    ]
    assert len(commands) == 8
    for command in commands:
        arguments = re.findall(r'"[^"]*"|\S+', command)[1:]
        arguments = [argument.strip('"') for argument in arguments]
        if arguments[0] == "train":
            arguments += ["--set", f"model={HUB_ID}", "--set", "data.train=train.jsonl"]
            arguments += ["--set", "training.max_steps=2", "--output", "out/run"]
            arguments += ["--set", "training.batch_size=2"]
        done = msplora_command(*arguments)
        assert done.code == 0, done.err
    assert (workspace / "out/merged/config.json").is_file()
    assert (workspace / "out/pyramid/adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("name", "model_config", "rank"),
    [
        ("RoBERTa-base", hf.RobertaConfig(architectures=["RobertaForSequenceClassification"]), 8),
        (
            "T5-base",
            hf.T5Config(
                d_model=768,
                d_ff=3072,
                num_layers=12,
                num_heads=12,
                architectures=["T5ForConditionalGeneration"],
            ),
            8,
        ),
        ("Llama-2-7B", hf.LlamaConfig(architectures=["LlamaForCausalLM"]), 8),
        ("Llama-2-7B", hf.LlamaConfig(architectures=["LlamaForCausalLM"]), 64),
    ],
)
def test_the_parameter_table(name: str, model_config: Any, rank: int) -> None:
    row = re.search(rf"\| {name}, r = {rank} \| (.*?) \|(.*?)\|(.*?)\|(.*?)\|", README)
    assert row is not None
    targets, lora, pyramid, share = (cell.strip() for cell in row.groups())
    found = msplora.plan(
        model_config,
        msplora.MSPLoraConfig(
            r=rank,
            target_modules=targets if targets == "all-linear" else targets.split(", "),
        ),
    )
    assert lora == f"{found.lora_parameters:,}"
    assert pyramid == f"{found.parameters:,}"
    assert share == f"{found.parameters / found.lora_parameters:.1%}"


def test_the_mrpc_table_is_that_of_the_result_file() -> None:
    accuracies: dict[tuple[str, float], list[float]] = defaultdict(list)
    with (ROOT / "benchmarks/results/mrpc-minilm.jsonl").open() as file:
        for line in file:
            row = json.loads(line)
            accuracies[row["name"], row["learning_rate"]].append(row["accuracy"])
    methods = {"lora": "LoRA"} | {name: name for name in ("pyramid", "pyramid, split alpha")}
    for name, shown in methods.items():
        cells = [
            f"{statistics.mean(found):.3f} ({min(found):.3f} to {max(found):.3f})"
            for found in (accuracies[name, rate] for rate in (1e-4, 3e-4, 1e-3, 3e-3))
        ]
        assert re.search(
            re.escape(f"| {shown} |") + r" [\d,]+ \| " + re.escape(" | ".join(cells)), README
        )


def test_the_map_names_what_there_is() -> None:
    named = set(re.findall(r"(\w+)\.py\b", README.partition("## Map")[2]))
    package = Path(msplora.__file__).parent
    there = {file.stem for file in package.glob("*.py")}
    missing = there - named - {"__init__", "__main__", "plan_text", "errors"}
    assert not missing
    assert not {name for name in named if not (package / f"{name}.py").exists()}
