"""The maths of ElaLoRA: what a rank is worth, which ranks move, and where new ones point.

    y = W0 x + b0 + s B diag(E) A x            s = alpha / r            (arXiv 2504.00254)

Importance of one number w, smoothed over the steps, times its uncertainty:

    p = |w dL/dw|      I <- b1 I + (1 - b1) p      U <- b2 U + (1 - b2) |p - I|      s(w) = I U

Score of a rank i: s(E_i) + mean_j s(A_ij) + mean_j s(B_ji). Every `interval` steps, each site's k
weakest ranks (never all of a site's) form a pool; the b weakest of the pool are pruned, and the
sites that own the b strongest of it gain a rank each: the total is constant. In the course of the
moving phase b falls as b (1 - P^3).

Shapes: I in, O out, R rank; A is RI, E is R1, B is OR.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from msplora.errors import ConfigError

from .config import ElaLoraConfig

_EPSILON = 1e-5


def scaling_of(config: ElaLoraConfig) -> float:
    """The scale s of every site, as the released code rounds it; it does not follow the ranks."""
    return config.lora_alpha / (config.r + _EPSILON)


def update_importance(
    importance: Tensor,
    uncertainty: Tensor,
    weight: Tensor,
    gradient: Tensor,
    beta1: float,
    beta2: float,
) -> None:
    """One step of the two averages, in place; both start at zero."""
    found = (weight * gradient).abs().to(importance)
    importance.mul_(beta1).add_(found, alpha=1 - beta1)
    uncertainty.mul_(beta2).add_((found - importance).abs(), alpha=1 - beta2)


def rank_scores(worth_a_RI: Tensor, worth_e_R1: Tensor, worth_b_OR: Tensor) -> Tensor:
    """The score of each rank (R), from what each number is worth, ``I U``."""
    return worth_e_R1.flatten() + worth_a_RI.mean(dim=1) + worth_b_OR.mean(dim=0)


@dataclass(frozen=True)
class Moves:
    """Which ranks go, by site, and how many each site gains."""

    pruned: dict[int, list[int]] = field(default_factory=dict)
    grown: dict[int, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many ranks move."""
        return sum(self.grown.values())


def choose_moves(
    scores: Sequence[Sequence[float]], room: Sequence[int], pool_per_site: int, count: int
) -> Moves:
    """Choose the ranks that move.

    Args:
        scores: of each site's ranks.
        room: how many ranks each site can still gain.
        pool_per_site: how many of a site's weakest ranks are compared with others'.
        count: how many ranks are to move; never more than half the pool, so that none of the
            weakest is one of the strongest.
    """
    pool = []
    for site, its in enumerate(scores):
        weakest = sorted((score, site, rank) for rank, score in enumerate(its))
        pool += weakest[: min(pool_per_site, len(its) - 1)]
    pool.sort()
    count = min(count, len(pool) // 2)
    grown: Counter[int] = Counter()
    for _, site, _ in reversed(pool[count:]):
        if sum(grown.values()) < count and grown[site] < room[site]:
            grown[site] += 1
    pruned: dict[int, list[int]] = {}
    for _, site, rank in pool[: sum(grown.values())]:
        pruned.setdefault(site, []).append(rank)
    return Moves(pruned, {site: its for site, its in grown.items() if its})


def check_some_can_move(ranks: Sequence[int], room: Sequence[int], pool_per_site: int) -> None:
    """Refuse sites whose pool is too small for a move, or that are full, however their ranks are
    spread.

    Of that alone, for a run that is resumed begins with the ranks that it has reached.

    Args:
        ranks: of each site.
        room: as in `choose_moves`; moves keep its sum.
        pool_per_site: as in `choose_moves`.

    Raises:
        ConfigError: they are.
    """
    spare, sites = sum(ranks) - len(ranks), len(ranks)
    if min(spare, sites * pool_per_site) < 2:
        option = "r" if spare < 2 else "pool_per_site"
        raise ConfigError(
            f"ElaLoRA's ranks would never move: the adapted layers ({sites}) have {sum(ranks)} in "
            f"all, each keeps its last, and of those that are compared (pool_per_site = "
            f"{pool_per_site} of a layer) at most half move. Raise {option}, or adapt more layers."
        )
    if sum(room) <= 0:
        raise ConfigError(
            f"ElaLoRA's ranks would never move: the adapted layers ({sites}) have {sum(ranks)} in "
            f"all and take no more than {sum(ranks) + sum(room)}, each as many as it has inputs or "
            f"outputs, whichever are fewer. Lower r, or adapt larger layers too."
        )


def new_direction(existing_RI: Tensor, generator: torch.Generator) -> Tensor:
    """A random unit vector (I) at right angles to all rows of `existing_RI`; R is below I."""
    rows = existing_RI.float()
    span_IR = torch.linalg.qr(rows.T).Q
    found = torch.randn(rows.shape[1], generator=generator).to(rows.device)
    for _ in range(2):  # once more, for what rounding left
        found = found - span_IR @ (span_IR.T @ found)
        found = found / found.norm()
    return found.to(existing_RI)


def orthogonality(factors_RX: Sequence[Tensor]) -> Tensor:
    """Mean over the factors, ranks first, of ``‖F Fᵀ - 1‖`` (Frobenius), as the code released."""
    norms = []
    for factor in factors_RX:
        gram = factor @ factor.T
        norms.append(torch.linalg.norm(gram - torch.eye(len(gram)).to(gram)))
    return torch.stack([its.to(norms[0].device) for its in norms]).mean()


@dataclass(frozen=True)
class Phases:
    """When ranks move: after the step `warmup`, every `interval` steps, and before `end`."""

    warmup: int
    interval: int
    end: int

    @classmethod
    def of(cls, config: ElaLoraConfig, steps: int) -> Phases:
        """The phases of a run of so many steps.

        Raises:
            ConfigError: the run is over before ranks could move.
        """
        warmup = steps // 5 if config.warmup_steps is None else config.warmup_steps
        final = steps // 4 if config.final_steps is None else config.final_steps
        interval = max(1, round(steps * 0.04)) if config.interval is None else config.interval
        end = steps - final
        if warmup + interval >= end:
            raise ConfigError(
                f"ElaLoRA's ranks would never move: of {steps} steps the first {warmup} are "
                f"warmup_steps and the last {final} final_steps, and the first move would come "
                f"{interval} (interval) after the warm-up. Train for longer, or lower them."
            )
        phases = cls(warmup, interval, end)
        first = warmup + interval
        if not phases.count(first, config.prune_per_step):
            raise ConfigError(
                f"ElaLoRA's ranks would never move: of {steps} steps the first move would come "
                f"after step {first}, interval = {interval} after the warm-up, and by then the "
                f"number that moves has fallen from prune_per_step = {config.prune_per_step} to 0 "
                f"(of {end}, the last). Lower interval, or raise prune_per_step."
            )
        return phases

    def due(self, step: int) -> bool:
        """Whether ranks move after this step, counted from 1."""
        return self.warmup < step < self.end and (step - self.warmup) % self.interval == 0

    def count(self, step: int, at_first: int) -> int:
        """How many ranks move after this step."""
        progress = (step - self.warmup) / (self.end - self.warmup)
        return round(at_first * (1 - progress**3))
