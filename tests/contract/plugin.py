"""A pytest plugin: PEFT's own tests with our config where they say `LoraConfig`; keeps what came.

Loaded by `run.py` before the tests are collected, in a process of its own for each file and method.
What to do is in the environment: $CONTRACT_METHOD ("lora" or "msplora"), $CONTRACT_RECORD (a file
that gets one line of JSON per test, and one before it starts), $CONTRACT_ONLY (a file of the names
of the tests to run, if not all) and $CONTRACT_DONE (a file of those that were run before).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import peft
import pytest
from PIL import Image

import msplora
from msplora.errors import MSPLoraError

METHOD = os.environ["CONTRACT_METHOD"]
RECORD = Path(os.environ["CONTRACT_RECORD"])
LORA_ALPHA = 8  # of PEFT's `LoraConfig`; ours has another default

_made = 0
"""How many configs of the method under test have been made so far."""
_found: dict[str, Any] = {}
"""What the test that is running has come to."""


def pytest_configure(config: pytest.Config) -> None:
    # Before any test module says `from peft import LoraConfig`. PEFT's own modules took it long
    # ago, from `peft.tuners.lora.config`, so inside the library nothing changes.
    method: Any = peft.LoraConfig
    if METHOD == "msplora":
        method = msplora.MSPLoraConfig
        _say_what_lora_means(method)
        peft.LoraConfig = method
    _count(method)
    _stay_off_the_hub()


def _say_what_lora_means(config_class: Any) -> None:
    """Let the config take LoRA's keywords for what they mean there."""
    original = config_class.__init__

    @wraps(original)  # PEFT reads the names of the fields from the signature
    def init(self: Any, *args: Any, **keywords: Any) -> None:
        rank = keywords.get("r", 8)
        if "ranks" not in keywords and isinstance(rank, int) and rank > 0:
            if _found.get("grouped"):
                keywords["ranks"] = [rank, rank, rank]
            elif rank < 4:  # the short form needs a rank that can be halved twice
                keywords["ranks"] = [rank, max(1, rank // 2), max(1, rank // 4)]
        if keywords.get("alphas") is None:
            keywords.setdefault("lora_alpha", LORA_ALPHA)
        original(self, *args, **keywords)

    config_class.__init__ = init


def _count(config_class: Any) -> None:
    original = config_class.__post_init__

    def post_init(self: Any) -> None:
        global _made
        _made += type(self) is config_class
        original(self)

    config_class.__post_init__ = post_init


def _stay_off_the_hub() -> None:
    """PEFT's tests go online for the first use of a model; here none does."""
    from tests import testing_utils  # PEFT's, in the folder that pytest runs in

    @contextmanager
    def offline(model_id: str) -> Iterator[None]:
        yield

    testing_utils.hub_online_once = offline
    testing_utils.load_cat_image = lambda: Image.linear_gradient("L").convert("RGB")


def pytest_make_parametrize_id(config: Any, val: Any, argname: str) -> str | None:
    """The same names of tests for both methods."""
    return "LoraConfig" if val is peft.LoraConfig else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    only, done = (_lines(os.environ.get(name)) for name in ("CONTRACT_ONLY", "CONTRACT_DONE"))
    kept = [
        item
        for item in items
        if item.nodeid not in done and (item.nodeid in only if only else _may_be_for_lora(item))
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def _lines(path: str | None) -> set[str]:
    return set(Path(path).read_text(encoding="utf-8").splitlines()) if path else set()


def _may_be_for_lora(item: pytest.Item) -> bool:
    """Not what is parametrised by the configs of other methods only."""
    values: list[Any] = []
    for value in getattr(getattr(item, "callspec", None), "params", {}).values():
        values += value if isinstance(value, (list, tuple)) else [value]
    classes = [value if isinstance(value, type) else type(value) for value in values]
    configs = [its for its in classes if issubclass(its, peft.PeftConfig)]
    return not configs or peft.LoraConfig in configs


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    before, started = _made, time.perf_counter()
    values = getattr(getattr(item, "callspec", None), "params", {}).values()
    _found.clear()
    # The groups of a convolution must divide the rank of every level.
    _found["grouped"] = any(isinstance(its, str) and "Groups" in its for its in values)
    _write({"test": item.nodeid, "started": True})
    result = yield
    # A test that is parametrised by the config, or makes one while it runs, is one of LoRA's.
    del _found["grouped"]
    given = any(its is peft.LoraConfig or type(its) is peft.LoraConfig for its in values)
    _write(
        {
            "test": item.nodeid,
            "uses": given or _made > before,
            "seconds": round(time.perf_counter() - started, 2),
            **_found,
        }
    )
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.failed:
        error = call.excinfo.value if call.excinfo else None
        kind = "refused" if _refusal(error) else "failed"
        message = f"{type(error).__name__}: {_refusal(error) or error}"
        _found.update(outcome=kind, why=" ".join(message.split())[:600])
    elif report.skipped and "outcome" not in _found:
        expected = hasattr(report, "wasxfail")
        reason = report.wasxfail if expected else report.longrepr[2]  # pyright: ignore
        _found.update(outcome="skipped", why=str(reason)[:200])
    elif report.when == "call":
        _found.setdefault("outcome", "passed")
    return report


def _refusal(error: BaseException | None) -> MSPLoraError | None:
    """The error of ours that a test stumbled over, if it was one."""
    return error if isinstance(error, MSPLoraError) else None


def _write(line: dict[str, Any]) -> None:
    with RECORD.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
