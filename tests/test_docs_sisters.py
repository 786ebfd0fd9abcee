"""What docs/sisters.md shows is run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runs import answered_rows, write_jsonl
from tiny_saved import save_language_model

PAGE = Path(__file__).resolve().parents[1] / "docs/sisters.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.thorough
@pytest.mark.parametrize("block", BLOCKS, ids=["hydra", "elalora"])
def test_every_block(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_language_model(tmp_path / "Qwen/Qwen3-0.6B")
    write_jsonl(tmp_path / "train.jsonl", answered_rows(24))
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(PAGE), "exec"), {})
    assert list((tmp_path / "out").glob("*/adapter_model.safetensors"))
