"""Adapters that load in processes which never import msplora: real processes, own environments."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest

import msplora
from msplora import autoload

PACKAGE = Path(msplora.__file__).resolve().parent
KNOWN = "import peft, sys; print('MSPLORA' in peft.PeftType.__members__, 'msplora' in sys.modules)"


class Environment:
    """A virtual environment that sees what this one has installed, and msplora by a path."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        self.site = next((folder / "lib").glob("python3*/site-packages"))
        self.package = self.site / "msplora.path.pth"
        self.package.write_text(f"{PACKAGE.parent}\n")
        (self.site / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")

    def run(self, *arguments: str, fails: bool = False) -> str:
        variables = {name: its for name, its in os.environ.items() if name != "PYTHONPATH"}
        found = subprocess.run(
            [self.python, *arguments], env=variables, capture_output=True, text=True, timeout=300
        )
        assert (found.returncode != 0) is fails, found.stderr
        return found.stdout + found.stderr

    def autoload(self, verb: str, fails: bool = False) -> str:
        return self.run("-m", "msplora.autoload", verb, fails=fails)


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "venv")


@pytest.mark.slow
def test_an_adapter_loads_in_a_process_that_never_imported_msplora(
    environment: Environment, saved: Path
) -> None:
    load = f"from peft import PeftConfig; print(PeftConfig.from_pretrained({str(saved)!r}).ranks)"
    assert "KeyError: 'MSPLORA'" in environment.run("-W", "ignore", "-c", load, fails=True)
    assert "enabled" in environment.autoload("enable")
    assert "[8, 4, 2]" in environment.run("-W", "ignore", "-c", load)


@pytest.mark.thorough
def test_without_msplora_peft_is_imported_as_ever(environment: Environment) -> None:
    environment.autoload("enable")
    environment.package.unlink()  # as if it were uninstalled
    assert environment.run("-W", "ignore", "-c", KNOWN).split() == ["False", "False"]


def test_enabling_and_disabling_leaves_nothing_behind(environment: Environment) -> None:
    before = sorted(its.name for its in environment.site.rglob("*"))
    assert "not enabled" in environment.autoload("status", fails=True)
    for _ in range(2):  # twice is as good as once
        environment.autoload("enable")
    assert environment.autoload("status").startswith("enabled")
    assert environment.autoload("disable").startswith("disabled")
    there = [its for its in environment.site.rglob("*") if its.is_file() or its.is_symlink()]
    assert sorted(its.name for its in there) == before
    assert "was not enabled" in environment.autoload("disable")


def test_a_process_without_peft_imports_nothing_more(environment: Environment) -> None:
    script = "import sys; print(sorted(sys.modules))"
    before = set(eval(environment.run("-c", script)))
    environment.autoload("enable")
    assert set(eval(environment.run("-c", script))) - before == {autoload.HOOK}


@pytest.mark.thorough
def test_looking_whether_peft_is_there_is_enough(environment: Environment) -> None:
    """As transformers does, before it imports it."""
    environment.autoload("enable")
    script = f"import importlib.util; importlib.util.find_spec('peft'); {KNOWN}"
    assert environment.run("-W", "ignore", "-c", script).split() == ["True", "True"]


@pytest.mark.thorough
def test_an_msplora_that_is_broken_does_not_break_peft(
    environment: Environment, tmp_path: Path
) -> None:
    environment.autoload("enable")
    broken = tmp_path / "broken" / "msplora"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('half an update')\n")
    environment.package.write_text(f"{broken.parent}\n")
    found = environment.run("-c", KNOWN)
    assert "half an update" in found
    assert "False False" in found


def test_a_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(autoload.AutoloadError, match=r"is not there.*virtual environment"):
        autoload.enable(tmp_path / "nowhere")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(autoload.AutoloadError, match="cannot be written to by this user"):
        autoload.enable(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_wrong_word_prints_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert autoload.main(["enabel"]) == 2
    assert "usage: python -m msplora.autoload" in capsys.readouterr().err
    assert autoload.main(["--help"]) == 0


def test_an_old_finder_that_finds_no_specs_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python does: some packages still put one on the path of all imports."""
    monkeypatch.setattr(sys, "meta_path", [object(), *sys.meta_path])
    spec = importlib.util.spec_from_file_location("a_copy", PACKAGE / "autoload_hook.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    waiting: Any = sys.meta_path[0]
    found = waiting.find_spec("peft")
    assert found is not None
    assert found.name == "peft"
    assert waiting not in sys.meta_path


def test_the_hook_is_no_part_of_what_it_waits_for() -> None:
    """It is copied elsewhere, and imports nothing of the package but the package."""
    lines = (PACKAGE / "autoload_hook.py").read_text().splitlines()
    assert [line for line in lines if line.startswith(("import", "from"))] == ["import sys"]
    assert sys.modules.get("msplora.autoload_hook") is None
