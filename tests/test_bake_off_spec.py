"""What a bake-off asks for is checked, and its sizes are found, before the first run."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from bake_offs import SPEC, spec
from msplora.bakeoff import sizes
from msplora.bakeoff.sizes import Prepared, prepare
from msplora.errors import ConfigError, MSPLoraError
from msplora.train.methods import adapt
from msplora.train.run import prepare_job
from runs import answered_rows, labelled_rows, save_decoder, write_jsonl


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"methods": {"a": {"method": "loar"}}}, r"method = 'loar'.*Did you mean 'lora'"),
        ({"choose": {"tasks": ["on"]}}, r"choose.tasks names 'on'.*Did you mean 'one'"),
        ({"baseline": "laro"}, r"baseline names 'laro'.*Did you mean 'lora'"),
        ({"method": {}}, r"unknown key 'method'. Keys of the runs stand under base"),
        ({"reject": {"behnd": 1}}, r"unknown key 'reject.behnd'. Did you mean 'behind'"),
        ({"learning_rates": [0.0]}, r"learning_rates.0 = 0.0: it should be greater than 0"),
        ({"tasks": {"a b": {}}}, r"tasks.a b: a name becomes part of a folder's"),
        ({"base": {**SPEC["base"], "seed": 1}}, r"base has 'seed': it is among the `seeds`"),
        ({"seeds": [1, 1]}, r"seeds = \[1, 1\] has 1 twice"),
        (
            {"methods": {"a": {"method": "lora", "budget": "pyramyd"}, "pyramid": {}}},
            r"methods.a: budget = 'pyramyd' names no other method. Did you mean 'pyramid'",
        ),
        ({"methods": {"a": {"method": "lora", "budget": -1}}}, r"it should be a number of param"),
        (
            {"methods": {"a": {"method": "lora", "learning_rates": [1, 1]}}},
            r"methods.a: learning_rates = \[1, 1\]: it should be a list of numbers above 0",
        ),
        ({"learning_rates": [1e-3, 1.0000001e-3]}, r"that differ in their first six digits"),
        ({"learning_rates": [math.inf]}, r"learning_rates.0 = inf: it should be a finite number"),
        ({"seeds": [0, -1]}, r"seeds.1 = -1: it should be greater than or equal to 0"),
        ({"choose": {"tasks": ["one", "one"]}}, r"choose.tasks = .* has 'one' twice"),
        ({"methods": {"a": {"method": "lora", "budget": []}}}, r"a list should hold at least one"),
        (
            {"methods": {"a": {"method": "lora", "budget": [9, 9]}}},
            r"budget = \[9, 9\]: .* and none twice",
        ),
        (
            {"methods": {"a": {"method": "lora", "training": {"learning_rate": 1e-3}}}},
            r"methods.a has 'training.learning_rate': each method chooses it",
        ),
        (
            {"base": {**SPEC["base"], "data": {"validation_fraction": 0}}},
            r"compared on held-out rows, and task one has none|it needs held-out rows",
        ),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        spec(**changes)


def _sizes(**methods: Any) -> Prepared:
    return prepare(spec(methods={"lora": {"method": "lora"}, **methods}))


def test_a_budget_is_met_by_the_smallest_rank_that_is_not_below_it(bake_off_folder: Path) -> None:
    found = _sizes(
        pyramid={"method": "msplora", "adapter": {"r": 8}},
        small={"method": "lora", "budget": "pyramid"},
        fixed={"method": "lora", "budget": [1300, 2048]},
        blocks={"method": "gralora", "gralora": {"gralora_k": 2}, "budget": 1000},
    )
    a_rank = 4 * 2 * (16 + 16)  # layers, sites, in + out
    assert found.sizes == {
        "lora": 8 * a_rank,
        "pyramid": 8 * 64 + 3 * 4 * 64 + 4 * 2 * 64,
        "small": 7 * a_rank,
        "fixed@1300": 6 * a_rank,
        "fixed@2048": 8 * a_rank,
        "blocks": 4 * a_rank,
    }
    assert found.metrics == {"one": "accuracy", "two": "accuracy"}
    ranks = {
        name: its.content["adapter"]["r"] for name, its in list(found.bake_off.entrants.items())[2:]
    }
    assert ranks == {"small": 7, "fixed@1300": 6, "fixed@2048": 8, "blocks": 4}
    assert found.ranks == {name: f"adapter.r = {rank}" for name, rank in ranks.items()}


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ({"method": "lora", "budget": 40}, r"no rank comes near it: adapter.r = 1 trains 256"),
        ({"method": "hydra", "budget": 900}, r"set hydra.r_parallel and hydra.r_sequential"),
        (
            {"method": "lora", "budget": 10**9},
            r"no adapter.r up to 4,096 trains as much; adapter.r = 4,096 trains 1,048,576",
        ),
    ],
)
def test_a_budget_that_no_rank_reaches_is_refused(
    bake_off_folder: Path, method: dict[str, Any], error: str
) -> None:
    with pytest.raises(ConfigError, match=error):
        _sizes(other=method)


def test_what_is_wrong_with_a_method_at_any_rank_is_said_at_once(
    bake_off_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []

    def counted(base: Any, settings: Any) -> Any:
        built.append(settings.adapter.r)
        return adapt(base, settings)

    monkeypatch.setattr(sizes, "adapt", counted)
    blocks = {"method": "gralora", "gralora": {"gralora_k": 3}, "budget": 1000}
    with pytest.raises(ConfigError, match=r"\(blocks on one\).*in_features should be divisible"):
        _sizes(blocks=blocks)
    typo = {"method": "lora", "adapter": {"target_modules": ["qeury"]}, "budget": 1000}
    with pytest.raises(ConfigError, match=r"\(typo on one\).*qeury"):
        _sizes(typo=typo)
    assert len(built) <= 4


def test_a_budget_reads_no_weights(bake_off_folder: Path) -> None:
    """VeRA's neither, which PEFT does not put on a model without storage."""
    shutil.copytree(bake_off_folder / "encoder", bake_off_folder / "bare")
    for file in (bake_off_folder / "bare").glob("*.safetensors"):
        file.unlink()
    methods = {"vera": {"method": "vera", "budget": 300}}
    found = prepare(spec(base={**SPEC["base"], "model": "bare"}, methods=methods))
    assert found.ranks == {"vera": "vera.r = 22"}
    assert found.sizes["vera"] == 4 * 2 * (22 + 16)  # layers, sites, rank and out


def test_a_budget_counts_adaloras_ranks_at_the_start(bake_off_folder: Path) -> None:
    found = _sizes(pruned={"method": "adalora", "budget": 1300})
    assert found.ranks == {"pruned": "adapter.r = 3"}
    assert found.sizes["pruned"] == 4 * 2 * 5 * (16 + 16 + 1)
    fixed: dict[str, Any] = {"method": "adalora", "adalora": {"init_r": 12}, "budget": 1300}
    with pytest.raises(ConfigError, match=r"adalora\.init_r gives its size already"):
        _sizes(pruned=fixed)
    _sizes(plain=fixed | {"method": "lora"})  # which does not read that section


def test_data_is_read_once_per_task_and_a_size_is_without_the_head_of_the_task(
    bake_off_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def reads(settings: Any, load: Any) -> Any:
        read.append(Path(settings.data.train).name)
        return prepare_job(settings, load)

    monkeypatch.setattr("msplora.bakeoff.sizes.prepare_job", reads)
    rows = [{**row, "label": place % 3} for place, row in enumerate(labelled_rows(44))]
    write_jsonl(bake_off_folder / "three.jsonl", rows)
    tasks = {**SPEC["tasks"], "three": {"data": {"train": "three.jsonl"}}}
    methods = {name: {"method": name} for name in ("lora", "full", "frozen")}
    found = prepare(spec(methods=methods, tasks=tasks))
    assert read == ["one.jsonl", "two.jsonl", "three.jsonl"]
    encoder = hf.BertModel.from_pretrained(bake_off_folder / "encoder", add_pooling_layer=False)
    assert found.sizes["full"] == encoder.num_parameters()


@pytest.mark.parametrize(
    ("task", "training", "error"),
    [
        ("sft", {"completion_only_loss": False}, r"would be scored on \d+ and \d+ tokens"),
        ("dpo", {"dpo_beta": 0.5}, r"training.dpo_beta = 0.5 and 0.1 of a method before it"),
    ],
)
def test_methods_without_a_measure_in_common_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, training: Any, error: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_decoder(Path("decoder"))
    rows = answered_rows(8)
    if task == "dpo":
        rows = [{"chosen": its.pop("completion"), "rejected": " fox", **its} for its in rows]
    write_jsonl(Path("rows.jsonl"), rows)
    its: dict[str, Any] = {
        "base": {"model": "decoder", "task": task},
        "tasks": {"one": {"data": {"train": "rows.jsonl"}}},
        "choose": {},
    }
    # What does not change the measure is no reason, though the data is then read again.
    same = {"lora": {"method": "lora"}, "short": {"method": "lora", "training": {"epochs": 1}}}
    prepare(spec(**its, methods=same))
    with pytest.raises(ConfigError, match=error):
        prepare(spec(**its, methods={**same, "other": {"method": "lora", "training": training}}))
    if task == "dpo":
        its["base"]["training"] = {"metric_for_best": "rewards/accuracies"}
        prepare(spec(**its, methods={**same, "other": {"method": "lora", "training": training}}))


@pytest.mark.parametrize(
    ("modules", "error"),
    [
        (["query"], r"lora trains 2,048 numbers on one and 1,024 on two, and sizes are compared"),
        (["qeury"], r"spec.yaml \(lora on two\): .*qeury"),
    ],
)
def test_a_method_that_is_not_the_same_on_another_task_is_refused(
    bake_off_folder: Path, modules: list[str], error: str
) -> None:
    two = {**SPEC["tasks"]["two"], "adapter": {"target_modules": modules}}
    with pytest.raises(ConfigError, match=error):
        prepare(spec(methods={"lora": {"method": "lora"}}, tasks={**SPEC["tasks"], "two": two}))


def test_methods_of_one_task_are_judged_by_one_metric(bake_off_folder: Path) -> None:
    by_loss = {"method": "lora", "training": {"metric_for_best": "loss"}}
    with pytest.raises(ConfigError, match=r"methods.other has 'training.metric_for_best'"):
        spec(methods={"lora": {"method": "lora"}, "other": by_loss})
    rows = [{**row, "label": place % 3} for place, row in enumerate(labelled_rows(24))]
    write_jsonl(bake_off_folder / "numbers.jsonl", rows)
    methods: dict[str, Any] = {"lora": {"method": "lora"}}
    methods["other"] = {"method": "lora", "data": {"regression": True}}
    error = r"\(other on one\): it would be judged by \w+, and the methods before it .* accuracy"
    with pytest.raises(ConfigError, match=error):
        prepare(spec(methods=methods, tasks={"one": {"data": {"train": "numbers.jsonl"}}}))


@pytest.mark.parametrize("order", [("sft", "dpo"), ("dpo", "sft")])
def test_methods_of_one_task_are_of_one_kind_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[str, str]
) -> None:
    """Both kinds are judged by what is called a loss."""
    monkeypatch.chdir(tmp_path)
    save_decoder(Path("decoder"))
    rows = [{**its, "chosen": its["completion"], "rejected": " fox"} for its in answered_rows(8)]
    write_jsonl(Path("rows.jsonl"), rows)
    its: dict[str, Any] = {
        "base": {"model": "decoder"},
        "tasks": {"one": {"data": {"train": "rows.jsonl"}}},
        "choose": {},
    }
    methods = {kind: {"method": "lora", "task": kind} for kind in order}
    error = rf"\({order[1]} on one\):.* have the same (kind of task|measure)"
    with pytest.raises(ConfigError, match=error):
        prepare(spec(**its, methods=methods))


def test_what_no_run_could_do_is_refused_before_the_first(bake_off_folder: Path) -> None:
    (bake_off_folder / "two.jsonl").unlink()
    with pytest.raises(MSPLoraError, match=r"two\.jsonl"):
        prepare(spec())


@pytest.mark.parametrize(
    ("metrics", "error"),
    [
        (("accuracy", "loss"), "two by loss have no mean, for less is better"),
        (("loss", "perplexity"), "one by loss and two by perplexity have no mean: a perplexity is"),
        (("perplexity", "loss"), "two by loss and one by perplexity have no mean: a perplexity is"),
    ],
)
def test_metrics_without_a_mean_are_refused(metrics: tuple[str, str], error: str) -> None:
    by_task = dict(zip(("one", "two"), metrics, strict=True))
    with pytest.raises(ConfigError, match=error):
        sizes._check_metrics(by_task, "spec.yaml")
    sizes._check_metrics(dict.fromkeys(by_task, metrics[0]), "spec.yaml")
