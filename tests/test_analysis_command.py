"""The command `msplora analyse`: what it writes and prints, and what it leaves as it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

import msplora
from adapted_llama import adapted
from runs import msplora as command
from tiny import llama


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    adapted().save_pretrained(folder / "pyramid")
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(llama(), lora).save_pretrained(folder / "lora")
    return folder


def test_the_command_prints_the_notes(folders: Path) -> None:
    (adapter,) = msplora.analyse(folders / "pyramid").adapters
    assert adapter.notes
    out = command("analyse", folders / "pyramid").out
    assert all(f"· {note}" in out for note in adapter.notes)


def test_the_command_writes_a_folder_and_prints_tables(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "made/here"
    result = command("analyse", folders / "pyramid", folders / "lora", "--output", out)
    assert result.code == 0, result.error
    assert {file.name for file in out.iterdir()} == {"analysis.html", "analysis.json"}
    assert "global" in result.out
    assert "pyramid against lora" in result.out
    content = json.loads((out / "analysis.json").read_text())
    printed = command("analyse", folders / "pyramid", folders / "lora", "--json").json()
    assert printed == content


def test_the_command_overwrites_nothing(folders: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("mine")
    result = command("analyse", folders / "pyramid", "--output", page)
    assert result.code == 1
    assert "already. Choose another output, or pass --force" in result.error
    assert page.read_text() == "mine"
    assert command("analyse", folders / "pyramid", "--output", page, "--force").code == 0
    assert page.read_text().startswith("<!doctype html>")
    (tmp_path / "file").write_text("mine")
    result = command("analyse", folders / "pyramid", "--output", tmp_path / "file", "--force")
    assert "is a file; give a folder" in result.error
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(its.name for its in tmp_path.iterdir()) == ["file", "page.html"]


def test_the_name_of_a_file_is_not_given_to_a_folder(folders: Path, tmp_path: Path) -> None:
    for name in ("page.htm", "PAGE.HTML"):
        result = command("analyse", folders / "lora", "--output", tmp_path / name)
        assert result.code == 0, result.error
        assert (tmp_path / name).read_text().startswith("<!doctype html>")
    result = command("analyse", folders / "lora", "--output", tmp_path / "numbers.json")
    assert result.code == 1
    assert "is no page; --json prints the numbers" in result.error
    assert not (tmp_path / "numbers.json").exists()


def test_without_jinja2_the_extra_is_named_before_any_work(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = command("analyse", folders / "pyramid", "--output", tmp_path / "out")
    assert result.code == 1
    assert "pip install -e '.[report]' in msplora's clone" in result.error
    assert command("analyse", folders / "pyramid").code == 0


def test_the_command_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    result = command("analyse", tmp_path / "nothing", "--output", tmp_path / "out")
    assert result.code == 1
    assert "there is no folder" in result.error
    assert not (tmp_path / "out").exists()
