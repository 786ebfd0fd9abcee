"""The demo: the same training run with a pyramid and with plain LoRA, side by side."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console

import msplora
from msplora.errors import MSPLoraError
from msplora.loading import WEIGHTS_FILE, write_json
from msplora.train.held_out_loss import held_out_loss
from msplora.train.quiet import quiet_libraries
from msplora.train.run import train_run
from msplora.train.saved_run import SavedRun, open_run
from msplora.train.settings import Settings
from msplora.train.settings_file import make_settings, write_settings
from msplora.train.tokenise_sft import Tokens
from msplora.versions import versions

from . import MODEL_FOLDER
from .show import Measured, draw, markdown, table
from .task import Example, exact_match, rows, split, write

TRAINING_ROWS = 6400
LEARNING_RATE = 3e-3
"""Picked from three: docs/decisions.md."""
METHODS = {"lora": "LoRA", "msplora": "pyramid"}
MARKER = ".msplora-demo"
"""The file that says that a folder is a demo's, and may be replaced by another."""
_SHOWN = 3


def run_demo(out: Path, max_steps: int | None = None, console: Console | None = None) -> None:
    """Adapt the demo's model to a task it cannot do, and leave everything in the folder `out`.

    Args:
        out: a new folder, an empty one, or that of an earlier demo, which is replaced.
        max_steps: stop each run early, for a quick try of the machinery.
        console: where to print.

    Raises:
        MSPLoraError: `out` holds something else.
    """
    console = console or Console()
    started = time.perf_counter()
    _make_folder(out)
    training, held_out = split(TRAINING_ROWS)
    _write_rows(training, out / "train.jsonl")
    _write_rows(held_out, out / "held_out.jsonl")
    console.print(
        "A small language model, pretrained on stories and word games, has never seen a list "
        f"reversed:\n\n  {held_out[0].prompt} [green]{held_out[0].answer}[/]\n\n"
        f"Plain LoRA and a pyramid now learn it from {TRAINING_ROWS:,} examples.",
        highlight=False,
    )
    measured: list[Measured] = []
    histories: dict[str, list[dict[str, Any]]] = {}
    answers: dict[str, list[str]] = {}
    for method, name in METHODS.items():
        settings = _settings(out, method, max_steps)
        write_settings(settings, out / f"{method}.yaml")
        run = train_run(settings, console=console)
        history = json.loads((run / "log_history.json").read_text(encoding="utf-8"))
        histories[name] = history
        with quiet_libraries():
            reloaded = open_run(run)
            if not measured:
                with reloaded.model.disable_adapter():
                    measured.append(_measure(reloaded.model, reloaded, "base model", held_out))
                    answers["base model"] = _answers(reloaded.model, reloaded, held_out)
            trained = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["trainable"]
            measured.append(
                _measure(reloaded.model, reloaded, name, held_out, trained, run / "adapter")
            )
            answers[name] = _answers(reloaded.model, reloaded, held_out)
    converted = out / "converted-lora"
    with quiet_libraries():
        proof = msplora.to_lora(out / "msplora", converted)
        # A plain LoRA on a fresh base: what a server that has never heard of pyramids loads.
        fresh = open_run(out / "msplora")
        plain = PeftModel.from_pretrained(fresh.model.unload(), str(converted)).eval()
        measured.append(_measure(plain, fresh, "pyramid as LoRA", held_out, folder=converted))
    console.rule("What came of it")
    console.print(table(measured))
    console.print(f"The converted LoRA: {proof.comparison}.", highlight=False, soft_wrap=True)
    seconds = round(time.perf_counter() - started)
    examples = [
        (example, {name: its[place] for name, its in answers.items()})
        for place, example in enumerate(held_out[:_SHOWN])
    ]
    (out / "README.md").write_text(markdown(measured, examples), encoding="utf-8")
    draw(histories, measured, out / "comparison.png")
    write_json(
        out / "comparison.json",
        {
            "models": [asdict(row) for row in measured],
            "versions": versions(),
            "processors": os.cpu_count(),
            "seconds": seconds,
        },
    )
    _what_to_look_at(out, held_out[0], seconds, console)


def _make_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise MSPLoraError(f"the demo's output {str(out)!r} is a file; name a folder.")
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise MSPLoraError(
                f"{str(out)!r} is not empty, and is not an earlier demo, which would be replaced. "
                f"Name another folder with --output."
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("Written by `msplora demo`, which may replace this folder.\n")


def _write_rows(examples: Sequence[Example], file: Path) -> None:
    lines = [
        json.dumps({"prompt": example.prompt, "completion": f" {example.answer}"})
        for example in examples
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _settings(out: Path, method: str, max_steps: int | None) -> Settings:
    """Alike for both methods but for the method's name."""
    content = {
        "model": str(MODEL_FOLDER),
        "task": "sft",
        "output": str(out / method),
        "method": method,
        "seed": 0,
        "data": {
            "train": str(out / "train.jsonl"),
            "validation": str(out / "held_out.jsonl"),
        },
        "adapter": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "training": {
            "epochs": 3,
            "max_steps": max_steps,
            "batch_size": 64,
            "eval_batch_size": 250,
            "learning_rate": LEARNING_RATE,
            "logging_steps": 5,
        },
    }
    return make_settings(content, "the demo's settings")


def _measure(
    model: Any,
    run: SavedRun,
    name: str,
    examples: Sequence[Example],
    trainable: int | None = None,
    folder: Path | None = None,
) -> Measured:
    tokenizer = run.base.tokenizer
    encoded = rows(examples, tokenizer)
    tokens = [Tokens("", row["input_ids"], row["labels"]) for row in encoded]
    loss = held_out_loss(model, tokens, tokenizer.pad_token_id, batch_size=250)["loss"]
    size = (folder / WEIGHTS_FILE).stat().st_size if folder else None
    return Measured(name, exact_match(model, encoded), loss, trainable, size)


def _answers(model: Any, run: SavedRun, examples: Sequence[Example]) -> list[str]:
    return [write(model, run.base.tokenizer, its.prompt) for its in examples[:_SHOWN]]


def _what_to_look_at(out: Path, example: Example, seconds: int, console: Console) -> None:
    console.print(f"\nDone in {seconds} seconds. In {out}:", highlight=False, soft_wrap=True)
    for name, what in (
        ("README.md", "this table, and answers of each model"),
        ("comparison.png", "the loss of both methods, and what each model gets right"),
        ("msplora/plan.txt", "the pyramid: who shares with whom"),
        ("msplora/README.md", "the model card that every run gets"),
        ("converted-lora/", "the pyramid as a plain LoRA, for PEFT or any server"),
        ("msplora.yaml", "the run's settings; change them and train again"),
    ):
        console.print(f"  {name:18} {what}", markup=False, highlight=False)
    again = out / "msplora.yaml", out.with_name(f"{out.name}-again")
    console.print("\nGo on with:")
    for command in (
        f'msplora generate {out / "msplora"} --prompt "{example.prompt}"',
        f"msplora eval {out / 'msplora'}",
        f"msplora train {again[0]} --set training.epochs=1 --output {again[1]}",
    ):
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)
