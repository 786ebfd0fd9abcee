"""Converted adapters in the engines that read them: their logits beside the native adapter's.

Each engine runs in its own environment, given by its Python:

    python benchmarks/engines.py --model stories260K/hf --output benchmarks/results/engines.jsonl \
        --engine peft=.venv/bin/python --engine llama.cpp=PYTHON --llama-cpp SOURCE \
        --engine mlx-lm=PYTHON --engine vllm=PYTHON --engine sglang=PYTHON
    python benchmarks/engines.py --render docs/serving.md

SOURCE is llama.cpp's source, whose own converter makes the bases' GGUF files (llama-cpp-python's
source package has it as vendor/llama.cpp). What each engine runs is in engine_runs/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

RUNS = Path(__file__).parent / "engine_runs"
RESULTS = Path(__file__).parent / "results" / "engines.jsonl"


@dataclass(frozen=True)
class Engine:
    """How an engine is run, and what it reads."""

    title: str
    script: str
    form: str
    server: str | None
    families: bool = False
    """Whether tiny models of other families are run, too."""
    without: tuple[str, ...] = ()
    """Of those, the ones that it has no code of its own for."""
    head: int = 16
    """The size of those models' attention heads. Where stories260K's, 8, are too small for an
    engine, the tiny Llama stands in its place."""
    takes_stories: bool = True


ENGINES = {
    "peft": Engine("PEFT without msplora", "peft_alone.py", "lora", None),
    "llama.cpp": Engine("llama.cpp", "llama_cpp_python.py", "gguf", "llama.cpp", families=True),
    "mlx-lm": Engine("mlx-lm", "mlx_lm_loader.py", "mlx", "mlx", families=True),
    "vllm": Engine(
        "vLLM",
        "vllm_engine.py",
        "lora",
        "vllm",
        families=True,
        without=("Olmo2", "SmolLM3", "Starcoder2"),
        head=32,
        takes_stories=False,
    ),
    "sglang": Engine("SGLang", "sglang_loader.py", "lora", "sglang"),
}


@dataclass(frozen=True)
class Case:
    """One adapter of one base."""

    base: str
    """The model's name in the results."""
    adapted: str
    targets: Any = "all-linear"
    options: dict[str, Any] = field(default_factory=dict)
    """Of `MSPLoraConfig`."""
    convert: dict[str, Any] = field(default_factory=dict)
    """Of `msplora.to_lora`."""


STORIES = [
    Case("stories260K", "all linear layers"),
    Case("stories260K", "q, v; padded to 16", ["q_proj", "v_proj"], convert={"pad_to": "pow2"}),
    Case(
        "stories260K",
        "k, up of layers 1 and 3; holes filled",
        ["k_proj", "up_proj"],
        {"layers_to_transform": [1, 3]},
    ),
]
HEAD = Case("tiny Llama", "q and the head", ["q_proj", "lm_head"])
_SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# transformers' name of a family -> what its config needs besides the shape.
FAMILIES: dict[str, dict[str, Any]] = {
    "Gemma": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "Gemma3": {"head_dim": 16, "query_pre_attn_scalar": 16, "num_hidden_layers": 6},
    "Granite": {"logits_scaling": 2.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Olmo2": {},
    "Phi3": {"num_key_value_heads": 4},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "SmolLM3": {},
    "Starcoder2": {},
}


def config_of(family: str, head: int = 16) -> Any:
    """The config of a tiny model of a family, with attention heads of a size."""
    import transformers

    config_name = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    shape = _SHAPE | {"hidden_size": head * _SHAPE["num_attention_heads"]} | FAMILIES[family]
    sized = {name: head for name in ("head_dim", "query_pre_attn_scalar") if name in shape}
    return getattr(transformers, config_name)(**(shape | sized))


def save_family(name: str, folder: Path, head: int) -> None:
    """Save a tiny model of a family with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(name, head))
    with torch.no_grad():  # logits of some size, and norms that are not all the same
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.float().save_pretrained(folder)
    # mlx-lm reads rope_theta where most checkpoints have it, and transformers 5 puts it elsewhere.
    content = json.loads((folder / "config.json").read_text())
    if "rope_theta" in content.get("rope_parameters", {}):
        content["rope_theta"] = content["rope_parameters"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(content))
    # llama.cpp's converter of Gemma 3 counts the words of a tokenizer.
    words = {str(number): number for number in range(_SHAPE["vocab_size"])}
    tokenizer = {"model": {"vocab": words}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def save_adapter(case: Case, base: Path, folder: Path) -> None:
    """Save an adapter with random pairs, which moves the logits by some units."""
    import torch
    import transformers
    from peft import get_peft_model

    import msplora

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = msplora.MSPLoraConfig(
        r=8, lora_alpha=4, target_modules=case.targets, init_lora_weights=False,
        task_type="CAUSAL_LM", **case.options,
    )  # fmt: skip
    torch.manual_seed(1)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for _, b, _ in msplora.factors(adapted).values():
            b.mul_(0.3)
    adapted.save_pretrained(folder)


def token_ids(base: Path) -> list[int]:
    """Thirty tokens, none of them special."""
    import torch

    size = json.loads((base / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(2)
    return torch.randint(5, size, (30,), generator=generator).tolist()


def native(base: Path, adapter: Path, ids: list[int]) -> dict[str, Any]:
    """The logits of the base and of the pyramid on it, in float32."""
    import torch

    from msplora.adapted import load_adapted
    from msplora.loading import BaseOptions

    model = load_adapted(adapter, BaseOptions(str(base), "float32"))
    with torch.inference_mode():
        adapted = model(input_ids=torch.tensor([ids])).logits[0].numpy()
        with model.disable_adapter():
            plain = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    return {"base": plain, "adapted": adapted}


@dataclass(frozen=True)
class Prepared:
    """A case with its files."""

    case: Case
    folder: Path
    base: Path
    ids: list[int]
    rank: int
    expected: dict[str, Any]

    def asked(self, engine: Engine) -> dict[str, Any]:
        """What the engine is given."""
        gguf = engine.form == "gguf"
        return {
            "base": str(self.folder / "base.gguf" if gguf else self.base),
            "adapter": str(self.folder / "converted" / ("adapter.gguf" if gguf else "")),
            "ids": self.ids,
            "out": str(self.folder / "logits.npz"),
        }


def prepare(engine: Engine, case: Case, base: Path, folder: Path) -> Prepared:
    """Save an adapter, compute its logits, and convert it."""
    import msplora

    adapter = folder / "adapter"
    save_adapter(case, base, adapter)
    ids = token_ids(base)
    expected = native(base, adapter, ids)
    converted = msplora.to_lora(
        adapter, folder / "converted", form=engine.form, server=engine.server, **case.convert
    )
    if engine.form == "gguf":
        msplora.to_lora(adapter, folder / "lora", verify=False, **case.convert)
    return Prepared(case, folder, base, ids, converted.rank, expected)


def run(
    engine: Engine, python: str, prepared: list[Prepared], scratch: Path, llama_cpp: Path | None
) -> Iterator[dict[str, Any]]:
    """Let an engine compute all its cases, and compare."""
    import numpy as np

    if engine.form == "gguf":
        if llama_cpp is None:
            raise SystemExit("--llama-cpp SOURCE is needed: its converter makes the bases' files")
        cases = [
            {
                "base": str(its.base),
                "base_out": str(its.folder / "base.gguf"),
                "lora": str(its.folder / "lora"),
                "lora_out": str(its.folder / "its.gguf"),
            }
            for its in prepared
        ]
        (scratch / "bases.json").write_text(json.dumps(cases))
        script = str(RUNS / "llama_cpp_convert.py")
        _call([sys.executable, script, str(llama_cpp), str(scratch / "bases.json")])
    (scratch / "cases.json").write_text(json.dumps([its.asked(engine) for its in prepared]))
    printed = _call([python, str(RUNS / engine.script), str(scratch / "cases.json")])
    about = json.loads(printed.splitlines()[-1])
    for its in prepared:
        found = np.load(its.folder / "logits.npz")
        adapted, plain = its.expected["adapted"], its.expected["base"]
        row = {
            "engine": engine.title,
            "model": its.case.base,
            "adapted": its.case.adapted,
            "rank": its.rank,
            "tokens": len(its.ids),
            "largest_logit": float(abs(adapted).max()),
            "effect": float(abs(adapted - plain).max()),
            "base_difference": float(abs(found["base"] - plain).max()),
            "difference": float(abs(found["adapted"] - adapted).max()),
        }
        if engine.form == "gguf":
            row["as_its_converter"] = _same_tensors(
                its.folder / "its.gguf", its.folder / "converted" / "adapter.gguf"
            )
        yield row | about


def _same_tensors(first: Path, second: Path) -> bool:
    """Whether two GGUF files hold the same tensors, bit for bit."""
    import gguf
    import numpy as np

    one, other = (
        {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
        for file in (first, second)
    )
    return one.keys() == other.keys() and all(
        np.array_equal(data, other[name]) for name, data in one.items()
    )


def _call(command: list[str]) -> str:
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{ended.stderr[-3000:]}")
    return ended.stdout


def cases_of(engine: Engine, families: list[str]) -> list[Case]:
    """What an engine is given."""
    own = STORIES if engine.takes_stories else [replace(its, base="tiny Llama") for its in STORIES]
    if not engine.families:
        return own
    left = [family for family in families if family not in engine.without]
    others = [Case(f"tiny {family}", "all linear layers") for family in left]
    return [*own, *(case for case in others if case not in own), HEAD]


def main() -> None:
    """Run what is asked for; an engine's rows take the place of those it had."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="the folder of stories260K")
    parser.add_argument("--engine", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--llama-cpp", type=Path, metavar="SOURCE")
    parser.add_argument("--family", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--render", type=Path, metavar="PAGE", help="put the table into a page")
    asked = parser.parse_args()
    if asked.render:
        asked.render.write_text(rendered(asked.render.read_text("utf-8")), encoding="utf-8")
        return
    from msplora.bench.provenance import provenance

    about = provenance("cpu")  # before the results change what is tracked
    pythons = dict(word.split("=", 1) for word in asked.engine)
    for name in ENGINES.keys() - pythons.keys():
        print(f"{ENGINES[name].title}: not run, since no --engine {name}=PYTHON is given")
    for name, python in pythons.items():
        engine = ENGINES[name]
        cases = cases_of(engine, asked.family)
        with tempfile.TemporaryDirectory() as scratch:
            prepared = []
            for number, case in enumerate(cases):
                folder = Path(scratch) / str(number)
                base = asked.model
                if case not in STORIES:
                    base = folder / "base"
                    save_family(case.base.removeprefix("tiny "), base, engine.head)
                prepared.append(prepare(engine, case, base, folder))
            rows = []
            for row in run(engine, python, prepared, Path(scratch), asked.llama_cpp):
                print(json.dumps(row), flush=True)
                rows.append(row | about)
        if asked.output:
            replace_rows(asked.output, engine, rows)


def replace_rows(results: Path, engine: Engine, rows: list[dict[str, Any]]) -> None:
    """Write an engine's rows among those of the others, in the table's order."""
    lines = results.read_text("utf-8").splitlines() if results.is_file() else []
    others = [row for row in map(json.loads, lines) if row["engine"] != engine.title]
    titles = [its.title for its in ENGINES.values()]
    ordered = sorted([*others, *rows], key=lambda row: titles.index(row["engine"]))
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in ordered)
    results.write_text(text, encoding="utf-8")


START, END = "<!-- engines: made by benchmarks/engines.py --render -->", "<!-- /engines -->"


def rendered(page: str) -> str:
    """The page with the table of the results between its two marks."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{table()}\n\n{END}{after}"


def table(results: Path = RESULTS) -> str:
    """One line per engine: its version, what was run, on how many adapters, and the worst."""
    rows = [json.loads(line) for line in results.read_text("utf-8").splitlines()]
    lines = [
        "| engine | version | what was run | adapters | largest difference | of the base alone | "
        "they move logits by |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for engine in ENGINES.values():
        mine = [row for row in rows if row["engine"] == engine.title]
        if not mine:
            continue
        (ran,) = {row["ran"] for row in mine}
        (versions,) = {
            ", ".join(f"{name} {version}" for name, version in row["engine_versions"].items())
            for row in mine
        }
        worst, base = (max(row[key] for row in mine) for key in ("difference", "base_difference"))
        least = min(row["effect"] for row in mine)
        lines.append(
            f"| {engine.title} | {versions} | {ran} | {len(mine)} | {worst:.1e} | "
            f"{base:.1e} | {least:.1f} or more |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
