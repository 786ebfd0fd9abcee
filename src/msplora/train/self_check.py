"""After training: is what was saved what was measured, and has every level learnt something?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from msplora.errors import MSPLoraError
from msplora.loading import read_tensors
from msplora.sisters.hydra.layer import HydraLayer
from msplora.store import factors, plan_of

from .adalora import is_adalora, pruned_whole
from .devices import is_sharded
from .job import Job
from .levels import have_numbers
from .progress import plain_metrics
from .settings import Settings

_RELOADED = "reloaded"
# Of the loss: the same weights give the same number, but for the order of sums on a GPU.
_TOLERANCE = 1e-3
# A run may be resumed with evaluations in other batches, whose padding rounds otherwise.
_TOLERANCE_OF_HALVES = 1e-2
_NO_GRADIENT = "They got no gradient, or too little to see, or only steps at a learning rate of 0."
_KEPT = (
    "What was kept is of step {kept} of the {done} that were trained, the best evaluation, and the "
    "update was zero there still: its stage was to come, the learning rate was warming up from 0, "
    "or they got no gradient."
)
_FROZEN = (
    "training.frozen_levels names it, and in a new adapter every B is zero: start from an adapter "
    "in which it has learnt (init_from), or make a pyramid without it (adapter.ranks, groups)."
)


class NotWhatWasMeasured(MSPLoraError):
    """The saved adapter does not give the results that the run reports for it."""


def check_trained(trainer: Any, job: Job, weights: Path, metrics: dict[str, Any]) -> list[str]:
    """Return what looks wrong about a trained adapter, a sentence each.

    `metrics` gets what the saved adapter gives on the held-out rows, as `reloaded`.

    Raises:
        NotWhatWasMeasured: the saved adapter is not the trained one.
    """
    settings, sharded = job.record.settings, is_sharded(trainer.accelerator)
    if job.adapted.rank is None:
        return []
    if settings.training.check_saved and not sharded:
        best = metrics["best"] if job.held_out else None
        found = reload_and_evaluate(trainer, weights, best, job.base.arithmetic)
        if found:
            metrics["reloaded"] = found
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        return []  # the pairs lie in pieces on the processes
    kept, done = metrics["best"]["step"], trainer.state.global_step
    why = _NO_GRADIENT if kept == done else _KEPT.format(kept=kept, done=done)
    found = untrained(trainer.model)
    if job.adapted.plan is None:
        return [_told(part, sites, why) for part, sites in found.items()]
    meant, frozen = _meant_to_train(settings), settings.training.frozen_levels or ()
    return [
        _told(f"level {level}", sites, _FROZEN if level in frozen else why)
        for level, sites in found.items()
        if meant is None or level in meant
    ]


def _told(part: str, sites: list[str], why: str) -> str:
    return (
        f"the {part} adds nothing at {len(sites)} of the adapted layers, its update is zero "
        f"there: {_some(sites)}. {why}"
    )


@torch.no_grad()
def untrained(model: nn.Module) -> dict[str, list[str]]:
    """Level → the adapted layers to whose weights it adds nothing; only levels with such layers.

    Where there are no levels, the key is `adapter`; of Hydra, a branch.
    """
    found: dict[str, list[str]] = {}
    if str(getattr(model, "peft_type", "")).rpartition(".")[2] == "MSPLORA":
        learnt = _learnt([(a, b) for a, b, _ in factors(model).values()])
        for pair, adds in zip(plan_of(model).pairs, learnt, strict=True):
            if not adds:
                found.setdefault(pair.level, []).extend(pair.sites)
        return found
    pruned = pruned_whole(model) if is_adalora(model) else ()
    parts = [
        (path, part, pair)
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and path not in pruned
        for part, pair in _pairs_of(layer).items()
    ]
    learnt = _learnt([pair for _, _, pair in parts])
    for (path, part, _), adds in zip(parts, learnt, strict=True):
        if not adds:
            found.setdefault(part, []).append(path)
    return found


def reload_and_evaluate(
    trainer: Any,
    weights: Path,
    measured: dict[str, Any] | None,
    arithmetic: torch.dtype = torch.float32,
) -> dict[str, float] | None:
    """Load a saved adapter beside the trained one; compare their tensors and held-out losses.

    Args:
        trainer: which trained; its model, a `PeftModel`, is left as it was.
        weights: folder of the saved adapter.
        measured: the held-out metrics that the run reports; None where no rows were held out.
        arithmetic: what the run computes in.

    Returns:
        The held-out metrics of the saved adapter.

    Raises:
        NotWhatWasMeasured: they differ.
    """
    model = trainer.model
    # The base has one bias for all adapters, so that PEFT loads none beside one that trains biases.
    beside = getattr(model.peft_config["default"], "bias", "none") == "none"
    if beside:
        model.load_adapter(str(weights), adapter_name=_RELOADED)
    history = list(trainer.state.log_history)
    try:
        different = (
            [name for name in _names_of(model, _RELOADED) if not _is_as_trained(model, name)]
            if beside
            else _put_back(model, weights)
        )
        if different:
            raise NotWhatWasMeasured(
                f"the adapter saved in {weights} is not the trained one: {len(different)} tensors "
                f"differ, such as {different[0]}. Please report this."
            )
        if measured is None:
            return None
        if beside:
            model.set_adapter(_RELOADED)
        # Nobody is to be told of this evaluation: trackers would take it for one of the run's.
        trainer.callback_handler.callbacks.clear()
        found = plain_metrics(trainer.evaluate())
        tolerance = _TOLERANCE if arithmetic == torch.float32 else _TOLERANCE_OF_HALVES
        if not math.isclose(found["loss"], measured["loss"], rel_tol=tolerance):
            raise NotWhatWasMeasured(
                f"the adapter saved in {weights} has a loss of {found['loss']:.6g} on the held-out "
                f"rows, and the run measured {measured['loss']:.6g}. Please report this."
            )
        return found
    finally:
        trainer.state.log_history = history
        if beside:
            model.set_adapter("default")
            model.delete_adapter(_RELOADED)


def _meant_to_train(settings: Settings) -> set[str] | None:
    """The levels that some stage names; None where all of them train."""
    training = settings.training
    if training.stages:
        return {level for stage in training.stages for level in stage.levels}
    return None


def _names_of(model: nn.Module, adapter_name: str) -> list[str]:
    return [name for name, _ in model.named_parameters() if f".{adapter_name}" in name]


def _is_as_trained(model: nn.Module, name: str) -> bool:
    reloaded = model.get_parameter(name)
    trained = model.get_parameter(name.replace(f".{_RELOADED}", ".default"))
    return torch.equal(reloaded, trained.to(reloaded))


def _put_back(model: Any, weights: Path) -> list[str]:
    """Names of what a file holds otherwise than the model; where there are none, load the file."""
    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    saved = read_tensors(weights)
    different = sorted(
        name
        for name in live.keys() | saved.keys()
        if not (name in live and name in saved and torch.equal(saved[name], live[name].cpu()))
    )
    if not different:
        set_peft_model_state_dict(model, saved)
    return different


def _pairs_of(layer: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """The A and the B of each part that a layer of LoRA has for the trained adapter."""
    if "default" not in layer.scaling:
        return {}
    if isinstance(layer, HydraLayer):  # a branch may stand still beside one that learns
        parts = zip(("parallel", "sequential"), layer.branches("default"), strict=True)
        return {f"{name} branch": (branch.a_RI, branch.b_OR) for name, branch in parts}
    if "default" in layer.lora_embedding_A:
        return {"adapter": (layer.lora_embedding_A["default"], layer.lora_embedding_B["default"])}
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    if isinstance(layer, AdaLoraLayer):  # its diagonal starts at zero, and B does not
        return {"adapter": (layer.lora_E["default"] * a, b)}
    return {"adapter": (a.weight, b.weight)}


def _learnt(pairs: list[tuple[Tensor, Tensor]]) -> list[bool]:
    """Of each pair whether it adds anything: neither its A nor its B is zero."""
    found = have_numbers([its for pair in pairs for its in pair])
    return [a and b for a, b in zip(found[::2], found[1::2], strict=True)]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
