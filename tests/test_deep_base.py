"""The base that benchmarks train is begun again where a kill left half of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from msplora.train.settings import Settings
from runs import save_decoder

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/deep_base.py"


@pytest.fixture
def deep_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("deep_base", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    save_decoder(tmp_path / "decoder")
    (tmp_path / "some.txt").write_text("a story")
    (tmp_path / "more.txt").write_text("another one")
    monkeypatch.chdir(tmp_path)
    given = ["--like", "decoder", "--layers", "2", "--text", "some.txt", "more.txt"]
    monkeypatch.setattr(sys, "argv", ["deep_base.py", *given, "--output", "deep"])
    return module


def killed(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("at", ["tokenizer", "text"])
def test_half_of_what_it_trains_on_is_made_again(
    deep_base: ModuleType, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    trained: list[Settings] = []
    monkeypatch.setattr(deep_base, "train_run", lambda its, resume: trained.append(its))
    with monkeypatch.context() as patch:
        if at == "tokenizer":
            patch.setattr(deep_base.AutoTokenizer, "from_pretrained", killed)
        else:
            patch.setattr(deep_base, "write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            deep_base.main()
    assert Path("deep/start").exists() is (at == "text")
    assert trained == []
    deep_base.main()
    assert Path("deep/text.txt").read_text() == "a story\nanother one"
    assert {"config.json", "tokenizer.json"} <= {its.name for its in Path("deep/start").iterdir()}
    assert [its.data.train for its in trained] == ["deep/text.txt"]


@pytest.mark.parametrize("other", [["--layers", "3"], ["--text", "more.txt"]])
def test_another_model_or_text_is_refused(
    deep_base: ModuleType, monkeypatch: pytest.MonkeyPatch, other: list[str]
) -> None:
    monkeypatch.setattr(deep_base, "train_run", lambda *_, **__: None)
    deep_base.main()
    monkeypatch.setattr(sys, "argv", [*sys.argv, *other])
    with pytest.raises(SystemExit, match="name another --output"):
        deep_base.main()
