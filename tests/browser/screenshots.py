"""Take the documentation's screenshots of the web UI, with the server of `make run`.

Run `.venv/bin/python -m tests.browser.screenshots`; the model is efficientnet_lite0.
"""

from pathlib import Path

from PIL import Image, ImageOps
from playwright.sync_api import Browser, FilePayload, Page, expect, sync_playwright

from benchmarks.known import KNOWN
from scripts.samples import CAT
from scripts.serve.running import require_running
from scripts.store import PACKAGED_ARCHITECTURE
from scripts.terminal import command, step
from tests.browser.conftest import launch
from tests.browser.person import PHONE, answered, choose, payload, payload_of
from tests.images import encode

_DOCS = Path("docs/images")
_DESKTOP = {"viewport": {"width": 1280, "height": 800}}
# ImageNet's images must not be published.
_MANY = [known.path for known in KNOWN if "imagenet" not in known.path.name]


def main() -> None:
    """Write docs/images/page-light.png, page-dark.png and page-phone.png."""
    url = require_running().serving(PACKAGED_ARCHITECTURE).predictions_url
    with sync_playwright() as playwright:
        browser = launch(playwright.chromium)
        assert browser is not None, "no Chromium"
        light = open_page(browser, url, **_DESKTOP)
        show_heat_map(light)
        take_screenshot(light, "page-light")
        dark = open_page(browser, url, **_DESKTOP, color_scheme="dark")
        choose(dark, *map(payload_of, _MANY), *map(_mirrored, _MANY))
        expect(answered(dark)).to_have_count(2 * len(_MANY))
        dark.get_by_label("Order").select_option("Grouped by class")
        take_screenshot(dark, "page-dark")
        phone = open_page(browser, url, **PHONE, color_scheme="dark")
        show_heat_map(phone)
        phone.locator(".result").first.evaluate("result => result.scrollIntoView()")
        phone.evaluate("window.scrollBy(0, -12)")
        take_screenshot(phone, "page-phone")
        browser.close()


def open_page(browser: Browser, url: str, **options: object) -> Page:
    """Return the web UI in a new browser context."""
    page = browser.new_context(**options).new_page()  # type: ignore[arg-type]
    page.goto(url)
    return page


def show_heat_map(page: Page) -> None:
    """Classify the cat and show the heat map of its top-1 prediction."""
    choose(page, payload_of(CAT))
    expect(answered(page)).to_have_count(1)
    page.locator(".guess:visible").first.click()
    expect(page.locator(".seen canvas:visible")).to_have_count(1)


def _mirrored(path: Path) -> FilePayload:
    with Image.open(path) as image:
        return payload(f"{path.stem}-mirrored.png", encode(ImageOps.mirror(image)))


def take_screenshot(page: Page, name: str) -> None:
    """Write a screenshot."""
    page.mouse.move(0, 0)
    page.screenshot(path=_DOCS / f"{name}.png", animations="disabled")
    step(f"Wrote {_DOCS / name}.png")


if __name__ == "__main__":
    command(main)
