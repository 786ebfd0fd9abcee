"""Does a language model learn to stop: end tokens, and rows whose last token is none."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from .data_check import NOTEWORTHY, SplitCheck, share
from .tokenise_sft import IGNORED, Tokens


def end_tokens(tokenizer: Any, *configs: Any) -> set[int]:
    """The ids at which generation stops: the tokenizer's end token, and those of the configs."""
    found = {tokenizer.eos_token_id}
    for config in configs:
        its = getattr(config, "eos_token_id", None)
        found |= set(its) if isinstance(its, (list, tuple)) else {its}
    return {its for its in found if its is not None}


def without_end(rows: list[Tokens], ends: Collection[int], tokenizer: Any) -> int | None:
    """Count rows whose last trained token, white space after it aside, does not end a text.

    None where all rows are cut out of longer texts, and none should.
    """
    whole = [row for row in rows if not row.chunk]
    if not whole:
        return None
    blank: dict[int, bool] = {}

    def is_blank(its: int) -> bool:
        if its not in blank:
            blank[its] = not tokenizer.decode([its]).strip()
        return blank[its]

    def lacks_end(row: Tokens) -> bool:
        last = max(place for place, label in enumerate(row.labels) if label != IGNORED)
        while last > 0 and row.labels[last] != IGNORED and row.input_ids[last] not in ends:
            if not is_blank(row.input_ids[last]):
                return True
            last -= 1
        return row.labels[last] == IGNORED or row.input_ids[last] not in ends

    return sum(map(lacks_end, whole))


def warnings_on_ends(
    split: SplitCheck, chats: bool, ends: Collection[int], tokenizer: Any
) -> list[str]:
    """What is usually a mistake in how the training rows end; `chats`: a template closes them."""
    if split.without_end is None:
        return []
    if not ends:
        return ["the tokenizer has no end token, so the model does not learn to stop."]
    # That what is cut has lost its end is said where the cutting is.
    if split.without_end - split.truncated <= NOTEWORTHY * split.kept:
        return []
    names = " or ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(ends))))
    advice = (
        f"The chat template closes the assistant's turns in another way: name one in "
        f"data.chat_template that closes them with {names}, or a tokenizer whose end token is the "
        f"template's."
        if chats
        else "Look at the rows' last tokens with msplora data."
    )
    return [
        f"in {share(split.without_end, split.kept)} training rows the last token learnt is not the "
        f"end token ({names}), so the model may not learn to stop. {advice}"
    ]
