"""What a result must say of where it came from; paths are cut to what means something elsewhere."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import msplora
from msplora.versions import versions


def provenance(device: str | None = None) -> dict[str, Any]:
    """Command, commit, hardware and versions of this process.

    Args:
        device: what was measured on, "cpu" or "cuda"; the GPU where there is one if left out.
    """
    return {
        "command": command(),
        "commit": commit(),
        "hardware": hardware(device),
        "versions": versions(),
    }


def command() -> str:
    """The command line, without the folders of this machine."""
    program = Path(sys.argv[0])
    if program.stem in ("msplora", "__main__"):  # the script, or `python -m msplora`
        words = ["msplora"]
    elif program.resolve().parent.name == "benchmarks":
        words = ["python", f"benchmarks/{program.name}"]
    else:
        words = [program.name]
    return " ".join([*words, *(_portable(word) for word in sys.argv[1:])])


def _portable(word: str) -> str:
    option, equals, value = word.rpartition("=")
    return f"{option}{equals}{short(value) if os.path.isabs(value) else value}"


def short(path: str | Path) -> str:
    """The last two parts of a path: models are often in folders with names such as `hf`."""
    return "/".join(Path(path).parts[-2:]).lstrip("/")


def commit() -> str:
    """The commit this ran on; $COMMIT says it where the files are a copy without their history."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    package = Path(msplora.__file__).resolve().parent
    # An environment may lie inside another project, whose commit would say nothing about us.
    if Path(_git(package, "rev-parse", "--show-toplevel")) / "src" / "msplora" != package:
        return "unknown"
    head = _git(package, "rev-parse", "--short", "HEAD")
    # What is written here changes nothing that is measured, and one result file is not to make
    # the commit of the next one doubtful.
    written = [f":(top,exclude){folder}" for folder in ("benchmarks/results", "docs")]
    changed = _git(package, "status", "--porcelain", "--untracked-files=no", "--", ":/", *written)
    return (f"{head}-dirty" if changed else head) or "unknown"


def _git(folder: Path, *arguments: str) -> str:
    try:
        found = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=False, cwd=folder
        )
    except FileNotFoundError:  # no git here
        return ""
    return found.stdout.strip()


def hardware(device: str | None = None) -> str:
    """The GPU's name, or the processor's and how many of its threads torch uses."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' * (threads > 1)}"


def fingerprint(file: str | Path) -> str:
    """The first digits of a file's SHA-256, which tell whether two people have the same file."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def _processor() -> str:
    # Linux does not tell the model by way of `platform`.
    cpu = Path("/proc/cpuinfo")
    text = cpu.read_text().partition("\n\n")[0] if cpu.is_file() else ""
    about = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in text.splitlines())
    }
    if "model name" not in about:
        return platform.processor() or platform.machine()
    # A virtual machine may call several generations by one name.
    told = [f"{key} {about[key]}" for key in ("cpu family", "model") if key in about]
    flags = about.get("flags", "").split()
    told += [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    return about["model name"] + (f" ({', '.join(told)})" if told else "")
