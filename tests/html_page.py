"""Pages that msplora writes, read strictly; and what headless Chromium makes of them."""

from __future__ import annotations

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

_VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """The elements of a page; refuses tags that are not closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for its, attributes in self.elements if its == tag]


def browser(text: str, folder: Path, scheme: int = 1, width: int = 1400) -> Page:
    """The page as Chromium has it after its scripts ran; skips the test where there is none.

    Args:
        text: the page.
        folder: where to put it.
        scheme: 0 is dark, 1 light.
        width: of the window.
    """
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("there is no Chromium")
    (folder / "page.html").write_text(text, encoding="utf-8")
    command = [
        *(found, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
        *(f"--blink-settings=preferredColorScheme={scheme}", f"--window-size={width},900"),
        (folder / "page.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return Page(done.stdout)
