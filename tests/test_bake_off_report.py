"""What a bake-off says where runs are missing, sizes agree, or a seed draws the rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bake_offs import SPEC, MadeUp, prepared
from msplora.bakeoff.bake_off import Outcome, outcome_so_far, run_bake_off
from msplora.bakeoff.report import draw, markdown, page
from msplora.bakeoff.statistics import standings
from msplora.bakeoff.terminal import rich_tables


def row_of(outcome: Outcome, entrant: str, task: str, seed: int) -> Any:
    return next(
        row
        for run, row in outcome.finals.items()
        if (run.entrant, run.task, run.seed) == (entrant, task, seed)
    )


def shifted(outcome: Outcome, by: dict[str, float]) -> Outcome:
    """With so much added to all values of each method."""
    for run, row in outcome.finals.items():
        assert row
        row.value = (row.value or 0.0) + by.get(run.entrant, 0.0)
    return outcome


@pytest.mark.parametrize("status", ["fails", "diverges"])
def test_a_method_that_is_lost_with_a_hard_seed_is_not_ranked_by_the_easy_one(
    made_up: MadeUp, status: str
) -> None:
    """All three do alike, and worse with the second seed; the smallest lacks it on one task."""
    methods = {name: SPEC["methods"][name] for name in ("small", "lora", "pyramid")}
    getattr(made_up, status).add("one,small,learning_rate=0.001,seed=1")
    outcome = run_bake_off(prepared(methods=methods))
    found = {its.name: its for its in standings(outcome)}
    assert list(found) == ["lora", "pyramid", "small"]
    assert found["small"].overall.mean > found["lora"].overall.mean  # of the easy seed alone
    assert [name for name, its in found.items() if its.on_front] == ["lora"]
    text = markdown(outcome, {})
    assert "Methods that lack runs come last, and have no part in *." in text
    made_up.fails, made_up.diverges = set(), set()
    whole = run_bake_off(prepared(output="whole", methods=methods))
    assert [its.name for its in standings(whole) if its.on_front] == ["small"]
    assert "Methods that lack runs" not in markdown(whole, {})


def test_each_task_weighs_as_much_whatever_runs_are_missing(made_up: MadeUp) -> None:
    outcome = run_bake_off(prepared())
    for task, difference in (("one", 0.3), ("two", -0.2)):
        for seed in (0, 1):
            row_of(outcome, "pyramid", task, seed).value += difference
    row_of(outcome, "pyramid", "two", 1).status = "failed"
    its = next(its for its in standings(outcome) if its.name == "pyramid").against
    assert its is not None
    assert its.mean == pytest.approx((0.3 - 0.2) / 2)
    assert its.p == 1  # no flip of 0.15, 0.15 and -0.2 has a sum nearer to 0
    row_of(outcome, "pyramid", "two", 0).status = "failed"
    assert next(its for its in standings(outcome) if its.name == "pyramid").against is None


def test_seconds_are_of_every_task(made_up: MadeUp) -> None:
    """Resumed runs do not know theirs."""
    outcome = run_bake_off(prepared())
    for (task, seed), seconds in {
        ("one", 0): 1.0, ("one", 1): None, ("two", 0): 3.0, ("two", 1): 5.0,
    }.items():  # fmt: skip
        row_of(outcome, "lora", task, seed).train_seconds = seconds
        row_of(outcome, "small", task, seed).train_seconds = None if task == "one" else seconds
    found = {its.name: its.seconds for its in standings(outcome)}
    assert found == {"lora": 2.5, "pyramid": 1.0, "small": None}


BUDGETS: dict[str, Any] = {
    "twin": {"method": "lora", "adapter": {"lora_alpha": 8}},
    "lora": {"method": "lora"},
    "pyramid": {"method": "msplora", "adapter": {"r": 8}},
    "small": {"method": "lora", "budget": "pyramid"},
    "dora": {"method": "dora", "budget": "lora"},
    "big": {"method": "msplora", "adapter": {"r": 12}},
    "other": {"method": "hydra"},
}
SIZES = {"twin": 2000, "lora": 2000, "big": 2000, "dora": 2064, "pyramid": 1500, "small": 1536}
SIZES["other"] = SIZES["dora"]  # by chance: no budget asks for it


def test_methods_stand_beside_those_of_their_size(made_up: MadeUp) -> None:
    found = replace(prepared(methods=BUDGETS, baseline="lora"), sizes=SIZES)
    outcome = shifted(run_bake_off(found), {"pyramid": 0.02, "big": 0.01})
    text = markdown(outcome, {})
    section = text.partition("## At equal size\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][2:]
    # Four pairs that agree have p = 2 / 16; Holm's correction counts these four alone.
    assert lines == [
        "| pyramid | small | 97.7% | +0.0200 (+0.0200 to +0.0200) | 4 | 0.125 | 0.5 |",
        "| twin | lora | 100.0% | +0.0000 (+0.0000 to +0.0000) | 4 | 1 | 1 |",
        "| dora | lora | 103.2% | +0.0000 (+0.0000 to +0.0000) | 4 | 1 | 1 |",
        "| big | lora | 100.0% | +0.0100 (+0.0100 to +0.0100) | 4 | 0.125 | 0.5 |",
    ]
    assert "<h2>At equal size</h2>" in page(outcome, {})
    assert "At equal size" in [its.title for its in rich_tables(outcome)]


def test_without_a_budget_nothing_is_beside_anything(made_up: MadeUp) -> None:
    assert "At equal size" not in markdown(run_bake_off(prepared()), {})


def test_a_number_as_a_budget_makes_a_size(made_up: MadeUp) -> None:
    methods: dict[str, Any] = {
        "full": {"method": "full"},
        "pyramid": {"method": "msplora", "budget": [1000, 1500]},
        "lora": {"method": "lora", "budget": 1500},
    }
    outcome = run_bake_off(prepared(methods=methods))
    section = markdown(outcome, {}).partition("## At equal size\n")[2].partition("\n## ")[0]
    assert "| lora | pyramid@1500 |" in section  # neither is of the baseline's method
    assert "pyramid@1000" not in section


def test_whether_a_seed_draws_the_held_out_rows_is_said(made_up: MadeUp) -> None:
    given = "The p-values take the tasks and their held-out rows as given"
    drawn = markdown(run_bake_off(prepared(output="drawn")), {})
    assert given not in drawn
    assert "The p-values take the tasks as given" in drawn
    assert "Of one, two a seed also draws which rows are held out" in drawn
    base = {**SPEC["base"], "data": {"validation": "held-out.jsonl"}}
    named = markdown(run_bake_off(prepared(output="named", base=base)), {})
    assert given in named
    assert "a seed also draws" not in named
    tasks = {**SPEC["tasks"], "two": {"data": {"train": "a.jsonl", "validation": "b.jsonl"}}}
    mixed = markdown(run_bake_off(prepared(output="mixed", tasks=tasks)), {})
    assert "Of one a seed also draws which rows are held out" in mixed


def test_sizes_that_do_not_last_are_marked(made_up: MadeUp) -> None:
    methods: dict[str, Any] = {**SPEC["methods"], "pruned": {"method": "adalora"}}
    text = markdown(run_bake_off(prepared(methods=methods)), {})
    assert "| 5,000 † |" in text
    assert "† at the start" in text
    assert text.count("†") == 2
    assert "†" not in markdown(run_bake_off(prepared(output="others")), {})


def section_of(text: str, title: str) -> list[str]:
    """The lines of a table, without its head."""
    section = text.partition(f"## {title}\n")[2].partition("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("| ")][2:]


def test_a_comparison_of_fewer_pairs_says_of_how_many(made_up: MadeUp) -> None:
    methods = {"lora": {"method": "lora"}, "pyramid": {"method": "msplora"}}
    methods["small"] = {"method": "lora", "budget": "pyramid"}  # pyright: ignore[reportArgumentType]
    outcome = run_bake_off(prepared(methods=methods, baseline="lora"))
    text = markdown(outcome, {})
    assert "above 0 where the method is better; pairs: of how many" in text
    standing = {line.split()[1]: line for line in section_of(text, "How they stand")}
    assert [cell.strip() for cell in standing["pyramid"].split("|")][7] == "4"
    row_of(outcome, "lora", "one", 1).status = "failed"
    row_of(outcome, "small", "two", 0).status = "failed"
    row_of(outcome, "small", "two", 1).status = "failed"
    text = markdown(outcome, {})
    standing = {line.split()[1]: line for line in section_of(text, "How they stand")}
    assert [cell.strip() for cell in standing["pyramid"].split("|")][7] == "3 of 4"
    # What cannot be compared is there, and says so.
    (beside,) = [line for line in section_of(text, "At equal size") if "small" in line]
    assert beside.count("–") == 4


def test_what_is_not_known_of_the_rates_around_the_best_is_said(made_up: MadeUp) -> None:
    made_up.fails = {"one,lora,learning_rate=0.01,seed=0"}
    choose = {"tasks": ["one"], "extend": 0}
    lines = section_of(markdown(run_bake_off(prepared(choose=choose)), {}), "Learning rates")
    chosen = {line.split()[1]: line.split("|")[4].strip() for line in lines if "chosen" in line}
    assert chosen == {
        "lora": "chosen, though runs of 0.01 failed",
        "pyramid": "chosen, at an end of what was tried",
        "small": "chosen",
    }
    one = run_bake_off(prepared(output="one", learning_rates=[1e-3]))
    lines = section_of(markdown(one, {}), "Learning rates")
    assert {line.split("|")[4].strip() for line in lines} == {"chosen, the only one"}


def test_hollow_marks_are_explained_whoever_has_them(made_up: MadeUp) -> None:
    """The first method has none."""
    methods = {name: SPEC["methods"][name] for name in ("pyramid", "lora")}
    rule: dict[str, Any] = {"reject": {"after": 0.5, "behind": 0.05}}
    rates: dict[str, Any] = {"learning_rates": [1e-3, 1e-2], "choose": {"extend": 0}}
    outcome = run_bake_off(prepared(methods=methods, **rates, **rule))
    rejected = {row.parameters["method"] for row in outcome.rows if row.status == "rejected"}
    assert rejected == {"lora"}
    plots = draw(outcome)
    assert b"given up early" in plots["rates"]
    assert b"better than pyramid by" in plots["differences"]
    assert "rejected (best until then" in markdown(outcome, plots)
    whole = run_bake_off(prepared(output="whole", methods=methods, **rates))
    assert b"given up early" not in draw(whole)["rates"]


def test_that_runs_of_a_seed_are_taken_for_independent_is_said(made_up: MadeUp) -> None:
    said = "take the runs of a seed on several tasks for independent"
    assert said in markdown(run_bake_off(prepared()), {})
    one = {"one": SPEC["tasks"]["one"]}
    assert said not in markdown(run_bake_off(prepared(output="one", tasks=one)), {})


def test_corrections_are_for_all_methods_and_not_for_those_that_have_run(made_up: MadeUp) -> None:
    outcome = shifted(run_bake_off(prepared()), {"pyramid": 0.02})
    for task in ("one", "two"):
        for seed in (0, 1):
            row_of(outcome, "small", task, seed).status = "failed"
    found = {its.name: its.against for its in standings(outcome)}
    assert found["small"] is None
    assert found["pyramid"] is not None
    assert (found["pyramid"].p, found["pyramid"].adjusted) == (0.125, 0.25)
    assert "makes 0.25 for the first of 2 methods" in markdown(outcome, {})


def test_a_mean_over_several_metrics_says_so(made_up: MadeUp) -> None:
    outcome = run_bake_off(prepared())
    said = "take accuracy and pearson as if they were on one scale"
    assert said not in markdown(outcome, {})
    outcome.prepared.metrics["two"] = "pearson"
    assert said in markdown(outcome, {})


def test_the_mark_of_a_method_that_lacks_runs_is_another(made_up: MadeUp) -> None:
    outcome = run_bake_off(prepared())
    assert b"lacks runs" not in draw(outcome)["front"]
    row_of(outcome, "small", "two", 1).status = "failed"
    assert b"small (lacks runs)" in draw(outcome)["front"]


def test_of_how_many_pairs_the_runs_chose_the_rate_is_said(made_up: MadeUp) -> None:
    said = "1 of the 4 pairs of each method is of the runs that chose its rate"
    assert said in markdown(run_bake_off(prepared()), {})
    apart = {"tasks": ["one"], "seeds": [7]}
    assert "that chose its rate" not in markdown(
        run_bake_off(prepared(output="apart", choose=apart)), {}
    )


def test_what_was_trained_on_what_is_said(made_up: MadeUp) -> None:
    """The report is read where its file is not at hand."""
    methods: dict[str, Any] = {
        "lora": {"method": "lora", "learning_rates": [1e-3]},
        "pyramid": {"method": "msplora", "adapter": {"r": 8, "split_alpha": True}},
        "hydra": {"method": "hydra", "hydra": {"r_parallel": 2}},
    }
    base = {**SPEC["base"], "model": "/elsewhere/models/my*model"}
    tasks = {**SPEC["tasks"], "two": {"data": {"train": "/here/two.jsonl", "max_length": 64}}}
    text = markdown(outcome_so_far(prepared(methods=methods, base=base, tasks=tasks)), {})
    common = next(line for line in text.splitlines() if line.startswith("- All runs"))
    for key in (
        r"model = models/my\*model", "task = classification", "dtype = auto",
        "training.epochs = 3", "training.batch_size = 8", "training.warmup_ratio = 0.06",
        r"adapter.target_modules = \[query, value\]", "data.validation_fraction = 0.25",
    ):  # fmt: skip
        assert key in common
    assert "- Task one: data.max_length = unset, data.train = one.jsonl." in text
    assert "- Task two: data.max_length = 64, data.train = here/two.jsonl." in text
    lora = "- Method lora: method = lora: rank 8, alpha 16; learning rates of its own: 0.001."
    assert lora in text
    assert (
        "- Method pyramid: method = msplora, adapter.r = 8, adapter.split_alpha = true: global of "
        "rank 8, alpha 5.33333, one for all layers; mid of rank 4, alpha 5.33333, in 3 groups; "
        "local of rank 2, alpha 5.33333, each layer its own."
    ) in text
    assert "- Method hydra: method = hydra, hydra.r_parallel = 2." in text
    assert "/elsewhere" not in text


def test_runs_that_ended_at_their_best_are_counted(made_up: MadeUp) -> None:
    outcome = run_bake_off(prepared())
    runs = [row for row in outcome.finals.values() if row]
    for row in runs:
        row.evaluations = [{"step": step, "accuracy": 0.5} for step in (5, 10)]
        row.best = row.evaluations[0]
    assert "may still have been improving" not in markdown(outcome, {})
    runs[0].best = runs[0].evaluations[1]
    assert f"1 of the {len(runs)} runs that count were at their best" in markdown(outcome, {})
    runs[0].status = "failed"
    assert "may still have been improving" not in markdown(outcome, {})


def test_a_difference_has_its_lowest_and_highest_pair(made_up: MadeUp) -> None:
    outcome = shifted(run_bake_off(prepared()), {"pyramid": 0.02})
    row = row_of(outcome, "pyramid", "one", 1)
    assert row.value is not None
    row.value += 0.02
    lines = section_of(markdown(outcome, {}), "How they stand")
    (line,) = [its for its in lines if "pyramid" in its]
    assert "+0.0250 (+0.0200 to +0.0400)" in line
