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
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers

import msplora
from page_links import broken_links
from runs import msplora as msplora_command
from tiny import VOCABULARY, llama

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
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
    (row,) = blocks("json")
    (tmp_path / "train.jsonl").write_text(row * 8)
    examples = tmp_path / "examples"
    examples.mkdir()
    for file in (ROOT / "examples").glob("*.yaml"):
        (examples / file.name).write_text(file.read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_python_blocks_run_in_order(workspace: Path) -> None:
    (reload,) = (block for block in blocks("python") if 'from_pretrained("out' in block)
    script = "\n".join(block for block in blocks("python") if block != reload)
    # A short run on any machine: three steps instead of three epochs, and no GPU.
    assert 'SFTConfig("out", learning_rate=3e-4)' in script
    script = script.replace(
        'SFTConfig("out", ', 'SFTConfig("out", max_steps=3, report_to="none", use_cpu=True, '
    )
    # The reload is a program of its own, as it will be: nothing has imported msplora before.
    for program in (script, reload):
        subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=500)
    assert (workspace / "out/lora/adapter_config.json").is_file()


def test_the_step_from_a_lora_script() -> None:
    (change,) = blocks("diff")
    lines = change.splitlines()
    assert {line[0] for line in lines} == {"+", "-"}
    before, after = (
        "\n".join(line[1:] for line in lines if line[0] == sign) for sign in ("-", "+")
    )
    was: dict[str, Any] = {"LoraConfig": LoraConfig}
    now: dict[str, Any] = {}
    exec(before, was)
    exec(after, now)
    assert isinstance(now["config"], msplora.MSPLoraConfig)
    for kept in ("r", "lora_alpha", "target_modules"):
        assert getattr(now["config"], kept) == getattr(was["config"], kept)
    assert now["config"].split_alpha


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
        if arguments[0] == "train":  # only what makes it short
            arguments += ["--set", "training.max_steps=2", "--set", "training.batch_size=2"]
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


def plan_of(layers: int, rank: int) -> msplora.Plan:
    config = hf.LlamaConfig(architectures=["LlamaForCausalLM"], num_hidden_layers=layers)
    adapted = msplora.MSPLoraConfig(r=rank, target_modules=["q_proj", "v_proj"])
    return msplora.plan(config, adapted)


@pytest.mark.parametrize("layers", [3, 4, 10, 12, 32])
def test_the_size_is_that_of_the_formula(layers: int) -> None:
    assert "LoRA's × (2.5 / layers + 0.25), from 3 layers on" in README
    found = plan_of(layers, 8)
    assert found.parameters / found.lora_parameters == pytest.approx(2.5 / layers + 0.25)
    assert (found.parameters * 2 <= found.lora_parameters) == (layers >= 10)  # "half … at 10"


@pytest.mark.parametrize(("layers", "rank"), [(12, 18), (32, 24)])
def test_the_ranks_that_give_loras_size(layers: int, rank: int) -> None:
    share = 100 * plan_of(layers, rank).parameters / plan_of(layers, 8).lora_parameters
    assert re.search(rf"r = {rank} at {layers}( layers)? \({share:.0f} %", " ".join(README.split()))


def test_the_shares_of_few_layers() -> None:
    shares = [
        found.parameters / found.lora_parameters for found in (plan_of(n, 8) for n in (1, 2, 3))
    ]
    one, two, three = (f"{share:.0%}".replace("%", " %") for share in shares)
    text = " ".join(README.split())
    assert f"({one} at 1 layer, {two} at 2, {three} at 3)" in text


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
    named = set(re.findall(r"(\w+)\.py\b", CONTRIBUTING.partition("## Map")[2]))
    package = Path(msplora.__file__).parent
    there = {file.stem for file in package.glob("*.py")}
    missing = there - named - {"__init__", "__main__", "plan_text", "errors"}
    assert not missing
    assert not {name for name in named if not (package / f"{name}.py").exists()}


@pytest.mark.parametrize(
    "page",
    ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs/results.md"],
)
def test_the_links_lead_somewhere(page: str) -> None:
    assert broken_links(ROOT / page) == []
