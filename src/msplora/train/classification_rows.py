"""The rows of a classifier made ready and looked over; no weight of a model is needed."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import datasets
from rich.text import Text

from .data_check import (
    FEW,
    DataCheck,
    Said,
    SplitCheck,
    contradictions,
    repeats_between,
    repeats_within,
    share,
    warnings_on_lengths,
    warnings_on_repeats,
)
from .data_classification import Classes, Example, LabelledData, read_classification
from .init_from import in_its_classes
from .lengths import LengthReport, Limit
from .settings import Settings
from .tokenise_classification import tokenise_examples


@dataclass(frozen=True)
class ClassificationRows:
    """Training and held-out rows as token ids, and what there is to say of them."""

    train: datasets.Dataset
    held_out: datasets.Dataset
    notes: list[str]
    check: DataCheck


def labelled_data(settings: Settings) -> LabelledData:
    """Read the examples of a run, labelled as the adapter that it starts from labels them."""
    data = read_classification(settings.data, settings.seed)
    classes, (train, held_out) = in_its_classes(settings, data.classes, data.train, data.held_out)
    return replace(data, classes=classes, train=train, held_out=held_out)


def prepare_rows(
    settings: Settings, data: LabelledData, tokenizer: Any, limit: Limit
) -> ClassificationRows:
    """Tokenise a run's examples and check them."""
    train, train_report = tokenise_examples(data.train, tokenizer, limit, "training", data.bad)
    held_out, held_report = tokenise_examples(data.held_out, tokenizer, limit, "held-out", data.bad)
    # From here on without the rows that gave no token.
    data = replace(
        data,
        train=[its for its in data.train if its.place not in data.bad],
        held_out=[its for its in data.held_out if its.place not in data.bad],
    )
    training = _split(train, train_report, data.classes)
    judging = _split(held_out, held_report, data.classes)
    notes = [training.note("training", train_report), judging.note("held-out", held_report)]
    learnt_from = [source for source in data.sources if source.train]
    if len(learnt_from) > 1 or learnt_from[0].weight != 1:
        notes += [
            f"{source.name}: {source.train:,} rows in an epoch (weight {source.weight:g}), "
            f"{source.held_out:,} held out"
            for source in data.sources
        ]
    if training.classes:
        counts = ", ".join(f"{name} {count:,}" for name, count in training.classes.items())
        most = max(training.classes.values()) / training.kept
        notes.append(f"training rows of each class: {counts}; the largest is {most:.0%} of all")
    notes += data.bad.notes()
    said = [Said(its.place, "\n".join(its.texts), str(its.label)) for its in data.train]
    held_said = [Said(its.place, "\n".join(its.texts), str(its.label)) for its in data.held_out]
    check = DataCheck(
        [asdict(source) for source in data.sources],
        training,
        judging,
        repeats_within(said),
        repeats_between(held_said, said),
        _empty(data),
        data.bad.to_dict(),
    )
    check.warnings += warnings_on_lengths(training, "training", limit.length)
    check.warnings += warnings_on_lengths(judging, "held-out", limit.length)
    check.warnings += _warnings_on_pairs(data.classes, tokenizer)
    check.warnings += _warnings_on_classes(training, judging)
    check.warnings += warnings_on_repeats(check)
    odd = contradictions(said)
    if odd.rows and odd.example:
        check.warnings.append(
            f"{share(odd.rows, training.rows)} training rows say what an earlier one says, under "
            f"another label, as {odd.example['row']} and {odd.example['same_as']}. One of the two "
            f"labels is wrong."
        )
    check.warnings += [
        f"{count:,} row(s) have {what}, and a label that is learnt from nothing; look whether they "
        f"are whole."
        for what, count in check.empty.items()
    ]
    return ClassificationRows(train, held_out, notes, check)


def labelled_sample(row: dict[str, Any], tokenizer: Any, classes: Classes) -> Text:
    """A row as the model gets it, and its label."""
    label = row["labels"] if classes.regression else classes.labels[int(row["labels"])]
    text = Text(tokenizer.decode(row["input_ids"]))
    return text.append(f"\n→ {classes.label_column} = {label}", style="green")


def _split(rows: datasets.Dataset, report: LengthReport, classes: Classes) -> SplitCheck:
    counts = None
    if not classes.regression:
        found = Counter(rows["labels"])
        counts = {name: found[place] for place, name in enumerate(classes.labels)}
    return SplitCheck.of(report, [len(ids) for ids in rows["input_ids"]], classes=counts)


def _warnings_on_pairs(classes: Classes, tokenizer: Any) -> list[str]:
    """What keeps the two texts of a row from being told apart."""
    of_one, of_two = (tokenizer.num_special_tokens_to_add(pair=its) for its in (False, True))
    if len(classes.text_columns) != 2 or of_two > of_one:
        return []
    return [
        f"the tokenizer puts nothing between the texts of {' and '.join(classes.text_columns)}, so "
        f"the model cannot tell where the second begins. Look at `msplora data`; have the second "
        f"begin with a line break or a word that marks it."
    ]


def _warnings_on_classes(training: SplitCheck, judging: SplitCheck) -> list[str]:
    found = []
    for name, count in (training.classes or {}).items():
        if not count:
            found.append(
                f"no training row is of the class {name!r}, so it is never predicted on purpose. "
                f"Add some, or take it out of data.labels."
            )
        elif count < FEW:
            found.append(
                f"the class {name!r} has {count} training row(s), too few to learn it by. Add "
                f"some, or give a source that has them a weight."
            )
    unjudged = [name for name, count in (judging.classes or {}).items() if not count]
    if unjudged:
        found.append(
            f"no held-out row is of the class(es) {', '.join(unjudged)}, so the score says nothing "
            f"of them. Hold out more rows, or others."
        )
    return found


def _empty(data: LabelledData) -> dict[str, int]:
    def is_empty(example: Example) -> bool:
        return not all(text.strip() for text in example.texts)

    count = sum(map(is_empty, (*data.train, *data.held_out)))
    return {"an empty text": count} if count else {}
