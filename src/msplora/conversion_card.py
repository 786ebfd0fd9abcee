"""The model card of a conversion: what it is, and what loads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .pyramid import Plan
from .server_limits import why_not_served
from .serving import SERVERS

CARD_FILE = "README.md"

_RESIZED = (
    "It was trained with another vocabulary than its base has: load the base, call "
    "`base.resize_token_embeddings({})`, and put the adapter on that with "
    "`PeftModel.from_pretrained(base, ...)`."
)

_LOADERS = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


def on_autoload(peft_type: str) -> str:
    """What the card of an adapter of this package says of programs that load adapters by path.

    Args:
        peft_type: the type in its config, which PEFT looks up and does not find.
    """
    return (
        f"In a program that cannot import msplora, PEFT stops with `KeyError: '{peft_type}'`. Say "
        "once, in that program's environment, `python -m msplora.autoload enable`: PEFT then knows "
        "the adapter in every process (`disable` takes it back)."
    )


def card_of_pyramid(
    config: Any, plan: Plan, source: str, explained: float, labels: int | None = None
) -> str:
    """README.md of a pyramid that was fitted to another adapter; `labels` as of a LoRA."""
    ranks, groups = ", ".join(map(str, config.ranks)), ", ".join(map(str, config.groups))
    return _card(
        config,
        "msplora",
        [
            f"The MSPLoRA pyramid nearest to the adapter `{source}`: ranks {ranks} for groups "
            f"{groups} (0: one pair per layer), {plan.parameters:,} numbers. It explains "
            f"{explained:.2%} of the squared norm of that adapter's updates.",
        ],
        ["import msplora  # makes the adapter's type known to PEFT"],
        on_autoload("MSPLORA"),
        labels,
    )


def card_of_lora(
    config: Any,
    source: str,
    holds: Mapping[str, str],
    vocabulary: int | None = None,
    labels: int | None = None,
) -> str:
    """README.md of the plain LoRA that a pyramid was converted to.

    Args:
        config: the LoRA's.
        source: the pyramid's name.
        holds: its `server_limits.features`.
        vocabulary: how many embeddings the base has to be given first.
        labels: how many answers its base gives, if that is a classifier.
    """
    lacking = [
        why
        for server in SERVERS.values()
        if server.form == "lora" and (why := why_not_served(holds, server, config["r"]))
    ]
    loads = "PEFT loads it as it is."
    if lacking:
        loads += f" Not so every server ({'; '.join(lacking)}): give those the merged model."
    elif config["task_type"] == "CAUSAL_LM":
        loads = "PEFT and every LoRA server load it as it is."
        if flag := SERVERS["vllm"].flag_for(config["r"]):
            loads += f" vLLM is started with `{flag}`."
    return _card(
        config,
        "lora",
        [
            f"The plain LoRA that the MSPLoRA adapter `{source}` is: rank {config['r']} in every "
            f"layer, and the same answers.",
            *([_RESIZED.format(vocabulary)] if vocabulary else []),
        ],
        [],
        f"It needs no msplora: {loads}",
        labels,
    )


def _card(
    config: Any, tag: str, said: list[str], first: list[str], after: str, labels: int | None
) -> str:
    get = config.get if isinstance(config, dict) else lambda name: getattr(config, name)
    base = get("base_model_name_or_path")
    task = get("task_type")
    # The base alone would get a head of two outputs, which other classes do not fit.
    outputs = f", num_labels={labels}" if labels else ""
    auto = _LOADERS.get(str(getattr(task, "value", task)), "AutoPeftModel")
    return "\n".join(
        [
            "---",
            *([f"base_model: {base}"] if base and not Path(base).exists() else []),
            "library_name: peft",
            f"tags: [{tag}]",
            "---",
            "",
            f"# {Path(base).name if base else 'A model'}, adapted",
            "",
            *(line for one in said for line in (one, "")),
            "```python",
            *first,
            f"from peft import {auto}",
            "",
            f'model = {auto}.from_pretrained("THIS FOLDER"{outputs})',
            "```",
            "",
            after,
            "",
        ]
    )
