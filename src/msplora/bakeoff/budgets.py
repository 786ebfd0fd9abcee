"""The rank of a budget: the ranks that a method takes, and what it trains with each."""

from __future__ import annotations

from collections.abc import Callable

from msplora.errors import ConfigError, MSPLoraError

LARGEST = 4096


class Ranks:
    """Sizes by rank, which grow with it; each is looked at once.

    Args:
        size: of a rank; raises an `MSPLoraError` where the method does not take it.
        patience: of so many ranks in a row the method takes one, if any at all.
    """

    def __init__(self, size: Callable[[int], int], patience: int) -> None:
        self._look, self._patience = size, patience
        self._sizes: dict[int, int | None] = {}
        self._why = ""

    def size(self, rank: int) -> int | None:
        """What trains with a rank; None where the method does not take it."""
        if rank not in self._sizes:
            try:
                self._sizes[rank] = self._look(rank)
            except MSPLoraError as error:
                self._sizes[rank], self._why = None, str(error)
        return self._sizes[rank]

    def smallest(self, budget: int) -> tuple[int, int]:
        """The smallest rank whose size is not below the budget, with its size; where there is none,
        the largest that is looked at.

        Raises:
            ConfigError: the method takes no rank where one was looked for.
        """
        rank, size = self._next_taken(1)
        while size < budget and rank < LARGEST:
            rank, size = self._next_taken(min(2 * rank, LARGEST))
        found, low, top = (rank, size), 0, rank  # the answer so far; too small; not to look at
        while size >= budget and top - low > 1:
            middle = (low + top) // 2
            its, its_size = self._next_taken(middle)
            if its >= top:
                top = middle
            elif its_size < budget:
                low = its
            else:
                found, top = (its, its_size), middle
        return found

    def below(self, rank: int) -> tuple[int, int] | None:
        """The nearest lower rank that the method takes, with its size."""
        lower = ((its, self.size(its)) for its in reversed(range(1, rank)))
        return next(((its, size) for its, size in lower if size), None)

    def _next_taken(self, rank: int) -> tuple[int, int]:
        for its in range(rank, rank + self._patience):
            size = self.size(its)
            if size is not None:
                return its, size
        raise ConfigError(self._why)
