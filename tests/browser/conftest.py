"""Fixtures: Chromium, and pages whose console messages are checked."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import (
    Browser,
    BrowserType,
    ConsoleMessage,
    Page,
    Route,
    expect,
    sync_playwright,
)

from scripts.serve.running import ServerState

# Milliseconds; the default of 5 s is too short while other tests run.
expect.set_options(timeout=30_000)

# Debian's name first.
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

_ARGUMENTS = (
    "--disable-gpu",
    # Only the page itself may use the network.
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # A fake webcam with a moving pattern.
    "--use-fake-device-for-media-stream",
)


class Console:
    """Console errors and warnings of a page, and its uncaught exceptions."""

    def __init__(self) -> None:
        self._problems: list[str] = []
        # Whether each allowed message is required.
        self._expected: dict[str, bool] = {}

    def watch(self, page: Page) -> None:
        page.on("pageerror", lambda error: self._problems.append(str(error)))
        page.on("console", self._note)

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self._problems.append(message.text)

    def expect(self, text: str, *, optional: bool = False) -> None:
        """Allow a message, and require it unless optional; Chromium logs each error response."""
        self._expected[text] = not optional

    def check(self) -> None:
        assert [p for p in self._problems if not any(e in p for e in self._expected)] == []
        required = [text for text, needed in self._expected.items() if needed]
        assert [e for e in required if not any(e in p for p in self._problems)] == []


# Not session-scoped: while Playwright runs, no other event loop can run in this thread.
@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = launch(playwright.chromium)
        if chromium is None:
            pytest.skip(
                "NOT RUN: no Chromium (on Debian: apt install chromium; without root: "
                ".venv/bin/python -m playwright install chromium)"
            )
        yield chromium
        chromium.close()


def launch(kind: BrowserType) -> Browser | None:
    """Start a headless Chromium; return None if none is installed."""
    path = _chromium(kind)
    if path is None:
        return None
    # Chromium's sandbox does not work for root.
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    return kind.launch(executable_path=path, args=[*_ARGUMENTS, *root])


def _chromium(kind: BrowserType) -> str | None:
    if Path(kind.executable_path).exists():
        return kind.executable_path
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


@pytest.fixture
def console() -> Console:
    return Console()


@pytest.fixture
def open_page(browser: Browser, console: Console) -> Iterator[Callable[..., Page]]:
    """Open a URL in a new browser context, with options of `Browser.new_context`.

    `route` handles all requests of the context.
    """
    contexts = []

    def open_url(url: str, route: Callable[[Route], None] | None = None, **options: Any) -> Page:
        context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], **options)
        contexts.append(context)
        if route:
            context.route("**/*", route)
        page = context.new_page()
        console.watch(page)
        page.goto(url)
        return page

    yield open_url
    for context in contexts:
        context.close()
    console.check()


@pytest.fixture
def page(open_page: Callable[..., Page], running: ServerState) -> Page:
    """The web UI, served by TorchServe."""
    return open_page(running.predictions_url)
