"""What a run would train on, without its model: rows, tokens, and what is usually a mistake."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from msplora.errors import ConfigError

from . import classification_rows, preference_rows, sft_rows
from .data_check import DataCheck
from .data_preference import read_preferences
from .data_sft import read_sft
from .outline import outline
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
    its = outline(settings, None)
    found = sft_rows.prepare_rows(settings, data, its.tokenizer, its.limit, its.ends)
    samples = [sft_rows.masked_sample(row, its.tokenizer) for row in found.train[:rows]]
    return DataReport(found.check, found.notes, samples)


def _preferences(settings: Settings, rows: int) -> DataReport:
    data = read_preferences(settings.data, settings.seed)
    its = outline(settings, None)
    found = preference_rows.prepare_rows(data, its.tokenizer, its.limit, its.ends)
    samples = [preference_rows.pair_sample(row, its.tokenizer) for row in found.train[:rows]]
    return DataReport(found.check, found.notes, samples)


def _classification(settings: Settings, rows: int) -> DataReport:
    data = classification_rows.labelled_data(settings)
    its = outline(settings, data.classes)
    found = classification_rows.prepare_rows(settings, data, its.tokenizer, its.limit)
    samples = [
        classification_rows.labelled_sample(found.train[place], its.tokenizer, data.classes)
        for place in range(min(rows, len(found.train)))
    ]
    return DataReport(found.check, found.notes, samples)
