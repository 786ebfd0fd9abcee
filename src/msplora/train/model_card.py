"""The model card of a run: what it is, the numbers it reached, and how to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msplora.conversion_card import on_autoload

from .data_sources import named_sources
from .devices import world_size
from .methods import Adapted
from .next_steps import next_steps
from .settings import Settings


def model_card(
    settings: Settings,
    adapted: Adapted,
    metrics: dict[str, Any],
    versions: dict[str, str],
    run: Path,
    saved: int | None = None,
) -> str:
    """Return README.md, for the run folder and for the folder of the weights.

    Args:
        settings: of the run.
        adapted: what it trained; its numbers are counted at the start.
        metrics: the content of metrics.json.
        versions: of what it was made with.
        run: its folder.
        saved: the numbers of the saved adapter, where they are others than at the start.
    """
    trainable = adapted.trainable
    has_adapter = adapted.rank is not None
    lines = [
        "---",
        # The hub takes its own names only, and a path is nobody else's business.
        *([] if Path(settings.model).exists() else [f"base_model: {settings.model}"]),
        f"library_name: {'peft' if has_adapter else 'transformers'}",
        f"pipeline_tag: {_pipeline(settings)}",
        f"tags: [{settings.method}, {settings.task}]",
        "---",
        "",
        f"# {run.name}",
        "",
        f"{Path(settings.model).name}, fine-tuned with `{settings.method}` for {_data(settings)}.",
        *_start(settings),
        "",
        "| | numbers |",
        "|---|---|",
        f"| base | {trainable.base:,} |",
        *_adapter_rows(adapted, saved),
        f"| head | {trainable.head:,} |",
    ]
    if adapted.plan and trainable.lora:
        lines.append(f"| plain LoRA of the same r, for comparison | {trainable.lora:,} |")
    lines += ["", "## Training", "", *_training(settings)]
    lines += ["", "## Results", "", *_results(metrics), "", "## Use", ""]
    if has_adapter:
        lines += _loading(settings, adapted)
    lines += [
        "```sh",
        *(f"{command}  # {what}" for what, command in next_steps(settings, run, adapted)),
        "```",
        "",
        "## Made with",
        "",
        ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "",
    ]
    return "\n".join(lines)


def _adapter_rows(adapted: Adapted, saved: int | None) -> list[str]:
    at_the_start = adapted.trainable.adapter
    if adapted.rank is None:
        return [f"| of it, trained | {at_the_start:,} |"]
    if saved is None:
        return [f"| adapter | {at_the_start:,} |"]
    return [f"| adapter | {saved:,} |", f"| adapter, at the start | {at_the_start:,} |"]


def _pipeline(settings: Settings) -> str:
    texts = {"classification": "text-classification", "image-classification": settings.task}
    return texts.get(settings.task, "text-generation")


def _data(settings: Settings) -> str:
    data = settings.data
    if data.glue:
        return f"GLUE's {data.glue}"
    if data.hub:
        return f"`{data.hub}`"
    names = [
        f"`{source.hub or Path(source.path or '').name}`"
        for source in named_sources(data.train, "data.train")
    ]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _training(settings: Settings) -> list[str]:
    """What of the config one would ask for first; config.yaml has all of it."""
    training, data = settings.training, settings.data
    rows = training.batch_size * training.gradient_accumulation * world_size()
    held_out = f"a fraction of {data.validation_fraction:g}"
    if data.glue:
        held_out = "the task's dev.tsv"
    elif data.validation or data.validation_split:
        held_out = "rows of their own"
    elif not data.validation_fraction:
        held_out = "none"
    elif settings.task == "image-classification":
        from .data_images import comes_divided  # Pillow is not needed for texts

        held_out = "images of their own" if comes_divided(data) else held_out
    facts = {
        "learning rate": f"{training.learning_rate:g}, {training.scheduler}",
        "length": f"{training.max_steps} steps"
        if training.max_steps
        else f"{training.epochs:g} epochs",
        "rows per step": f"{rows:,}",
        "tokens per row, at most": f"{data.max_length:,}" if data.max_length else "",
        "rows, at most": f"{data.max_rows:,}" if data.max_rows else "",
        "held out": held_out,
        "seed": str(settings.seed),
    }
    return ["| | |", "|---|---|"] + [f"| {what} | {its} |" for what, its in facts.items() if its]


def _results(metrics: dict[str, Any]) -> list[str]:
    rows = [entry for entry in [metrics["before"], *metrics["evaluations"]] if entry]
    if not rows:
        return ["No rows were held out, so nothing was measured; the last weights were kept."]
    names = [
        name for name, value in rows[-1].items() if isinstance(value, float) and name != "epoch"
    ]
    lines = [
        "Held-out rows. **Bold** is the checkpoint that was kept.",
        "",
        f"| epoch | step | {' | '.join(names)} |",
        "|" + "---|" * (len(names) + 2),
    ]
    for row in rows:
        mark = "**" if row["step"] == metrics["best"]["step"] else ""
        cells = [f"{row['epoch']:.2f}", str(row["step"])]
        cells += [f"{row[name]:.4f}" if name in row else "" for name in names]
        lines.append("| " + " | ".join(f"{mark}{cell}{mark}" for cell in cells) + " |")
    return lines


def _start(settings: Settings) -> list[str]:
    if settings.init_from is None:
        return []
    start = Path(settings.init_from)
    run = start.parent if start.name == "adapter" else start  # a run's folder holds it
    return ["", f"It began as the adapter of `{run.name}`."]


def _loading(settings: Settings, adapted: Adapted) -> list[str]:
    classes = {
        "classification": "AutoPeftModelForSequenceClassification",
        "image-classification": "AutoPeftModel",
    }
    auto, outputs = classes.get(settings.task, "AutoPeftModelForCausalLM"), ""
    if settings.classifies:
        # The base alone would get a head of two outputs, which other classes do not fit.
        outputs = f", num_labels={adapted.model.get_base_model().config.num_labels}"
    if settings.task == "image-classification":
        outputs += ", ignore_mismatched_sizes=True"  # of the head that the base may have
    quantised = []
    if settings.quantization:
        quantised = ["from transformers import BitsAndBytesConfig"]
        bits = 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True'
        bits = bits if settings.quantization == "4bit" else "load_in_8bit=True"
        quantised += ["", f"as_trained = BitsAndBytesConfig({bits})"]
        outputs += ", quantization_config=as_trained"
    package = {"msplora": "msplora", "hydra": "msplora.sisters", "elalora": "msplora.sisters"}
    ours = package.get(settings.method)
    first = [f"import {ours}  # makes the adapter's type known to PEFT"]
    return [
        "```python",
        *(first if ours else []),
        f"from peft import {auto}",
        *quantised,
        "",
        f'model = {auto}.from_pretrained("adapter"{outputs})',
        "```",
        "",
        *([on_autoload(settings.method.upper()), ""] if ours else []),
    ]
