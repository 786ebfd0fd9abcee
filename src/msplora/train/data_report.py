"""What a run would train on, without its model: rows, tokens, and what is usually a mistake."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from msplora.errors import ConfigError
from msplora.loading import loading_errors_explained, resolve_source
from msplora.planning import on_meta

from . import classification_rows, preference_rows, sft_rows
from .base_model import load_tokenizer
from .data_check import DataCheck
from .data_preference import read_preferences
from .data_sft import read_sft
from .end_tokens import end_tokens
from .lengths import row_limit
from .preview import show_warnings
from .quiet import quiet_libraries
from .settings import Settings


@dataclass(frozen=True)
class DataReport:
    """The check of a run's rows, what the run will say of them, and its first training rows."""

    check: DataCheck
    notes: list[str]
    samples: list[Text]


def data_report(settings: Settings, rows: int = 3) -> DataReport:
    """Read and tokenise the rows of a run as it will, by the model's config and tokenizer alone.

    Raises:
        MSPLoraError: the data, the config or the tokenizer is not what a run can use.
    """
    reports = {"sft": _sft, "dpo": _preferences, "classification": _classification}
    if settings.task not in reports:
        raise ConfigError(
            f"task {settings.task!r} has no check of its data; {', '.join(reports)} have one."
        )
    with quiet_libraries():
        return reports[settings.task](settings, rows)


def show_report(report: DataReport, settings: Settings, console: Console) -> None:
    """Print the report."""
    console.rule(escape(f"{settings.task} · {settings.model}"))
    for note in report.notes:
        console.print(f"• {note}", highlight=False, markup=False, soft_wrap=True)
    show_warnings(report.check, console)
    for number, sample in enumerate(report.samples, 1):
        counted = " (the loss counts what stands between ▶ and ◀)" * (
            settings.task in ("sft", "dpo")
        )
        console.print(f"\nTraining row {number}{counted}:")
        console.print(sample, soft_wrap=True)


def _sft(settings: Settings, rows: int) -> DataReport:
    data = read_sft(settings.data, settings.seed)
    model, tokenizer, generation = _weightless(settings)
    ends = end_tokens(tokenizer, model.config, generation)
    found = sft_rows.prepare_rows(settings, data, tokenizer, row_limit(settings, model), ends)
    samples = [sft_rows.masked_sample(row, tokenizer) for row in found.train[:rows]]
    return DataReport(found.check, found.notes, samples)


def _preferences(settings: Settings, rows: int) -> DataReport:
    data = read_preferences(settings.data, settings.seed)
    model, tokenizer, generation = _weightless(settings)
    ends = end_tokens(tokenizer, model.config, generation)
    found = preference_rows.prepare_rows(data, tokenizer, row_limit(settings, model), ends)
    samples = [preference_rows.pair_sample(row, tokenizer) for row in found.train[:rows]]
    return DataReport(found.check, found.notes, samples)


def _classification(settings: Settings, rows: int) -> DataReport:
    data = classification_rows.labelled_data(settings)
    model, tokenizer, _ = _weightless(settings)
    found = classification_rows.prepare_rows(settings, data, tokenizer, row_limit(settings, model))
    samples = [
        classification_rows.labelled_sample(found.train[place], tokenizer, data.classes)
        for place in range(min(rows, len(found.train)))
    ]
    return DataReport(found.check, found.notes, samples)


def _weightless(settings: Settings) -> tuple[Any, Any, Any]:
    """The model without its weights, its tokenizer, and its generation config if it has one."""
    source = resolve_source(settings.model)
    hub: dict[str, Any] = {
        "revision": settings.revision,
        "trust_remote_code": settings.trust_remote_code,
    }
    with loading_errors_explained(source):
        config = transformers.AutoConfig.from_pretrained(source, **hub)
        model = on_meta(config)
    try:
        generation = transformers.GenerationConfig.from_pretrained(source, **hub)
    except OSError:  # older models keep it in the config
        generation = None
    return model, load_tokenizer(settings), generation
