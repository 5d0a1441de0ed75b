"""A headless browser for pages that must work in one."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest

LAPTOP, PHONE = (1280, 800), (390, 844)
INSTALL = "brew install chromium" if sys.platform == "darwin" else "apt-get install -y --no-install-recommends chromium"


def chromium() -> str:
    """Its path. Where there is none the test is left out with the command that installs it; in CI, which installs it
    first, it fails."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found:
        return found
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no chromium here: {INSTALL}")


@contextmanager
def open_page(path: Path, size: tuple[int, int] = LAPTOP, scheme: Literal["light", "dark"] = "light") -> Iterator:
    """A page in a browser window of that size.

    Yields:
        playwright's page; ``page.errors`` has what its console said, ``page.requests`` what it asked the network for.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion="reduce",
            has_touch=size == PHONE, is_mobile=size == PHONE, device_scale_factor=2 if size == PHONE else 1,
        )  # fmt: skip
        page = context.new_page()
        page.errors, page.requests = [], []
        page.on("console", lambda m: page.errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on(
            "request",
            lambda r: page.requests.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None,
        )
        page.goto(path.resolve().as_uri())
        page.wait_for_function("() => document.documentElement.dataset.drawn === 'yes'")
        yield page
        browser.close()
