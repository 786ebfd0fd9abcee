"""What a result says of the code it is from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import msplora
from msplora.bench.provenance import commit


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of one commit, in which the package is."""
    for path in ("src/msplora/__init__.py", "benchmarks/results/speed.json", "docs/page.md"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text("")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "all"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(msplora, "__file__", str(tmp_path / "src/msplora/__init__.py"))
    monkeypatch.delenv("COMMIT", raising=False)
    return tmp_path


def test_a_result_names_its_commit_and_whether_the_code_differs_from_it(checkout: Path) -> None:
    head = commit()
    assert head.isalnum()
    # What other runs wrote does not change what this one measures.
    (checkout / "benchmarks/results/speed.json").write_text("{}")
    (checkout / "docs/page.md").unlink()
    assert commit() == head
    (checkout / "src/msplora/__init__.py").write_text("changed = True\n")
    assert commit() == f"{head}-dirty"


def test_a_package_within_another_project_has_no_commit(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(msplora, "__file__", str(checkout / "lib/msplora/__init__.py"))
    (checkout / "lib/msplora").mkdir(parents=True)
    assert commit() == "unknown"
