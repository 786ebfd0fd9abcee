"""What TRL's trainers evaluate by here: one measurement of all held-out rows, and its log."""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import TYPE_CHECKING

from transformers import Trainer

# A mixin to come before a trainer in its bases, and for the type checker a trainer itself.
_Base = Trainer if TYPE_CHECKING else object


class JudgesHeldOutRows(_Base):
    """A trainer whose evaluation is `measure`: the numbers that `msplora eval` gives too.

    TRL's own evaluation averages the means of batches, which depends on how rows fall into batches.
    """

    @abstractmethod
    def measure(self) -> dict[str, float]:
        """Return the metrics of the held-out rows, without a prefix."""

    def evaluate(self, *_: object, **__: object) -> dict[str, float]:
        """Measure the held-out rows, and log what was found."""
        start = time.perf_counter()
        metrics = {f"eval_{name}": value for name, value in self.measure().items()}
        metrics["eval_runtime"] = round(time.perf_counter() - start, 4)
        assert self.model is not None
        self.model.eval()  # TRL files what is logged under training otherwise
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics
