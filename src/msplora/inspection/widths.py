"""Pairs of another width than the rest of their kind: no weight can borrow both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from .entries import Entry
from .tensor_file import TensorFiles

Widths = tuple[tuple[int, ...], tuple[int, ...]]


def of_other_widths(files: TensorFiles, pairs: Iterable[Entry]) -> dict[str, str]:
    """Address → what is wrong, of the pairs that are for another width than most of their kind."""
    by_kind: dict[str, list[Entry]] = {}
    for entry in pairs:
        by_kind.setdefault(entry.kind, []).append(entry)
    found = {}
    for its in by_kind.values():
        widths = {entry.address: _widths(files, entry) for entry in its}
        usual, _ = Counter(widths.values()).most_common(1)[0]
        like = next(address for address, width in widths.items() if width == usual)
        for entry in its:
            if widths[entry.address] != usual:
                a, b = (files.headers[name].shape for name in (entry.a, entry.b))
                found[entry.address] = f"A {a} and B {b}, which is of another width than {like}"
    return found


def _widths(files: TensorFiles, entry: Entry) -> Widths:
    """What does not depend on the rank: of A all but its rows, of B the rows and a kernel."""
    a, b = (files.headers[name].shape for name in (entry.a, entry.b))
    return a[1:], b[:1] + b[2:]
