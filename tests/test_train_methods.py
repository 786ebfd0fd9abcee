"""`method` in a run's config: the sisters and PEFT's own methods, beside MSPLoRA and LoRA."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from msplora.errors import TargetError
from msplora.train.base_model import Base, load_base
from msplora.train.data_classification import Classes
from msplora.train.methods import adapt
from msplora.train.peft_methods import METHODS
from msplora.train.run_trainer import settings_groups
from msplora.train.settings_file import make_settings
from runs import Result, config_on, msplora, same, save_bases, tensors, write_config
from test_interruption import at_step, send
from tiny import EXPERTS_ARE_PARAMETERS, MODELS

# So that ranks move, or are pruned, in the fourteen steps of a run.
OWN: dict[str, Any] = {
    "elalora": {"warmup_steps": 1, "final_steps": 1, "interval": 2},
    "adalora": {"init_r": 6, "tinit": 1, "tfinal": 4},
    "gralora": {"gralora_k": 2, "hybrid_r": 2},
    "vera": {"r": 16},
    "randlora": {"r": 4, "alpha": 16},
    "lily": {"r": 4, "stride_A": 2},
}
# A stop in the middle of an epoch; ElaLoRA moves ranks before it and after.
STOP = 5


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bases(
        tmp_path_factory.mktemp("bases"), rows=64, hidden_size=32, intermediate_size=48
    )


def content(bases: Path, method: str, task: str = "classification", **changes: Any) -> dict:
    classifies = task == "classification"
    adapter = {"target_modules": ["query", "value"] if classifies else ["q_proj", "v_proj"], "r": 4}
    return config_on(
        bases, task, method=method, adapter=adapter, training={"epochs": 2}, **(OWN | changes)
    )


def train(here: Path, config: dict[str, Any], output: str = "run", *flags: object) -> Result:
    file = write_config(here / "config.yaml", config | {"output": str(here / output)})
    return msplora("train", file, *flags)


def refused(here: Path, config: dict[str, Any]) -> str:
    result = train(here, config)
    assert result.code == 1
    assert not (here / "run").exists()
    assert not (here / "run.unfinished").exists()
    return result.error


def adapter_config(here: Path) -> dict[str, Any]:
    return json.loads((here / "run/adapter/adapter_config.json").read_text())


@pytest.mark.slow
def test_a_run_with_moving_ranks(bases: Path, tmp_path: Path) -> None:
    """The quickest proof that a method beside LoRA trains, saves, and is what was measured."""
    result = train(tmp_path, content(bases, "elalora", "sft"))
    assert result.code == 0, result.error
    assert "4 ranks moved" in result.out
    assert "trained base" not in result.out  # it is an adapter that trains
    assert "method elalora does not read gralora, adalora, vera, randlora, lily" in result.out
    saved = adapter_config(tmp_path)
    assert saved["peft_type"] == "ELALORA"
    assert saved["rank_pattern"]
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["reloaded"]["loss"] == pytest.approx(metrics["best"]["loss"])
    ranks = [len(its) for name, its in tensors(tmp_path / "run/adapter").items() if "_E" in name]
    assert sum(ranks) == 4 * len(ranks)
    numbers = sum(its.numel() for its in tensors(tmp_path / "run/adapter").values())
    card = (tmp_path / "run/README.md").read_text()
    assert "import msplora.sisters" in card
    at_the_start = metrics["trainable"]
    assert f"| adapter | {numbers:,} |\n| adapter, at the start | {at_the_start:,} |" in card
    assert "numbers train at the start" in (tmp_path / "run/plan.txt").read_text()


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(its, marks=pytest.mark.slow if its == "hydra" else pytest.mark.thorough)
        for its in (*METHODS, "dora", "rslora")
    ],
)
def test_every_method_trains_and_resumes_to_the_bit(
    bases: Path, tmp_path: Path, method: str
) -> None:
    task = "sft" if method in ("vera", "adalora", "hydra") else "classification"
    config = content(bases, method, task)
    assert train(tmp_path, config).code == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["reloaded"]["loss"] == pytest.approx(metrics["best"]["loss"], rel=1e-5)
    judged = msplora("eval", tmp_path / "run", "--json").json()
    assert judged["loss"] == pytest.approx(metrics["best"]["loss"], rel=1e-4)

    with at_step(STOP, send(signal.SIGTERM)):
        assert train(tmp_path, config, "stopped").code == 128 + signal.SIGTERM
    resumed = train(tmp_path, config, "stopped", "--resume")
    if method == "adalora":
        assert resumed.code == 1
        assert "cannot be resumed" in resumed.error
        return
    assert resumed.code == 0, resumed.error
    whole, again = (tensors(tmp_path / its / "adapter") for its in ("run", "stopped"))
    assert whole
    assert same(whole, again)


@pytest.mark.thorough
def test_what_converts_and_what_does_not(bases: Path, tmp_path: Path) -> None:
    for method in ("hydra", "gralora"):
        assert train(tmp_path, content(bases, method), method).code == 0
        merged = msplora(
            "convert", tmp_path / method, tmp_path / f"{method}-merged", "--to", "merged"
        )
        assert (merged.code == 0) == METHODS[method].merges
        if merged.code:
            assert "GRALORA adapter; --to merged takes" in merged.error
        for verb in (
            ["convert", tmp_path / method, tmp_path / "lora", "--to", "lora"],
            ["analyse", tmp_path / method],
        ):
            result = msplora(*verb)
            assert result.code == 1
            assert method.upper() in result.error, verb


@pytest.mark.thorough
def test_adalora_prunes_as_it_is_told(bases: Path, tmp_path: Path) -> None:
    assert train(tmp_path, content(bases, "adalora", "sft")).code == 0
    saved = adapter_config(tmp_path)
    steps = json.loads((tmp_path / "run/metrics.json").read_text())["best"]["step"]
    assert (saved["init_r"], saved["target_r"]) == (6, 4)
    assert (saved["tinit"], saved["tfinal"], saved["deltaT"]) == (1, 4, 1)
    assert saved["total_step"] >= steps
    kept = [sum(its) for its in saved["rank_pattern"].values()]
    assert sum(kept) == 4 * len(kept)
    ranks = [len(its) for name, its in tensors(tmp_path / "run/adapter").items() if "_E" in name]
    assert sorted(ranks) == sorted(kept)
    numbers = sum(its.numel() for its in tensors(tmp_path / "run/adapter").values())
    assert f"| adapter | {numbers:,} |" in (tmp_path / "run/README.md").read_text()


def test_each_method_gets_what_it_reads(bases: Path) -> None:
    from msplora.train.base_model import load_base
    from msplora.train.methods import adapter_config as made
    from msplora.train.settings_file import make_settings

    def config(method: str, **changes: Any) -> Any:
        asked = content(bases, method, "sft", **changes)
        asked["adapter"] |= {"lora_alpha": 12, "lora_dropout": 0.25}
        settings = make_settings(asked, "here")
        return made(settings, base)

    base = load_base(make_settings(content(bases, "lora", "sft"), "here"), None)
    hydra = config("hydra", hydra={"r_parallel": 3, "scale": 0.5})
    assert (hydra.r_parallel, hydra.r_sequential, hydra.scale) == (3, 8, 0.5)
    assert hydra.lora_dropout == 0.25
    elalora = config("elalora")
    assert (elalora.r, elalora.lora_alpha, elalora.interval) == (4, 12, 2)
    vera = config("vera")
    assert (vera.r, vera.vera_dropout) == (16, 0.25)
    randlora = config("randlora")
    assert (randlora.r, randlora.randlora_alpha, randlora.randlora_dropout) == (4, 16, 0.25)
    adalora = config("adalora")
    assert (adalora.target_r, adalora.init_r, adalora.lora_alpha) == (4, 6, 12)
    assert config("dora").use_dora
    assert config("rslora").use_rslora
    assert not config("lora").use_rslora
    if hasattr(peft, "GraloraConfig"):
        gralora = config("gralora")
        assert (gralora.r, gralora.alpha, gralora.gralora_dropout) == (4, 12, 0.25)
        assert (gralora.gralora_k, gralora.hybrid_r) == (2, 2)


def test_what_a_method_cannot_do_is_refused(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Did you mean 'elalora'?" in refused(tmp_path, content(bases, "elalore"))
    error = refused(tmp_path, content(bases, "elalora", elalora={"intervall": 3}))
    assert "unknown key 'elalora.intervall'. Did you mean 'elalora.interval'?" in error
    error = refused(tmp_path, content(bases, "hydra", hydra={"r_parallel": 0}))
    assert "hydra.r_parallel = 0: it should be greater than or equal to 1" in error
    error = refused(tmp_path, content(bases, "elalora", elalora={"warmup_steps": 500}))
    assert "never move" in error
    flat = content(bases, "elalora")
    flat["adapter"]["r"] = 1
    assert "never move: the adapted layers" in refused(tmp_path, flat)
    flat["adapter"]["r"] = 32  # as wide as the layers are
    assert "and take no more than 256" in refused(tmp_path, flat)
    error = refused(tmp_path, content(bases, "adalora", adalora={"tfinal": 500}))
    assert "never prune" in error
    error = refused(tmp_path, content(bases, "elalora", devices={"processes": 2}))
    assert "one process" in error
    error = refused(tmp_path, content(bases, "adalora", "dpo"))
    assert "AdaLoRA allows one" in error
    for rank in (2, 4):
        error = refused(tmp_path, content(bases, "adalora", adalora={"init_r": rank}))
        assert f"adalora.init_r = {rank} is not above adapter.r = 4" in error
    excluding = content(bases, "vera")
    excluding["adapter"] |= {"exclude_modules": ["value"]}
    assert "cannot leave modules out" in refused(tmp_path, excluding)
    assert "init_from" in refused(tmp_path, content(bases, "vera", init_from="somewhere"))
    error = refused(tmp_path, content(bases, "lily", quantization="4bit"))
    assert "Use one of those, or leave quantization out" in error
    if hasattr(peft, "GraloraConfig"):
        uneven = content(bases, "gralora", "sft", gralora={"gralora_k": 3})
        uneven["adapter"]["r"] = 6
        assert "'gralora' cannot be put on LlamaForCausalLM: in_features" in refused(
            tmp_path, uneven
        )
    monkeypatch.delattr(peft, "GraloraConfig", raising=False)
    error = refused(tmp_path, content(bases, "gralora"))
    assert "is PEFT's from version 0.19 on" in error


def test_adaloras_penalty_is_in_no_loss_and_its_gradient_in_every_step() -> None:
    """Against PEFT, which adds it to the loss that the model returns."""
    from peft import AdaLoraConfig, get_peft_model

    from msplora.train.adalora import AllocateRanks, leave_penalty_out
    from msplora.train.settings_methods import AdaLoraSettings
    from tiny import MODELS

    def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss.backward()
        return {
            name: its.grad.clone() for name, its in model.named_parameters() if its.grad is not None
        }

    def loss(model: Any) -> torch.Tensor:
        return model(**batch, labels=batch["input_ids"]).loss

    batch = MODELS["llama"].batch()
    config = AdaLoraConfig(
        target_modules=["q_proj"], total_step=10, task_type="CAUSAL_LM", orth_reg_weight=0.7
    )
    plain = loss(MODELS["llama"].model())
    model = get_peft_model(MODELS["llama"].model(), config)
    penalised = loss(model)
    assert penalised > plain + 0.1
    expected = gradients(model, penalised)
    leave_penalty_out(model)
    for its in (model.train(), model.eval()):
        assert torch.isclose(loss(its), plain)
    assert model.peft_config["default"].orth_reg_weight == 0.7
    gradients(model.train(), loss(model))
    callback: Any = AllocateRanks(AdaLoraSettings())
    callback.on_pre_optimizer_step(None, None, None, model=model)
    for name, its in model.named_parameters():
        if its.grad is not None:
            torch.testing.assert_close(its.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.thorough
def test_adaloras_penalty_reaches_a_run(bases: Path, tmp_path: Path) -> None:
    found = []
    for weight in (0.0, 100.0):
        changes = {"init_r": 6, "tinit": 1, "tfinal": 4, "orth_reg_weight": weight}
        assert train(tmp_path, content(bases, "adalora", "sft", adalora=changes)).code == 0
        found.append(tensors(tmp_path / "run/adapter"))
        assert adapter_config(tmp_path)["orth_reg_weight"] == weight
        shutil.rmtree(tmp_path / "run")
    assert not same(*found)


def test_b_has_the_rate_of_a_where_the_factor_is_not_read(bases: Path) -> None:
    rates = {}
    for method in ("adalora", "lora"):
        settings = make_settings(content(bases, method), "a test")
        settings.training.b_learning_rate_factor = 16.0
        base = load_base(settings, Classes(("text",), "label", ("bad", "good")))
        adapted = adapt(base, settings)
        groups = settings_groups(adapted.model, settings, base.head)
        rates[method] = {group["lr"] / settings.training.learning_rate for group in groups}
    assert rates == {"adalora": {1.0}, "lora": {1.0, 16.0}}


@pytest.mark.parametrize("method", ["lora", "dora", "gralora", "adalora", "vera", "elalora"])
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("target_modules", ["query", "vlaue"], "'vlaue'.*Did you mean 'value'"),
        ("layers_to_transform", [0, 99], r"\[99\], which no list of blocks has"),
    ],
)
def test_a_name_of_nothing_is_refused_of_every_method(
    bases: Path, method: str, key: str, value: Any, said: str
) -> None:
    """As of a pyramid: else runs that differ in their method would differ in what they adapt."""
    if method == "gralora" and not hasattr(peft, "GraloraConfig"):
        return
    asked = content(bases, method)
    asked["adapter"][key] = value
    settings = make_settings(asked, "a test")
    base = load_base(settings, Classes(("text",), "label", ("bad", "good")))
    with pytest.raises(TargetError, match=said):
        adapt(base, settings)


@pytest.mark.skipif(not EXPERTS_ARE_PARAMETERS, reason="its experts are modules there")
def test_names_that_peft_translates_are_taken(bases: Path) -> None:
    """Of experts that transformers fused, as the checkpoint has them."""
    asked = content(bases, "lora", "sft")
    asked["adapter"]["target_modules"] = ["q_proj", "w1", "w2", "w3"]
    settings = make_settings(asked, "a test")
    adapted = adapt(Base(MODELS["mixtral"].model(), None, torch.float32), settings)
    assert adapted.model.peft_config["default"].target_modules == {"q_proj"}
    trained = {name for name, its in adapted.model.named_parameters() if its.requires_grad}
    assert any(".experts." in name for name in trained)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_that_trains_of_adalora_is_saved(bases: Path, tmp_path: Path, dtype: str) -> None:
    settings = make_settings(content(bases, "adalora", "sft", dtype=dtype), "a test")
    adapted = adapt(load_base(settings, None), settings)
    trains = {name: its for name, its in adapted.model.named_parameters() if its.requires_grad}
    assert adapted.trainable.total == sum(its.numel() for its in trains.values())
    adapted.model.save_pretrained(str(tmp_path))
    assert {name.replace(".default", "") for name in trains} == tensors(tmp_path).keys()
