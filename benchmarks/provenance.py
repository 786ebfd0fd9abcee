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

from msplora.train.versions import versions


def provenance() -> dict[str, Any]:
    """Command, commit, hardware and versions of this process."""
    return {
        "command": command(),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
    }


def command() -> str:
    """The command line, without the folders of this machine."""
    words = [short(word) if os.path.isabs(word) else word for word in sys.argv[1:]]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def short(path: str | Path) -> str:
    """The last two parts of a path: models are often in folders with names such as `hf`."""
    return "/".join(Path(path).parts[-2:]).lstrip("/")


def commit() -> str:
    """The commit this ran on; $COMMIT says it where the files are a copy without their history."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return found.stdout.strip() or "unknown"


def hardware() -> str:
    """The GPU's name, or the processor's and how many of its threads torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' * (threads > 1)}"


def fingerprint(file: str | Path) -> str:
    """The first digits of a file's SHA-256, which tell whether two people have the same file."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def _processor() -> str:
    # Linux does not tell the model by way of `platform`.
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
