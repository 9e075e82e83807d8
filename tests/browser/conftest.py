"""Fixtures: Chromium, and pages whose console messages are checked."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserType, Page, expect, sync_playwright

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
        self._expected: list[str] = []
        self._optional: list[str] = []

    def watch(self, page: Page) -> None:
        page.on(
            "console",
            lambda message: (
                self._problems.append(message.text)
                if message.type in {"error", "warning"}
                else None
            ),
        )
        page.on("pageerror", lambda error: self._problems.append(str(error)))

    def expect(self, text: str, *, optional: bool = False) -> None:
        """Allow a message, and require it unless optional; Chromium logs each error response."""
        self._expected.append(text)
        if optional:
            self._optional.append(text)

    def check(self) -> None:
        surprises = [p for p in self._problems if not any(e in p for e in self._expected)]
        assert surprises == []
        required = [e for e in self._expected if e not in self._optional]
        missing = [e for e in required if not any(e in p for p in self._problems)]
        assert missing == []


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
    """Open a URL in a new browser context, with options of `Browser.new_context`."""
    contexts = []

    def open_url(url: str, **options: object) -> Page:
        context = browser.new_context(
            permissions=["clipboard-read", "clipboard-write"],
            **options,  # type: ignore[arg-type]
        )
        contexts.append(context)
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
