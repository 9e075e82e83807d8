"""A real Chromium, and pages of it whose console is watched."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserType, Page, expect, sync_playwright

from scripts.serve.running import ServerState

# Milliseconds; the usual 5 s are little beside other tests.
expect.set_options(timeout=30_000)

# Debian's name, then those of others.
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

_ARGUMENTS = (
    "--disable-gpu",
    # Nothing but the page is to use the network.
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # A webcam, which shows a moving pattern.
    "--use-fake-device-for-media-stream",
)


class Console:
    """What a page writes to the browser's console, and scripts that fail."""

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
        """Chromium itself writes a line for each answer that is an error; some depend on timing."""
        self._expected.append(text)
        if optional:
            self._optional.append(text)

    def check(self) -> None:
        surprises = [p for p in self._problems if not any(e in p for e in self._expected)]
        assert surprises == []
        required = [e for e in self._expected if e not in self._optional]
        missing = [e for e in required if not any(e in p for p in self._problems)]
        assert missing == []


# Not for the session: while Playwright runs, nobody else can run an event loop in this thread.
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


def _chromium(playwrights_own: BrowserType) -> str | None:
    if Path(playwrights_own.executable_path).exists():
        return playwrights_own.executable_path
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


@pytest.fixture
def console() -> Console:
    return Console()


@pytest.fixture
def open_page(browser: Browser, console: Console) -> Iterator[Callable[..., Page]]:
    """Opens a URL in a browser window of its own, with `Browser.new_context`'s options."""
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
    """The page, as TorchServe itself serves it."""
    return open_page(running.predictions_url)
