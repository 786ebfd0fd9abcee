"""The command: every verb's options and output, what is imported when, and how it fails."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf

import msplora
from msplora.cli import app as cli
from msplora.errors import MSPLoraError
from msplora.extras import train_extra
from runs import (
    answered_rows,
    labelled_rows,
    save_decoder,
    save_encoder,
    tensors,
    tree,
    write_config,
    write_jsonl,
)
from runs import (
    msplora as command,
)

VERBS = ["train", "eval", "predict", "generate", "plan", "convert", "demo"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases, and a run of a language model and of a classifier."""
    folder = tmp_path_factory.mktemp("cli")
    save_decoder(folder / "decoder")
    save_encoder(folder / "encoder", positions=16)
    write_jsonl(folder / "answered.jsonl", answered_rows(16))
    write_jsonl(folder / "labelled.jsonl", labelled_rows(16))
    for name, base, task in (
        ("answered", "decoder", "sft"),
        ("labelled", "encoder", "classification"),
    ):
        content = {
            "model": str(folder / base),
            "task": task,
            "output": str(folder / f"{name}-run"),
            "data": {"train": str(folder / f"{name}.jsonl"), "validation_fraction": 0.25},
            "training": {"epochs": 1, "learning_rate": 0.01, "batch_size": 4},
        }
        result = command("train", write_config(folder / f"{name}.yaml", content))
        assert result.code == 0, result.err
    return folder


def without_torch(*arguments: str) -> None:
    """Run a command in a new Python, and look at what it imported."""
    script = (
        "import sys\n"
        "from msplora.cli.app import app\n"
        "try:\n"
        f"    app({list(arguments)!r})\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'trl', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, capture_output=True)


def test_help_and_version_import_nothing_heavy() -> None:
    for arguments in (["--help"], ["--version"], ["train", "--help"], ["plan", "-h"]):
        without_torch(*arguments)


def test_help_names_every_verb_and_its_options() -> None:
    shown = command("--help")
    assert shown.code == 0
    assert [verb for verb in VERBS if verb not in shown.out] == []
    for verb in VERBS:
        assert command(verb, "--help").code == 0
    options = {
        "train": ["--set", "--seed", "--force", "--resume", "--method", "--output"],
        "eval": ["--json", "--data", "--base"],
        "predict": ["--json", "--output", "--force"],
        "generate": ["--json", "--prompt", "--seed"],
        "plan": ["--json"],
        "convert": ["--to", "--base", "--force"],
    }
    for verb, wanted in options.items():
        text = command(verb, "--help").out
        assert [option for option in wanted if option not in text] == []


def test_the_version_is_the_package_s() -> None:
    assert command("--version").out == f"msplora {msplora.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [["no-such-verb"], ["train"], ["eval"], ["generate", "run"], ["plan", "--no-such-option", "x"]],
)
def test_a_malformed_command_exits_with_2_and_says_so(arguments: list[str]) -> None:
    result = command(*arguments)
    assert result.code == 2
    assert "Error" in result.err or "Usage" in result.err


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [
        ("yaml", ["train", "answered.yaml"]),
        pytest.param(
            "trl", ["train", "answered.yaml", "--output", "x"], marks=pytest.mark.thorough
        ),
        pytest.param("sklearn", ["eval", "labelled-run"], marks=pytest.mark.thorough),
        pytest.param("datasets", ["predict", "run", "rows.tsv"], marks=pytest.mark.slow),
        pytest.param("datasets", ["generate", "run", "--prompt", "a"], marks=pytest.mark.slow),
    ],
)
def test_a_verb_whose_extra_is_missing_names_it(
    folder: Path, missing: str, arguments: list[str]
) -> None:
    script = (
        "import sys\n"
        f"sys.modules[{missing!r}] = None\n"  # what makes an import of it fail
        "from msplora.cli.app import main\n"
        f"sys.argv = ['msplora', *{arguments!r}]\n"
        "main()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], timeout=300, capture_output=True, text=True, cwd=folder
    )
    assert ended.returncode == 1
    wanted = f"Error: this command needs {missing}, which is not installed: "
    assert ended.stderr == f"{wanted}pip install -e '.[train]' in msplora's clone\n"


def test_only_what_the_extra_brings_is_blamed_on_it() -> None:
    def missing(name: str) -> str:
        with pytest.raises(ModuleNotFoundError) as caught, train_extra():
            raise ModuleNotFoundError(name=name)
        return caught.value.name or ""

    assert missing("our_own_mistake") == "our_own_mistake"
    with pytest.raises(MSPLoraError, match="needs matplotlib"), train_extra():
        raise ModuleNotFoundError(name="matplotlib.figure")


def test_a_mistake_in_the_config_does_not_wait_for_torch(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("modle: x")
    script = (
        "import sys\n"
        "from msplora.cli.app import app\n"
        "from msplora.errors import ConfigError\n"
        "try:\n"
        "    app(['train', 'a.yaml'])\n"
        "except ConfigError:\n"
        "    assert 'torch' not in sys.modules\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=tmp_path)


def test_the_help_of_a_verb_needs_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    for verb in VERBS:
        assert command(verb, "--help").code == 0


def test_an_error_is_one_line_without_markup_lost(folder: Path) -> None:
    """A path in square brackets looks like rich's markup."""
    result = command("eval", "some[red]where[/]")
    assert result.code == 1
    assert result.out == ""
    assert result.error.startswith("Error: some[red]where[/] is not a folder")
    assert "Traceback" not in result.err


# eval, predict, generate


def test_eval_prints_a_table_or_json_that_agree(folder: Path) -> None:
    for name in ("answered-run", "labelled-run"):
        found = command("eval", folder / name, "--json").json()
        shown = command("eval", folder / name).out
        for key, value in found.items():
            if isinstance(value, float):
                assert re.search(rf"{key} .* {value:.4f} ", shown), key
        assert found["run"] == str(folder / name)


def test_a_run_and_its_adapter_are_the_same_to_every_verb(folder: Path) -> None:
    run = folder / "answered-run"
    found = [command("eval", its, "--json").json() for its in (run, run / "adapter")]
    assert [its["loss"] for its in found] == [found[0]["loss"]] * 2
    prompt = ("--prompt", "w1", "--max-new-tokens", 4)
    answers = [command("generate", its, *prompt).out for its in (run, run / "adapter")]
    assert answers[0] == answers[1]


def test_the_base_may_have_moved(folder: Path, tmp_path: Path) -> None:
    moved = save_decoder(tmp_path / "elsewhere")
    run = folder / "answered-run"
    found = [
        command("eval", run, *more, "--json").json()["loss"] for more in ([], ["--base", moved])
    ]
    assert found[0] == found[1]
    result = command("eval", run, "--base", tmp_path / "nowhere")
    assert result.code == 1
    assert "there is no such folder" in result.error
    wrong = save_decoder(tmp_path / "shallow", layers=3)
    result = command("eval", run, "--base", wrong)
    assert result.code == 1
    assert "Traceback" not in result.err


def test_quiet_prints_what_came_out_and_warnings(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = command("-q", "train", folder / "answered.yaml", "--output", run)
    assert result.code == 0
    best, where, *more = result.out.splitlines()
    metrics = json.loads((run / "metrics.json").read_text())
    assert f"Best loss: {metrics['best']['loss']:.4f}" in best
    assert where == f"The run is in {run}"
    assert more == []
    assert command("-q", "eval", tmp_path / "run", "--json").json()["rows"] == 4


def test_verbose_lets_the_libraries_speak(folder: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def note() -> None:
        seen.append(hf.logging.get_verbosity())

    import msplora.train.run as running

    usual = running.show_preview
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "show_preview", lambda *its: (note(), usual(*its)))
        command("train", folder / "answered.yaml", "--output", tmp_path / "a")
        command("-v", "train", folder / "answered.yaml", "--output", tmp_path / "b")
    assert seen[0] == hf.logging.ERROR
    assert seen[1] < hf.logging.ERROR


def test_flags_of_train_override_the_file(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["--method", "lora", "--seed", 3, "--output", out, "--set", "adapter.r=4"]
    assert command("train", folder / "answered.yaml", *arguments).code == 0
    config = peft.PeftConfig.from_pretrained(str(out / "adapter"))
    assert (str(config.peft_type.value), config.r) == ("LORA", 4)  # pyright: ignore
    assert "seed: 3" in (out / "config.yaml").read_text()


def test_predictions_go_to_a_file_of_the_form_asked_for(folder: Path, tmp_path: Path) -> None:
    run, rows = folder / "labelled-run", folder / "labelled.jsonl"
    for suffix in ("tsv", "jsonl"):
        out = tmp_path / f"made/answers.{suffix}"
        assert "16 predictions" in command("predict", run, rows, "--output", out).out
        before = out.read_bytes()
        assert command("predict", run, rows, "--output", out).code == 1
        assert out.read_bytes() == before
        assert command("predict", run, rows, "--output", out, "--force").code == 0
    lines = (tmp_path / "made/answers.tsv").read_text().splitlines()
    records = (tmp_path / "made/answers.jsonl").read_text().splitlines()
    assert [line.split("\t")[1] for line in lines[1:]] == [
        json.loads(record)["prediction"] for record in records
    ]
    result = command("predict", run, rows, "--output", tmp_path / "answers.xlsx")
    assert result.code == 1
    assert ".jsonl or .tsv" in result.error


def test_predictions_never_overwrite_their_rows_or_fail_after_the_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, rows = folder / "labelled-run", tmp_path / "rows.jsonl"
    rows.write_bytes((folder / "labelled.jsonl").read_bytes())
    # Refused before the model is loaded, which would fail here.
    monkeypatch.setattr("msplora.train.prediction.open_run", None)
    for out, said in ((rows, "the file of the rows"), (rows / "below.tsv", "not a folder")):
        done = command("predict", run, rows, "--output", out, "--force")
        assert done.code == 1
        assert said in done.error
    assert rows.read_bytes() == (folder / "labelled.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "nowhere"], "is not a folder"),
        (["eval", "decoder"], "is neither a run folder nor an adapter"),
        (["eval", "answered-run", "--data", "labelled.jsonl"], "It has: text, label"),
        (["eval", "answered-run", "--data", "nothing.jsonl"], "does not exist"),
        (["eval", "labelled-run", "--data", "answered.jsonl"], "no column 'text'"),
        (["generate", "labelled-run", "--prompt", "a"], "is a classifier"),
        (["generate", "answered-run", "--prompt", "w1 " * 70], "64 positions"),
        (["predict", "labelled-run", "nothing.tsv"], "does not exist"),
        (["predict", "labelled-run", "answered.jsonl"], "no column 'text'"),
        (["predict", "answered-run", "labelled.jsonl"], "no 'prompt'"),
    ],
)
def test_verbs_refuse_what_does_not_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(folder)
    before = tree(folder)
    result = command(*arguments)
    assert result.code == 1
    assert said in result.error
    assert tree(folder) == before


def test_an_unfinished_run_says_how_to_go_on(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run.unfinished").mkdir()
    (tmp_path / "run").mkdir()
    result = command("eval", tmp_path / "run")
    assert "msplora train --resume" in result.error


def test_an_adapter_of_another_program_is_generated_with(folder: Path, tmp_path: Path) -> None:
    """It holds no task.json: its base and its form are found out, or given."""
    base = hf.AutoModelForCausalLM.from_pretrained(folder / "decoder")
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path / "lora"))
    assert command("generate", tmp_path / "lora", "--prompt", "w1").code == 0
    found = command("eval", tmp_path / "lora", "--data", folder / "answered.jsonl", "--json").json()
    assert found["rows"] == 16
    result = command("eval", tmp_path / "lora")
    assert result.code == 1
    assert "--data" in result.error


def test_a_damaged_record_is_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder / "answered-run", tmp_path / "run")
    record = tmp_path / "run/adapter/task.json"
    good = json.loads(record.read_text())
    for bad, said in (
        ("{", "is not a record of a run"),
        (json.dumps(good | {"format_version": 99}), "format_version 99"),
        (json.dumps({**good, "settings": {"model": 3}}), "task.json"),
    ):
        record.write_text(bad)
        result = command("eval", tmp_path / "run")
        assert result.code == 1
        assert said in result.error


# convert


def test_convert_keeps_a_classifier_s_head(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    shown = command("convert", folder / "labelled-run", out, "--to", "lora")
    assert shown.code == 0, shown.err
    assert "Checked" in shown.out
    assert shown.err == ""
    heads = [
        {key: its for key, its in tensors(its).items() if "classifier" in key}
        for its in (folder / "labelled-run/adapter", out)
    ]
    assert heads[0]
    assert all(torch.equal(heads[1][key], its) for key, its in heads[0].items())
    found = peft.PeftConfig.from_pretrained(str(out))
    assert found.peft_type == peft.PeftType.LORA
    before = tree(out)
    refused = command("convert", folder / "labelled-run", out, "--to", "lora")
    assert refused.code == 1
    assert "--force" in refused.error
    assert tree(out) == before
    unchecked = command(
        "convert", folder / "labelled-run", out, "--to", "lora", "--force", "--no-verify",
        "--pad-to", "pow2", "--dtype", "bfloat16",
    )  # fmt: skip
    assert "Not checked" in unchecked.out
    padded = peft.PeftConfig.from_pretrained(str(out))
    assert padded.r == 16  # pyright: ignore[reportAttributeAccessIssue]
    assert {its.dtype for key, its in tensors(out).items() if "lora" in key} == {torch.bfloat16}


def test_convert_refuses_what_is_no_pyramid(folder: Path, tmp_path: Path) -> None:
    for source, said in (("nowhere", "there is no folder"), ("decoder", "is no adapter")):
        result = command("convert", folder / source, tmp_path / "out", "--to", "lora")
        assert result.code == 1
        assert said in result.error
    assert command("convert", folder / "answered-run", tmp_path / "out").code == 2  # no --to
    assert not (tmp_path / "out").exists()


def test_the_script_and_the_module_are_the_same_command() -> None:
    import importlib.metadata

    (script,) = importlib.metadata.entry_points(group="console_scripts", name="msplora")
    assert script.load() is cli.main
    assert "cli.app import main" in Path(msplora.__file__).with_name("__main__.py").read_text()
