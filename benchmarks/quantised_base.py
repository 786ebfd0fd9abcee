"""One quantised base, adapted by a pyramid and by PEFT's LoRA.

One process of `benchmarks/quantised.py`, which runs it in an environment per library:

    python benchmarks/quantised_base.py SCHEME MODEL_FOLDER DATA

A row says, for each method: whether the adapter starts at the base; the loss before and after some
steps; how far the logits are after merging, after unmerging, and after saving and loading onto a
newly loaded base; or with which words PEFT refuses. The pyramid is also converted to a plain LoRA,
which PEFT then loads onto the same base: it has to give the same logits and merge as well.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import msplora

STEPS, RATE, LENGTH, ROWS = 20, 3e-3, 48, 8
GROUP = 32
# By name: "all-linear" finds the layers of bitsandbytes and torchao only, with a LoRA too.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Load = Callable[[], Any]


def torchao(name: str, folder: Path, texts: list[str]) -> Load:
    """Quantised while it is loaded, by one of torchao's configs."""
    import torchao.quantization as ao
    from transformers import TorchAoConfig

    config = TorchAoConfig(getattr(ao, name)())
    return lambda: load(folder, quantization_config=config, device_map={"": "cpu"})


def hqq(bits: int, folder: Path, texts: list[str]) -> Load:
    """Quantised layer by layer by HQQ's own class: transformers 5 cannot while it loads."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    def quantised() -> Any:
        model = load(folder)
        for path, module in list(model.named_modules()):
            if path.endswith("_proj"):
                model.set_submodule(
                    path,
                    HQQLinear(
                        module,
                        BaseQuantizeConfig(nbits=bits, group_size=GROUP),
                        compute_dtype=torch.float32,
                        device="cpu",
                    ),
                )
        return model

    return quantised


def gptq(method: str, folder: Path, texts: list[str]) -> Load:
    """Quantised by gptqmodel on some texts, saved, and loaded by transformers."""
    from gptqmodel import GPTQModel, QuantizeConfig

    made = folder / method
    if not made.exists():
        config = QuantizeConfig(bits=4, group_size=GROUP, quant_method=method, device="cpu")
        model = GPTQModel.load(str(folder), config)
        model.quantize(texts, batch_size=1)
        model.save(str(made))
    return lambda: load(made, device_map={"": "cpu"})


SCHEMES: dict[str, Callable[[Path, list[str]], Load]] = {
    "torchao int8, weights": lambda *given: torchao("Int8WeightOnlyConfig", *given),
    "torchao int8, weights and activations": lambda *given: torchao(
        "Int8DynamicActivationInt8WeightConfig", *given
    ),
    "HQQ 8 bits": lambda *given: hqq(8, *given),
    "HQQ 4 bits": lambda *given: hqq(4, *given),
    "GPTQ 4 bits": lambda *given: gptq("gptq", *given),
    "AWQ 4 bits": lambda *given: gptq("awq", *given),
}


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def judged(load_base: Load, config: Any, ids: Tensor, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Adapt, train, save, load, merge, unmerge; return the trained model and what was found."""
    base = load_base()
    before = logits(base, ids)
    torch.manual_seed(0)
    model = get_peft_model(base, config)
    found: dict[str, Any] = {"starts_off_by": distance(logits(model, ids), before)}
    found["losses"] = train(model, ids)
    trained = logits(model, ids)
    found["moved"] = distance(trained, before)
    model.save_pretrained(str(folder))
    loaded = PeftModel.from_pretrained(load_base(), str(folder)).eval()
    found["reloaded_differs_by"] = distance(logits(loaded, ids), trained)
    return model, found | merged(loaded, ids)


def train(model: Any, ids: Tensor) -> list[float]:
    """The loss of the first step and of the last; every factor has to get a gradient."""
    parameters = [its for its in model.parameters() if its.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    losses = []
    model.train()
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(its.grad is not None for its in parameters)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return [losses[0], losses[-1]]


def merged(model: Any, ids: Tensor) -> dict[str, Any]:
    """How far the logits are after merging and after unmerging, or why PEFT does not merge."""
    expected = logits(model, ids)
    try:
        model.merge_adapter()
    except (NotImplementedError, ValueError, AttributeError) as error:
        first, *_ = str(error).splitlines() or ["without words"]
        return {"merge_refused": f"{type(error).__name__}: {first}"}
    found = {"merged_differs_by": distance(logits(model, ids), expected)}
    model.unmerge_adapter()
    return found | {"unmerged_differs_by": distance(logits(model, ids), expected)}


def row(scheme: str, base: Path, ids: Tensor, texts: list[str]) -> dict[str, Any]:
    """What both methods do on one base."""
    load_base = SCHEMES[scheme](base, texts)
    quantised = load_base()
    found: dict[str, Any] = {
        "quantisation_moved": distance(logits(quantised, ids), logits(load(base), ids)),
        "layers": sorted({type(its).__name__ for its in adaptable(quantised)}),
    }
    options = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS}
    with tempfile.TemporaryDirectory() as scratch:
        pyramid, plain = Path(scratch) / "pyramid", Path(scratch) / "plain"
        model, found["pyramid"] = judged(load_base, msplora.MSPLoraConfig(**options), ids, pyramid)
        found["pyramid"]["classes"] = sorted(classes(model))
        found["parameters"] = msplora.plan(model, model.peft_config["default"]).parameters
        msplora.to_lora(pyramid, plain, verify=False)
        as_lora = PeftModel.from_pretrained(load_base(), str(plain)).eval()
        found["as_lora"] = {
            "differs_by": distance(logits(as_lora, ids), logits(model, ids)),
            "classes": sorted(classes(as_lora)),
            **merged(as_lora, ids),
        }
        _, found["lora"] = judged(load_base, LoraConfig(**options), ids, Path(scratch) / "lora")
    return found


def adaptable(model: Any) -> list[Any]:
    return [its for name, its in model.named_modules() if name.endswith("_proj")]


def classes(model: Any) -> set[str]:
    """The classes that PEFT chose for the adapted layers."""
    return {type(its).__name__ for its in adaptable(model.get_base_model())}


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def distance(found: Tensor, expected: Tensor) -> float:
    largest = (found - expected).abs().max().item()
    assert math.isfinite(largest)
    return largest


def main() -> None:
    """Print the row of one scheme on one base."""
    scheme, base, data = sys.argv[1], Path(sys.argv[2]).absolute(), Path(sys.argv[3])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    texts = [f"{its['instruction']}\n{its['output']}" for its in json.loads(data.read_text())]
    os.chdir(base)  # gptqmodel leaves logs where it is
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [tokenizer(text)["input_ids"] for text in texts]
    ids = torch.tensor([its[:LENGTH] for its in rows if len(its) >= LENGTH][:ROWS])
    print(json.dumps(row(scheme, base, ids, texts[:128])))


if __name__ == "__main__":
    main()
