"""Moving ranks while a model trains, with the optimiser's state: in a Trainer, or in any loop.

What belongs to a number follows it. The parameters stay the same objects; of every tensor that the
optimiser keeps beside one (Adam's two averages) the pruned ranks' rows are taken out, and a new
rank's begin at zero. The averages of importance are kept there too: so they are in the optimiser's
checkpoints, and a run that is resumed goes on to the same bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from msplora.errors import MSPLoraError, UnsupportedError
from msplora.sisters.steps import counts, refuse_scaled

from .layer import RANK_DIMENSION, ElaLoraLayer, adapted_layers
from .ranks import (
    Moves,
    Phases,
    check_some_can_move,
    choose_moves,
    new_direction,
    orthogonality,
    rank_scores,
    update_importance,
)

_logger = logging.getLogger(__name__)

IMPORTANCE, UNCERTAINTY = "elalora_importance", "elalora_uncertainty"
"""The names of the two averages in the optimiser's state."""

_BEGIN_AT_ZERO = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf"),  # Adam and its kin
    "momentum_buffer",  # SGD, RMSprop
    *("square_avg", "grad_avg", "acc_delta", "sum"),  # RMSprop, Adadelta, Adagrad
}
"""What optimisers keep of a parameter's shape that is zero before the first step. Elsewhere, as in
Rprop's step sizes, a new rank that began at zero would stay there."""


def check_ranks_can_move(model: nn.Module, adapter_name: str = "default") -> None:
    """Refuse an adapter whose ranks cannot move, however long it trains.

    Raises:
        ConfigError: none can.
        MSPLoraError: the model has no such adapter.
    """
    layers = list(adapted_layers(model, adapter_name).values())
    if not layers:
        raise MSPLoraError(f"the model has no ElaLoRA adapter {adapter_name!r}.")
    check_some_can_move(
        [its.r[adapter_name] for its in layers],
        [its.room(adapter_name) for its in layers],
        layers[0].records[adapter_name].config.pool_per_site,
    )


class RankMover:
    """Moves the ranks of an adapter.

    ::

        mover = RankMover(model, optimizer, steps=1000)
        for step in range(1, 1001):
            loss(model, …).backward()
            mover.before_step()  # the penalty on factors that are not orthogonal
            optimizer.step()
            mover.after_step(step)
            optimizer.zero_grad()

    In float16, whose gradients a `GradScaler` scales, `scaler.unscale_(optimizer)` has to come
    before `before_step`: the penalty's gradient is not scaled, and `scaler.step` would divide it by
    the scale too, down to nothing.

    Args:
        model: with an ElaLoRA adapter that trains.
        optimizer: over its parameters.
        steps: how many there will be in all.
        adapter_name: the adapter.
        seed: of the new directions; they depend on it and on the step alone.

    Raises:
        MSPLoraError: the model has no such adapter, it does not train or is not the optimiser's, or
            ranks cannot move in this run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        steps: int,
        adapter_name: str = "default",
        seed: int = 0,
    ) -> None:
        if _processes() > 1:
            raise UnsupportedError(
                "ElaLoRA's moves change the shapes of parameters, which no process group can take "
                "over from its first step to the next. Train in one process."
            )
        check_ranks_can_move(model, adapter_name)
        self.layers = adapted_layers(model, adapter_name)
        self.optimizer, self.adapter_name, self.seed = optimizer, adapter_name, seed
        self._check_factors()
        self.config = next(iter(self.layers.values())).records[adapter_name].config
        self.phases = Phases.of(self.config, steps)

    def _check_factors(self) -> None:
        held = {id(its) for its in self._parameters()}
        for path, layer in self.layers.items():
            for name, parameter in layer.factors(self.adapter_name).items():
                if not parameter.requires_grad:
                    raise MSPLoraError(
                        f"{path}.{name} of the adapter {self.adapter_name!r} does not train, so no "
                        f"ranks can move. Load the adapter with is_trainable=True, or make it the "
                        f"active one (set_adapter)."
                    )
                if id(parameter) not in held:
                    raise MSPLoraError(
                        f"the optimiser does not hold {path}.{name}. Make it after the adapter, "
                        f"of all parameters that train."
                    )

    def before_step(self) -> None:
        """Add the gradient of the penalty on factors that are not orthogonal, to gradients that are
        not scaled, or no longer.
        """
        if not self.config.orthogonal_penalty:
            return
        with torch.enable_grad():
            found = []
            for layer in self.layers.values():
                factors = layer.factors(self.adapter_name)
                found += [factors["elalora_A"], factors["elalora_B"].T]
            (self.config.orthogonal_penalty * orthogonality(found)).backward()

    @torch.no_grad()
    def after_step(self, step: int) -> Moves | None:
        """Take in the gradients of a step (counted from 1), and move ranks where that is due.

        A step whose gradients are not all finite counts for nothing: one that `GradScaler` skips.

        Returns:
            What moved; sites are numbered in the order of `layers`.

        Raises:
            MSPLoraError: there are no gradients.
            UnsupportedError: the optimiser keeps something that cannot follow.
        """
        if step >= self.phases.end or not counts(self.optimizer):
            return None
        self._update_importance()
        if not self.phases.due(step):
            return None
        room = [layer.room(self.adapter_name) for layer in self._layers()]
        count = self.phases.count(step, self.config.prune_per_step)
        scores = [scores.tolist() for scores in self.scores()]
        moves = choose_moves(scores, room, self.config.pool_per_site, count)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        for site, layer in enumerate(self.layers.values()):
            pruned, grown = moves.pruned.get(site, []), moves.grown.get(site, 0)
            if pruned or grown:
                self.move(layer, pruned, grown, generator)
        return moves

    def scores(self) -> list[Tensor]:
        """What each rank of each site is worth so far; zero where there was no gradient."""
        return [
            rank_scores(*(self._worth(its) for its in layer.factors(self.adapter_name).values()))
            for layer in self.layers.values()
        ]

    def _layers(self) -> list[Any]:
        return list(self.layers.values())

    def _worth(self, parameter: nn.Parameter) -> Tensor:
        state = self.optimizer.state.get(parameter, {})
        if IMPORTANCE not in state:
            return torch.zeros_like(parameter)
        return state[IMPORTANCE] * state[UNCERTAINTY]

    def _parameters(self) -> list[nn.Parameter]:
        return [its for group in self.optimizer.param_groups for its in group["params"]]

    def _update_importance(self) -> None:
        factors = [its.factors(self.adapter_name) for its in self.layers.values()]
        if all(its.grad is None for group in factors for its in group.values()):
            raise MSPLoraError(
                "no factor of the adapter has a gradient: call after_step before zero_grad, and "
                "after backward."
            )
        for group in factors:
            for parameter in group.values():
                if parameter.grad is None:
                    continue
                state = self.optimizer.state[parameter]
                if IMPORTANCE not in state:
                    self._check_state(parameter, state)
                    state[IMPORTANCE] = torch.zeros_like(parameter, requires_grad=False)
                    state[UNCERTAINTY] = torch.zeros_like(parameter, requires_grad=False)
                update_importance(
                    state[IMPORTANCE],
                    state[UNCERTAINTY],
                    parameter,
                    parameter.grad,
                    self.config.beta1,
                    self.config.beta2,
                )

    def _check_state(self, parameter: nn.Parameter, state: dict[str, Any]) -> None:
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if name not in _BEGIN_AT_ZERO or not _follows(value, parameter):
                raise UnsupportedError(
                    f"the optimiser keeps {name!r} of shape {tuple(value.shape)} and type "
                    f"{value.dtype} beside a parameter of shape {tuple(parameter.shape)}, and "
                    f"cannot follow it when ranks move: of that shape it would have to be, and "
                    f"known to begin at zero. Use AdamW (adamw_torch), or SGD."
                )

    @torch.no_grad()
    def move(
        self, layer: ElaLoraLayer, pruned: list[int], grown: int, generator: torch.Generator
    ) -> None:
        """Take ranks of a layer away and give it new ones, in the optimiser's state too."""
        factors = layer.factors(self.adapter_name)
        rank = len(factors["elalora_E"])
        stay = torch.tensor([its for its in range(rank) if its not in pruned])
        tensors = {}
        for name, parameter in factors.items():
            dimension = RANK_DIMENSION[name]
            kept = _kept(parameter.data, dimension, stay)
            tensors[name] = _with_new(kept, name, grown, generator)
            state = self.optimizer.state[parameter]
            for key, value in state.items():
                if isinstance(value, Tensor) and _follows(value, parameter):
                    rows = _kept(value, dimension, stay)
                    state[key] = torch.cat([rows, _zeros(rows, dimension, grown)], dim=dimension)
        layer.replace(self.adapter_name, tensors)


def _processes() -> int:
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 1
    return distributed.get_world_size()


def _follows(value: Tensor, parameter: Tensor) -> bool:
    return value.shape == parameter.shape and value.dtype.is_floating_point


def _kept(tensor: Tensor, dimension: int, stay: Tensor) -> Tensor:
    return tensor.index_select(dimension, stay.to(tensor.device))


def _zeros(tensor: Tensor, dimension: int, count: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dimension] = count
    return tensor.new_zeros(shape)


def _with_new(kept: Tensor, name: str, grown: int, generator: torch.Generator) -> Tensor:
    """A factor with its new ranks: unit vectors at right angles to the others; zero for E."""
    dimension = RANK_DIMENSION[name]
    if name == "elalora_E":
        return torch.cat([kept, _zeros(kept, dimension, grown)])
    rows = kept if dimension == 0 else kept.T
    for _ in range(grown):
        rows = torch.cat([rows, new_direction(rows, generator)[None]])
    return (rows if dimension == 0 else rows.T).contiguous()


class MoveRanks(TrainerCallback):
    """Moves the ranks of an ElaLoRA adapter in a Trainer, transformers' own or TRL's.

    ::

        Trainer(model, …, callbacks=[MoveRanks()])

    Args:
        adapter_name: the adapter.
        tell: is given a line at each move; unset, the line is logged.
        steps: of the whole run, where the trainer takes only the first of them.
    """

    def __init__(
        self,
        adapter_name: str = "default",
        tell: Callable[[str], None] = _logger.info,
        steps: int | None = None,
    ) -> None:
        self.adapter_name = adapter_name
        self.tell = tell
        self.steps = steps
        self.mover: RankMover | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **others: Any
    ) -> None:
        """Check that ranks can move in this run."""
        refuse_scaled(args, "ElaLoRA")
        steps = self.steps or state.max_steps
        self.mover = RankMover(model, others["optimizer"], steps, self.adapter_name, args.seed)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add the penalty's gradient."""
        assert self.mover is not None
        self.mover.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take in the step's gradients, and move ranks where that is due."""
        assert self.mover is not None
        step = state.global_step + 1
        moves = self.mover.after_step(step)
        if moves is not None and moves.count:
            ranks = [layer.r[self.adapter_name] for layer in self.mover._layers()]
            self.tell(
                f"step {step}: {moves.count} ranks moved; ranks are {min(ranks)} to {max(ranks)}"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the model and the optimiser go."""
        self.mover = None
