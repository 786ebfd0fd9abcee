"""Examples to token ids, for a classifier."""

from __future__ import annotations

from typing import Any

import datasets

from msplora.errors import ConfigError

from .bad_rows import BadRows
from .data_classification import Example
from .data_files import DataError
from .lengths import LengthReport, Limit, keep, refuse_if_none_left


def tokenise_examples(
    examples: list[Example],
    tokenizer: Any,
    limit: Limit,
    what: str,
    bad: BadRows | None = None,
) -> tuple[datasets.Dataset, LengthReport]:
    """Return model inputs with labels, and what became of rows that were too long.

    `bad` takes the rows without a token, of which no model can say anything.
    """
    bad = bad or BadRows()
    texts = [example.texts for example in examples]
    pairs = tuple([*column] for column in zip(*texts, strict=True))
    around = tokenizer.num_special_tokens_to_add(pair=len(pairs) == 2)
    if limit.length and limit.length < around + len(pairs):
        raise ConfigError(
            f"data.max_length = {limit.length} leaves no room for text: the tokenizer puts "
            f"{around} tokens around each row. Raise it."
        )
    full = tokenizer(*pairs, truncation=False, verbose=False)
    report = LengthReport()
    kept, cut = [], False
    for place, (example, ids) in enumerate(zip(examples, full["input_ids"], strict=True)):
        with bad.at(example.place):
            if not ids:
                raise DataError(
                    f"{example.place}: the text is empty, and the tokenizer puts no tokens of its "
                    f"own around it, so there is nothing to classify."
                )
        if ids and keep(len(ids), example.place, limit, report):
            kept.append(place)
            cut = cut or bool(limit.length and len(ids) > limit.length)
    if not report.rows:
        bad.refuse_if_none_left(kept, f"{what} row")
    refuse_if_none_left(kept, limit, what)
    if cut:
        # Again with truncation, which shortens the longer text of a pair and keeps the special
        # tokens in place.
        full = tokenizer(*pairs, truncation=True, max_length=limit.length, verbose=False)
    columns: dict[str, list[Any]] = {
        name: [values[place] for place in kept] for name, values in full.items()
    }
    labels = [examples[place].label for place in kept]
    if labels[0] is not None:
        columns["labels"] = labels
    return datasets.Dataset.from_dict(columns), report
