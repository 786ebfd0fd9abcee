"""Virtual environments for other people's software, each made on first use and then kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch==2.13.0"  # what the tests run with: elsewhere a build for GPUs may be the newest
TESTING = ("pytest", "pytest-timeout", "hypothesis", "typer", "rich", "safetensors", "packaging")


def environment(
    cache: Path, name: str, *requirements: str, without_theirs: tuple[str, ...] = ()
) -> Path:
    """Return the Python of an environment in which `requirements` are installed.

    The checkout is not installed: `run_in` puts its `src` on the path. Of the packages in
    `without_theirs` nothing is installed that they need in turn.
    """
    folder = (cache / name).absolute()
    python, stamp = folder / "bin" / "python", folder / "requirements.json"
    wanted = [TORCH, *requirements, *without_theirs]
    if stamp.is_file() and json.loads(stamp.read_text()) == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, TORCH, *requirements], check=True, cwd=ROOT)
    if without_theirs:
        subprocess.run([*install, "--no-deps", *without_theirs], check=True)
    stamp.write_text(json.dumps(wanted))
    return python


def run_in(
    python: Path, *arguments: str, check: bool = True, more: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python there, in the checkout and offline; with `check`, a failure shows what it said."""
    variables = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **(more or {}),
    }
    done = subprocess.run(
        [str(python), *arguments], cwd=ROOT, env=variables, capture_output=True, text=True
    )
    if check and done.returncode:
        print(done.stdout[-2000:], done.stderr[-4000:], file=sys.stderr)
        raise SystemExit(f"failed: {python.parent.parent.name}: {' '.join(arguments)}")
    return done


def versions_in(python: Path, *packages: str) -> dict[str, str]:
    """Name -> version of what is installed there."""
    script = (
        "import importlib.metadata as m, json, platform, sys\n"
        "found = {'python': platform.python_version()}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    return json.loads(run_in(python, "-c", script, *packages).stdout)
