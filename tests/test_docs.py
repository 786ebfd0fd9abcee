"""What the pages on training, data, analysis and inspecting show is run; tables are the code's.

A block that follows "`NAME`:" is a file of that name. Every other YAML block is a part of a config:
it is put over a config that has the rest, and trained for three steps.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from msplora.cli.app import app
from msplora.errors import MSPLoraError
from msplora.inspection.suspicions import RULES
from msplora.train import run as run_module
from page_links import broken_links
from settings_tables import PAGE, SECTIONS, table, tables
from tiny_images import paint_folder, save_vision_model
from tiny_saved import save_encoder, save_language_model

PAGES = {
    page: page.read_text(encoding="utf-8")
    for page in (
        PAGE,
        *(
            PAGE.with_name(f"{name}.md")
            for name in ("data", "analysis", "inspecting", "bake-off", "words")
        ),
    )
}
TEXT = "\n".join(PAGES.values())
SHORT = ["--set", "training.max_steps=6", "--set", "training.batch_size=2"]
LANGUAGE_MODEL, CLASSIFIER = "Qwen/Qwen3-0.6B", "FacebookAI/roberta-base"
VISION_MODEL = "google/vit-base-patch16-224"
MODELS = {
    "sft": LANGUAGE_MODEL,
    "dpo": LANGUAGE_MODEL,
    "classification": CLASSIFIER,
    "image-classification": VISION_MODEL,
}
_FILE = r"`([\w/-]+\.\w+)`(?:, and `([\w/-]+\.\w+)` alike)?:\n\n```\w+\n(.*?)```"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


FILES = {
    name: content
    for *names, content in re.findall(_FILE, TEXT, flags=re.DOTALL)
    for name in names
    if name
}
PARTS = [block for block in blocks("yaml") if block not in FILES.values()]
COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for block in blocks("sh")
    for line in block.splitlines()
    if line.startswith("msplora")
]


def grown(name: str, content: str) -> str:
    """The rows of a shown file several times over: two rows are too few to hold some out."""
    if name.endswith(".json"):
        return json.dumps(json.loads(content) * 4)
    if name.endswith((".tsv", ".csv")):
        header, _, rows = content.partition("\n")
        return f"{header}\n{rows * 4}"
    return content * 4 if name.endswith(".jsonl") else content


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with every file, model and data set that the page names."""
    save_language_model(tmp_path / LANGUAGE_MODEL)
    save_encoder(tmp_path / CLASSIFIER)
    save_vision_model(tmp_path / VISION_MODEL)
    paint_folder(tmp_path / "colours", 4)
    shown = {name: grown(name, content) for name, content in FILES.items()}
    shown |= {
        "story.txt": "Once upon a time there was a fox.\n" * 20,
        "some-user/instructions/train.jsonl": shown["train.jsonl"],
        "parts/one.jsonl": shown["train.jsonl"],
        "parts/two.jsonl": shown["train.jsonl"],
        "held-out.jsonl": shown["train.jsonl"],
    }
    for name, content in shown.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def run(*arguments: str) -> None:
    app(list(arguments), standalone_mode=False)


def config_with(part: str) -> dict[str, Any]:
    """A whole config that says what a part of one says."""
    content: dict[str, Any] = yaml.safe_load(part)
    task = content.setdefault("task", "sft")
    content.setdefault("model", MODELS[task])
    content.setdefault("data", {"train": "train.jsonl"})
    content.setdefault("output", "runs/part")
    return content


def test_the_tables_have_every_key_its_default_and_its_meaning() -> None:
    found = tables(TEXT)
    for name, section in SECTIONS.items():
        assert found[name] == table(section), "run: python tests/settings_tables.py"


def test_the_table_of_rules_is_the_inspections() -> None:
    section = TEXT.partition("## What a folder holds")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| ([\w ]+) \| [✗!·] \| (.*) \|$", section, flags=re.MULTILINE))
    assert rows == {rule: when for rule, when in RULES.items() if rule != "note"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_every_block_is_run_by_one_of_these_tests() -> None:
    languages = re.findall(r"^```(\w+)$", TEXT, flags=re.MULTILINE)
    assert set(languages) == {"yaml", "json", "text", "sh", "python"}
    assert set(FILES) >= {"train.jsonl", "sft.yaml", "reviews.yaml", "glue/RTE/dev.tsv", "new.csv"}
    trained = {"sft.yaml", "reviews.yaml", "colours.yaml"}
    whole = trained | {"sweep.yaml", "search.yaml", "bake-off.yaml"}
    assert {name for name in FILES if name.endswith(".yaml")} == whole
    assert len(PARTS) == len(blocks("yaml")) - len(whole)
    assert len(COMMANDS) >= 12


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_config_trains(part: str, workspace: Path) -> None:
    if "init_from" in part:
        run("train", "sft.yaml", *SHORT)
    content = config_with(part)
    (workspace / "part.yaml").write_text(yaml.safe_dump(content))
    run("train", "part.yaml", *SHORT)
    assert (workspace / content["output"] / "adapter/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_commands_run_in_order(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in COMMANDS:
        if command[0] in ("sweep", "bake-off"):
            run(*dict.fromkeys([*command, "--list"]))  # not its many runs
            continue
        if command[0] != "train":
            run(*command)
            continue
        if "--resume" in command:
            stopped = [*command[: command.index("--resume")], "--force"]
            with monkeypatch.context() as context:
                context.setattr(run_module, "write_records", _stop)
                with pytest.raises(RuntimeError):
                    run(*stopped, *SHORT)
            assert (workspace / "runs/first.unfinished/checkpoints").is_dir()
        run(*command, *SHORT)
    assert (workspace / "out/lora/adapter_config.json").is_file()
    assert (workspace / "out/merged/config.json").is_file()
    assert (workspace / "out/analysis/analysis.json").is_file()
    assert len((workspace / "answers.jsonl").read_text().splitlines()) == 8


def _stop(*_: Any) -> None:
    raise RuntimeError


def test_the_python_blocks_run(workspace: Path) -> None:
    run("train", "sft.yaml", *SHORT)
    for block in blocks("python"):
        exec(compile(block, str(PAGE), "exec"), {})
    assert (workspace / "runs/python/adapter").is_dir()
    assert (workspace / "out/first.html").is_file()


@pytest.mark.parametrize(
    ("data", "begin"),
    [
        ("{train: alpaca.json}", "<s>###"),
        ("{train: calls.jsonl, chat_template: tools.jinja}", "<tools>"),
        ("{train: functions.json, chat_template: tools.jinja}", "<tools>"),
    ],
)
def test_a_training_row_is_shown_as_the_page_says(
    data: str, begin: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = config_with(f"data: {data}")
    (workspace / "part.yaml").write_text(yaml.safe_dump(content))
    run("train", "part.yaml", *SHORT)
    shown = re.search(rf"```text\n({begin}.*?)```", TEXT, flags=re.DOTALL)
    assert shown is not None
    assert shown.group(1) in capsys.readouterr().out


@pytest.mark.parametrize("method", ["msplora", "full"])
def test_a_run_leaves_the_files_of_the_table(method: str, workspace: Path) -> None:
    run("train", "sft.yaml", *SHORT, "--method", method)
    run_folder = workspace / "runs/first"
    found = {str(file.relative_to(run_folder)) for file in run_folder.rglob("*") if file.is_file()}
    section = TEXT.partition("## What a run leaves behind")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE)
    files = set(re.findall(r"`([\w./]+\w)`", " ".join(cells)))
    if method == "msplora":
        assert found == files
    else:
        whole = {name for name in found if not name.startswith("model/")}
        of_adapters = {name for name in files if name.startswith("adapter/")} | {"levels.json"}
        assert whole == files - of_adapters
        assert (run_folder / "model/model.safetensors").is_file()


# The message as the page has it -> what provokes it, and with which files.
MIXED = '{"prompt": "a", "completion": "b"}\n{"text": "c"}\n'
LONG = '{"text": "%s"}\n' % ("word " * 200)
ERRORS: dict[str, list[str]] = {
    "unknown key 'training.lr'": ["sft.yaml", "training.lr=1e-3"],
    "say where the data is with one of data.glue": ["sft.yaml", "data.hub=some-user/instructions"],
    "the columns question, answer fit no form": ["sft.yaml", "data.train=questions.jsonl"],
    "mixed forms": ["sft.yaml", "data.train=mixed.jsonl", "data.validation_fraction=0"],
    "the tokenizer has no chat template": ["sft.yaml", "data.train=chats.jsonl"],
    "but the model has 512 positions": ["sft.yaml", "data.train=long.jsonl"],
    "Target modules {'query'} not found in the base model": [
        "sft.yaml",
        "adapter.target_modules=[query]",
    ],
    "r must be at least 4": ["sft.yaml", "adapter.r=2"],
    "is none of the classes": ["reviews.yaml", "data.validation=strange.tsv"],
    "it needs held-out rows": ["reviews.yaml", "data.validation_fraction=0"],
    "are no preference pair": ["sft.yaml", "task=dpo"],
    "is in no format that is known": [
        "colours.yaml",
        "data.train=spoilt",
    ],
    "so a run cannot be put in its place": ["sft.yaml", "output=."],
    "is not empty": ["sft.yaml", "output=taken"],
    "an unfinished run is in": ["sft.yaml", "output=stopped"],
    "there is nothing to resume": ["sft.yaml", "output=complete"],
    "has other settings": ["sft.yaml", "output=other", "seed=7"],
}


def test_the_errors_of_the_table_are_these() -> None:
    section = TEXT.partition("## Errors you may meet")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.*?) \| ", section, flags=re.MULTILINE)
    assert rows[1:] == list(ERRORS)


@pytest.mark.parametrize("message", ERRORS)
def test_an_error_of_the_table(message: str, workspace: Path) -> None:
    config, *changes = ERRORS[message]
    (workspace / "mixed.jsonl").write_text(MIXED)
    (workspace / "long.jsonl").write_text(LONG * 4)
    (workspace / "strange.tsv").write_text("review\tsentiment\nOdd.\tbaffled\n")
    shutil.copytree(workspace / "colours", workspace / "spoilt")
    (workspace / "spoilt/red/0.png").write_text("no image")
    (workspace / "taken").mkdir()
    (workspace / "taken/notes.txt").write_text("mine")
    shutil.copytree(workspace / "taken", workspace / "stopped.unfinished")
    (workspace / "complete").mkdir()
    (workspace / "complete/run.json").write_text("{}")
    (workspace / "other.unfinished").mkdir()
    shutil.copy(workspace / "sft.yaml", workspace / "other.unfinished/config.yaml")
    flags = [word for change in changes for word in ("--set", change)]
    resume = ["--resume"] if {"output=complete", "output=other"} & {*changes} else []
    with pytest.raises(MSPLoraError, match=re.escape(message)):
        run("train", config, *flags, *SHORT, *resume)
    assert (workspace / "taken/notes.txt").read_text() == "mine"
