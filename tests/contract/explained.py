"""Why tests of PEFT's LoRA that do not pass with a pyramid mean nothing for one."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Explanation:
    """One reason, and the tests that it is the reason for."""

    why: str
    test: str = ""
    """A regular expression that is looked for in the test's name."""
    error: str = ""
    """And one that is looked for in what it failed with."""

    def fits(self, test: str, error: str) -> bool:
        return bool(re.search(self.test, test) and re.search(self.error, error))


EXPLAINED: list[Explanation] = []

NOT_RUN: list[str] = []


def explain(test: str, error: str) -> str | None:
    """The reason for a test that did not pass, `None` if there is none."""
    return next((its.why for its in EXPLAINED if its.fits(test, error)), None)
