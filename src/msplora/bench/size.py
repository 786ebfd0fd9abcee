"""What an adapter costs besides training: putting it into a model, its file, its singular values.

Injection is timed on the meta device, where only the work of planning and of making layers is left:
no model of 7B parameters has to be there.
"""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from msplora import MSPLoraConfig
from msplora.spectrum import singular_values_of

from .methods import ALPHA, CONTROL, RANK
from .models import trainable
from .results import Row
from .size_points import FilePoint, InjectPoint, ValuesPoint
from .timing import Seconds, quartiles, ratios, run_rounds

WARMUP = 2
DENSE_ROUNDS = 5
"""Rounds of singular values, at most: those of a dense matrix take seconds each."""

CONFIGS: Mapping[str, type[LoraConfig]] = {
    "lora": LoraConfig,
    CONTROL: LoraConfig,
    "msplora": MSPLoraConfig,
}
VALUES_METHODS = ("dense", "factors")

OnStep = Callable[[], object]


def measure_inject(point: InjectPoint, rounds: int, on_step: OnStep = lambda: None) -> list[Row]:
    """Time planning and injecting, each time into a new model."""

    def build() -> Any:
        with torch.device("meta"):
            return _model(point, point.layers)

    seconds = _time_on_new_models(
        build, lambda name, model: get_peft_model(model, _config(name, point)), rounds, on_step
    )
    return [
        {**point.keys(), "method": name, "rounds": rounds, "seconds": quartiles(own)}
        | {"to_lora": _to_lora(seconds, name)}
        for name, own in seconds.items()
    ]


def measure_file(point: FilePoint, rounds: int, on_step: OnStep = lambda: None) -> list[Row]:
    """Save every method's adapter, weigh the file, and load it into a new model."""
    base = _model(point).requires_grad_(False)
    with tempfile.TemporaryDirectory() as parent:
        folders = {name: Path(parent) / name for name in CONFIGS}
        models: dict[str, Any] = {
            name: get_peft_model(_copy(base), _config(name, point)) for name in CONFIGS
        }
        counts = {name: sum(its.numel() for its in trainable(its)) for name, its in models.items()}
        saving = run_rounds(
            {
                name: lambda its=its, name=name: its.save_pretrained(folders[name])
                for name, its in models.items()
            },
            rounds,
            warmup=WARMUP,
            on_step=on_step,
        )
        models.clear()
        loading = _time_on_new_models(
            lambda: _copy(base),
            lambda name, model: PeftModel.from_pretrained(model, str(folders[name])),
            rounds,
            on_step,
        )
        sizes = {name: _size_and_header(folder) for name, folder in folders.items()}
    return [
        {**point.keys(), "method": name, "rounds": rounds, "trainable": counts[name]}
        | {"bytes": sizes[name][0], "header_bytes": sizes[name][1]}
        | {"save_seconds": quartiles(saving[name]), "load_seconds": quartiles(loading[name])}
        | {"save_to_lora": _to_lora(saving, name), "load_to_lora": _to_lora(loading, name)}
        for name in CONFIGS
    ]


def measure_values(point: ValuesPoint, rounds: int, on_step: OnStep = lambda: None) -> list[Row]:
    """Time the singular values of an update from its factors, and from the dense matrix.

    The dense one is there already when its clock starts. They are compared with those of the dense
    matrix in float64.
    """
    generator = torch.Generator().manual_seed(0)
    a_RI = torch.randn(point.rank, point.side, generator=generator)
    b_OR = torch.randn(point.side, point.rank, generator=generator)
    dense = b_OR @ a_RI
    rounds = min(rounds, DENSE_ROUNDS)
    seconds = run_rounds(
        {
            "dense": lambda: torch.linalg.svdvals(dense),
            "factors": lambda: singular_values_of(a_RI, b_OR),
        },
        rounds,
        warmup=1,
        on_step=on_step,
    )
    own = singular_values_of(a_RI, b_OR)
    expected = torch.linalg.svdvals(b_OR.double() @ a_RI.double())[: len(own)]
    difference = float(((own - expected) / expected).abs().max())
    faster = quartiles(ratios(seconds["dense"], seconds["factors"]))
    common = [
        {**point.keys(), "method": name, "rounds": rounds, "seconds": quartiles(seconds[name])}
        for name in VALUES_METHODS
    ]
    return [
        common[0] | {"max_relative_difference": None, "times_faster": None},
        common[1] | {"max_relative_difference": difference, "times_faster": faster},
    ]


def _time_on_new_models(
    build: Callable[[], Any], work: Callable[[str, Any], object], rounds: int, on_step: OnStep
) -> Seconds:
    """Time `work` of every method, each time on a new model, whose building is off the clock."""
    model = build()

    def renew() -> None:
        nonlocal model
        model = None  # the old one is gone before there is a new one
        model = build()
        on_step()

    def step(name: str) -> None:
        work(name, model)

    with _quiet():
        return run_rounds(
            {name: lambda its=name: step(its) for name in CONFIGS},
            rounds,
            warmup=WARMUP,
            on_step=renew,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _model(point: InjectPoint | FilePoint, layers: int | None = None) -> Any:
    """The model without a classifier's head, so that "all-linear" means the blocks' layers."""
    import transformers

    shape = point.its_shape
    config = shape.config(layers)
    if shape.family == "llama":
        return transformers.LlamaForCausalLM(config)
    return transformers.RobertaModel(config, add_pooling_layer=False)


def _copy(base: Any) -> Any:
    """A model of its own on the same weights."""
    return copy.deepcopy(base, {id(its): its for its in [*base.parameters(), *base.buffers()]})


def _config(method: str, point: InjectPoint | FilePoint) -> LoraConfig:
    return CONFIGS[method](r=RANK, lora_alpha=ALPHA, target_modules=point.target_modules)


def _to_lora(seconds: Seconds, method: str) -> list[float]:
    return quartiles(ratios(seconds[method], seconds["lora"]))


def _size_and_header(folder: Path) -> tuple[int, int]:
    """The bytes of a saved adapter's tensors' file, and those of its header, length included."""
    file = folder / "adapter_model.safetensors"
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        json.loads(opened.read(length))
    return file.stat().st_size, 8 + length
