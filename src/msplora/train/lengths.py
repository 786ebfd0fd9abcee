"""How long a row may be: the run's limit, and the model's positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from msplora.errors import ConfigError

from .data_files import DataError
from .settings import Settings

LEFT_OUT = {
    "empty": "left out without an answer, or with the same one twice",
    "truncated": "truncated",
    "dropped": "dropped as too long",
    "unlearnt": "left out without a token to learn",
}
"""What may become of a row that does not stay whole -> how every report says it."""

TooLong = Literal["truncate", "drop", "error"]


@dataclass(frozen=True)
class Limit:
    """The tokens a row may have, and what happens to one that has more.

    `positions` is the model's own bound (None where it has none), `length` what the run asked for.
    """

    positions: int | None
    length: int | None
    too_long: TooLong

    def refuse_beyond_positions(self) -> None:
        """Raise where the run asks for more tokens than the model has positions."""
        if self.positions and self.length and self.length > self.positions:
            raise ConfigError(
                f"data.max_length = {self.length}, but the model has {self.positions} positions. "
                f"Set data.max_length to {self.positions} or less."
            )


@dataclass
class LengthReport:
    """How many rows were cut or left out, out of how many."""

    rows: int = 0
    empty: int = 0
    """Of a file that is measured on: rows without an answer, or with the same one twice."""
    truncated: int = 0
    dropped: int = 0
    unlearnt: int = 0
    """Left out because no token of them would be learnt: the prompt fills the row, say."""
    longest: int = 0
    turns: int = 0
    """Of the assistant, in chats that are learnt."""
    unlearnt_turns: int = 0
    """Those of them that could not be found in the rendered chat, and are not learnt."""
    shortened_turns: int = 0
    """Those that are learnt without words of theirs, which the chat template leaves out."""

    def count(self, length: int) -> None:
        """Count a row of so many tokens."""
        self.rows += 1
        self.longest = max(self.longest, length)

    def left_out(self) -> dict[str, int]:
        """What did not stay whole, by name; nothing where every row did."""
        counts = {name: getattr(self, name) for name in LEFT_OUT}
        return {name: count for name, count in counts.items() if count}

    def __str__(self) -> str:
        parts = [f"{self.rows} rows, the longest of {self.longest} tokens"]
        parts += [f"{count} {LEFT_OUT[name]}" for name, count in self.left_out().items()]
        return ", ".join(parts)


def row_limit(settings: Settings, model: Any) -> Limit:
    """The limit on a row's tokens, refused where the model cannot hold it."""
    limit = Limit(positions_of(model), settings.data.max_length, settings.data.too_long)
    limit.refuse_beyond_positions()
    return limit


def positions_of(model: Any) -> int | None:
    """Return how many tokens the model has positions for, or None where nothing bounds them."""
    bound = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(bound, int) or bound <= 0:
        return None
    for name, module in model.named_modules():
        # RoBERTa's family counts positions from padding_idx + 1, so the first ones are lost.
        if (
            name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ):
            return module.num_embeddings - module.padding_idx - 1
    return bound


def keep(length: int, place: str, limit: Limit, report: LengthReport) -> bool:
    """Whether a row of `length` tokens stays (cut by the caller where too long); counts it."""
    report.count(length)
    if limit.length is None:
        if limit.positions and length > limit.positions:
            raise DataError(
                f"{place}: {length} tokens, but the model has {limit.positions} positions. Set "
                f"data.max_length to {limit.positions} or less, and data.too_long to truncate or "
                f"drop."
            )
        return True
    if length <= limit.length:
        return True
    if limit.too_long == "error":
        raise DataError(
            f"{place}: {length} tokens, but data.max_length is {limit.length} and data.too_long is "
            f"'error'. Raise the one, or set the other to truncate or drop."
        )
    if limit.too_long == "drop":
        report.dropped += 1
        return False
    report.truncated += 1
    return True


def refuse_if_none_left(rows: Sequence[Any], limit: Limit, what: str) -> None:
    """Raise where every row was dropped."""
    if not rows:
        raise DataError(
            f"no {what} row is left: all are longer than data.max_length = {limit.length}, or have "
            f"no completion within it. Raise data.max_length."
        )
