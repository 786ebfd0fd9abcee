"""Which weights of a model a config selects, where they lie, and what it names in vain."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from . import _peft
from .blocks import check_layers, check_layers_reached
from .config import MSPLoraConfig
from .errors import TargetError, nearest
from .parameters import check_none_left_out, own_parameters, targeted_parameters
from .pyramid import Shape

STORE_NAME = "pyramid_store"
"""The attribute of the wrapped base model under which the store is registered."""

_CLASSIFIERS = ("classifier", "score")
_ANSWERS = ("qa_outputs",)
HEADS = (*_CLASSIFIERS, *_ANSWERS)
"""What PEFT adds to `modules_to_save` by itself, whether the model has it or not."""
_HEADS_OF = {"SEQ_CLS": _CLASSIFIERS, "TOKEN_CLS": _CLASSIFIERS, "QUESTION_ANS": _ANSWERS}


# Where releases of transformers name the same weights differently.
_RENAMES = (
    ("query", "q_proj"),
    ("key", "k_proj"),
    ("value", "v_proj"),
    ("w1", "gate_up_proj"),
    ("w3", "gate_up_proj"),
    ("w2", "down_proj"),
    ("block_sparse_moe", "mlp"),
)
_RENAMED: dict[str, list[str]] = {}
for _one, _other in _RENAMES:
    _RENAMED.setdefault(_one, []).append(_other)
    _RENAMED.setdefault(_other, []).append(_one)


class NoMatchError(TargetError, _peft.NoMatchingPeftModuleError):
    """Also what callers of PEFT catch where nothing is matched."""


@dataclass(frozen=True)
class Target:
    key: str
    path: str
    """The module that is adapted, or that holds the parameter."""
    module: nn.Module
    shape: Shape


def find_targets(modules: Mapping[str, nn.Module], config: MSPLoraConfig) -> list[Target]:
    """What `config` adapts among `own_modules`."""
    found = []
    for path, module in modules.items():
        if path and _is_target(config, path):
            found += _module_targets(modules[""], path, _peft.unwrapped(module), config.use_dora)
    for path, module in modules.items() if config.target_parameters else ():
        base = _peft.unwrapped(module)
        for key, shape in targeted_parameters(path, base, config.target_parameters or ()):
            found.append(Target(key, path, base, shape))
    return found


def own_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The base model's modules: not what lies inside adapter layers, nor the store.

    The first is the model itself, by the path "".
    """
    inside = None
    for path, module in model.named_modules():
        if inside is not None and path.startswith(inside):
            continue
        is_wrapper = isinstance(module, (_peft.BaseTunerLayer, _peft.AuxiliaryTrainingWrapper))
        if is_wrapper or path == STORE_NAME:
            inside = f"{path}."  # what lies inside comes next
        if path != STORE_NAME:
            yield path, module


def endings(path: str) -> Iterator[str]:
    """The names by which a list may mean `path`: itself, and what follows each of its dots."""
    while path:
        yield path
        path = path.partition(".")[2]


def _is_target(config: MSPLoraConfig, path: str) -> bool:
    names = config.target_modules
    if isinstance(names, (set, list)):
        # PEFT compares a path with every name, and "all-linear" is a name for each linear layer.
        meant = {ending for ending in endings(path) if ending in names}
        if not meant:
            return False
        config = copy.copy(config)
        config.target_modules = meant
    return _peft.is_target(config, path)


def _module_targets(model: nn.Module, path: str, module: nn.Module, use_dora: bool) -> list[Target]:
    if inside_attention(model, path):
        parent = path.rpartition(".")[0]
        raise TargetError(
            f"{path!r} lies in an nn.MultiheadAttention, which reads its weight directly, so an "
            f"adapter on it would never act. Target the attention itself ({parent!r}): both its "
            f"projections are adapted then."
        )
    if isinstance(module, nn.MultiheadAttention):
        if use_dora:
            raise TargetError(
                f"{path!r}: MultiheadAttention does not support DoRA (yet), please set use_dora to "
                f"False, or leave it out with exclude_modules."
            )
        if not module._qkv_same_embed_dim:
            raise TargetError(
                f"{path!r} has kdim={module.kdim} and vdim={module.vdim} beside "
                f"embed_dim={module.embed_dim}. Only same embed for query/key/value is supported "
                f"as of now for MultiheadAttention. Leave it out with exclude_modules."
            )
        size = module.embed_dim
        return [
            Target(path, path, module, Shape("linear", 3 * size, size)),
            Target(f"{path}.out_proj", path, module, Shape("linear", size, size)),
        ]
    return [Target(path, path, module, module_shape(path, module))]


def trained_whole(config: MSPLoraConfig, key: str) -> str | None:
    """The entry of `modules_to_save` that takes `key` too: PEFT goes by how a name ends."""
    return next((name for name in config.modules_to_save or () if key.endswith(name)), None)


def module_shape(path: str, module: nn.Module) -> Shape:
    """The shape of a module's weight.

    Raises:
        TargetError: LoRA cannot adapt such a module.
    """
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        for name, usual in (("dilation", {1}), ("padding_mode", {"zeros"})):
            value = getattr(module, name)
            if not usual.issuperset(value if isinstance(value, tuple) else (value,)):
                raise TargetError(
                    f"{path!r} is a convolution with {name}={value!r}, which PEFT's LoRA does not "
                    f"apply to its own convolution. Leave it out with exclude_modules."
                )
        return Shape(
            "conv", module.out_channels, module.in_channels, module.kernel_size, module.groups
        )
    in_features, out_features = _peft.in_out_features(module)
    if in_features is None or out_features is None:
        inner = [f"{path}.{name}" for name, _ in module.named_children()]
        hint = f" Inside it are {some(inner)}." if inner else ""
        raise TargetError(
            f"{path!r} is a {type(module).__name__}, which has no weight that LoRA can adapt. "
            f"Target linear layers, convolutions, embeddings or nn.MultiheadAttention.{hint}"
        )
    layout = "embedding" if isinstance(module, nn.Embedding) else "linear"
    return Shape(layout, out_features, in_features)


def pattern_matches(pattern: str, key: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", key) is not None


def check_names(modules: Mapping[str, nn.Module], config: Any) -> None:
    """Refuse what the config of any method names in vain; the nearest there is is told."""
    paths = [path for path in modules if path]
    check_layers(modules[""], config, paths)
    for field in ("target_modules", "exclude_modules", "target_parameters"):
        _check_names(field, getattr(config, field, None), modules)
    _check_modules_to_save(config, paths)


def check_everything_matched(
    modules: Mapping[str, nn.Module], config: MSPLoraConfig, targets: list[Target]
) -> None:
    """Refuse every entry of the config that selects nothing, naming the nearest that would."""
    check_names(modules, config)
    _check_tokens(modules, config)
    if not _is_of_a_file(config):
        adapted = {target.key for target in targets}
        check_layers_reached(modules, config, adapted, _is_target)
        parameters = [its.key for its in targets if its.shape.layout == "experts"]
        check_none_left_out(modules[""], config, parameters)
        _check_whole_attention(config, targets)
    if not targets and not config.target_modules and not config.target_parameters:
        raise NoMatchError(
            f"target_modules = {_shown(config.target_modules)} names nothing to adapt. Name some "
            f"of this model's modules, such as {some(linear_names(modules))}; or use 'all-linear'."
        )
    if not targets:
        raise NoMatchError(
            f"All modules were excluded: what target_modules = {_shown(config.target_modules)} "
            f"matches is left out by exclude_modules = {_shown(config.exclude_modules)}, "
            f"layers_to_transform = {config.layers_to_transform} or modules_to_save = "
            f"{_shown(config.modules_to_save)}. Nothing would be trained."
        )
    for target in targets:
        whole = trained_whole(config, target.key)
        if whole is not None:
            raise TargetError(
                f"target_modules matches {target.key!r}, which modules_to_save names too, because "
                f"it ends in {whole!r}: it would be trained whole. Leave it out of one of them."
            )
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, name) or {}:
            if not any(pattern_matches(pattern, target.key) for target in targets):
                raise TargetError(
                    f"{name} has a key {pattern!r} that matches none of the adapted modules."
                    f"{nearest(pattern, {target.key.rpartition('.')[2] for target in targets})}"
                )


def _check_whole_attention(config: Any, targets: list[Target]) -> None:
    for target in targets:
        is_inner = target.key != target.path and target.shape.layout == "linear"
        if is_inner and _peft.is_excluded(config, target.key):
            raise TargetError(
                f"exclude_modules = {_shown(config.exclude_modules)} leaves out {target.key!r}, "
                f"but PEFT adapts both projections of an nn.MultiheadAttention or none. Leave out "
                f"{target.path!r}, or adapt all of it."
            )


def _check_modules_to_save(config: Any, paths: list[str]) -> None:
    """Refuse a module to train whole that there is not; of a task's heads one is enough."""
    task = config.task_type
    named = list(config.modules_to_save or ())
    heads = _HEADS_OF.get(task, ())
    if task == "QUESTION_ANS":
        named += heads  # which PEFT names only after it has put the adapter in
    elif set(named).issuperset(_CLASSIFIERS):
        heads = _CLASSIFIERS  # as for every adapter of a PeftModelForSequenceClassification
    of_a_file = _is_of_a_file(config)
    found = {name for name in named if any(path.endswith(name) for path in paths)}
    for name in named:
        if name not in found and name not in (HEADS if of_a_file else heads):
            raise TargetError(
                f"modules_to_save names {name!r}, but this model has nothing of that name."
                f"{nearest(name, [*_leaves(paths), *paths])}"
            )
    if named and not found and not of_a_file:
        raise TargetError(
            f"modules_to_save = {list(dict.fromkeys(named))}, as PEFT fills it in for a classifier "
            f"or for answers, and this model has none of these: its head would stay as it is. "
            f"Name the head in modules_to_save, or leave task_type out. The model's parts are "
            f"{some([path for path in paths if '.' not in path])}."
        )


def _is_of_a_file(config: Any) -> bool:
    """Whether what it adapts was settled when its file was made: there is a fingerprint to tell.

    What is refused of a new adapter is loaded then as it was trained.
    """
    return getattr(config, "_made_for", (None, None))[1] is not None


def _names(modules: Mapping[str, nn.Module], of_parameters: bool) -> list[str]:
    if not of_parameters:
        return [path for path in modules if path]
    return [
        f"{path}.{name}" if path else name
        for path, module in modules.items()
        for name in own_parameters(_peft.unwrapped(module))
    ]


def _check_names(field: str, wanted: Any, modules: Mapping[str, nn.Module]) -> None:
    """Refuse what `field` names in vain."""
    if not wanted or (isinstance(wanted, str) and wanted.lower() == "all-linear"):
        return
    names = _names(modules, field == "target_parameters")
    if isinstance(wanted, str):
        if not any(re.fullmatch(wanted, name) for name in names):
            words = [word for word in re.findall(r"\w+", wanted) if not word.isdigit()]
            raise NoMatchError(
                f"{field} = {wanted!r} is a regular expression that matches none of this model's "
                f"names in full, such as {names[-1]!r}."
                f"{_instead_of(words[-1] if words else wanted, field, modules)}"
            )
        return
    known = {ending for name in names for ending in endings(name)}
    for entry in sorted(wanted):
        if entry not in known:
            said = f"{field} names {entry!r}, but this model has nothing of that name."
            if field == "target_modules":  # as PEFT says it
                said = f"Target modules {{{entry!r}}} not found in the base model."
            raise NoMatchError(f"{said}{_instead_of(entry, field, modules)}")


def _instead_of(entry: str, field: str, modules: Mapping[str, nn.Module]) -> str:
    """What to name instead of `entry`: its name in another release, or the nearest there is."""
    parts = entry.split(".")
    last = parts[-1]
    names = _names(modules, field == "target_parameters")
    here, elsewhere = _leaves(names), _leaves(_names(modules, field != "target_parameters"))
    for name in (last, *_RENAMED.get(last, ())):
        if name in here and name != last:
            return f" Releases of transformers differ in names: here it may be {name!r}."
        if name in elsewhere and field == "target_modules":
            return f" There is a parameter {name!r}, no module: name it in target_parameters."
        if name in elsewhere and field == "target_parameters":
            return f" There is a module {name!r}, no parameter: name it in target_modules."
    if last in here:  # under another parent
        alike = {".".join(name.split(".")[-len(parts) :]) for name in names if name.endswith(last)}
        return f" There is {some(sorted(alike), 3)}."
    return nearest(entry, [*here, *names]) or f" It has {some(here)}."


def inside_attention(model: nn.Module, path: str) -> bool:
    parent = model.get_submodule(path.rpartition(".")[0])
    return isinstance(parent, nn.MultiheadAttention)


def linear_names(modules: Mapping[str, nn.Module]) -> list[str]:
    """What a user could name: the last parts of linear layers' names, or all of them if numbers."""
    paths = [path for path, its in modules.items() if isinstance(_peft.unwrapped(its), nn.Linear)]
    return _leaves(paths) or paths


def _leaves(names: list[str]) -> list[str]:
    return sorted({leaf for name in names if not (leaf := name.rpartition(".")[2]).isdigit()})


def some(names: list[str], count: int = 12) -> str:
    shown = ", ".join(repr(name) for name in names[:count])
    return shown + (f" and {len(names) - count} more" if len(names) > count else "")


def _shown(value: Any) -> str:
    return str(sorted(value)) if isinstance(value, (set, list, tuple)) else repr(value)


def model_type_of(model: nn.Module) -> str | None:
    config: Any = getattr(model, "config", None)
    if isinstance(config, dict):
        return config.get("model_type")
    found = getattr(config, "model_type", None)
    if not isinstance(found, str) and hasattr(config, "to_dict"):  # where PEFT looks
        found = config.to_dict().get("model_type")
    return found


def input_embedding(model: Any) -> tuple[str, Tensor] | None:
    try:
        module = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    base: Any = _peft.unwrapped(module)
    if not isinstance(base, nn.Embedding):
        return None
    path = next(path for path, its in model.named_modules() if its is module)
    return path, base.weight


def _check_tokens(modules: Mapping[str, nn.Module], config: MSPLoraConfig) -> None:
    wanted = config.trainable_token_indices
    if not wanted:
        return
    embedding = input_embedding(modules[""])
    by_name = wanted if isinstance(wanted, dict) else {embedding[0]: wanted} if embedding else {}
    paths = [path for path in modules if path]
    for name, indices in by_name.items():
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            raise TargetError(
                f"trainable_token_indices: Target modules {{{name!r}}} not found in the base model."
                f"{nearest(name, [*_leaves(paths), *paths])}"
            )
        for path, module in modules.items():
            base = _peft.unwrapped(module)
            if not path.endswith(name) or not isinstance(base, nn.Embedding):
                continue
            beyond = [index for index in indices if not 0 <= index < base.num_embeddings]
            if beyond:
                raise TargetError(
                    f"trainable_token_indices asks for {beyond}, but {path!r} has the tokens 0 to "
                    f"{base.num_embeddings - 1}."
                )
