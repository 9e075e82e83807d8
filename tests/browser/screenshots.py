"""Takes the documentation's screenshots of the web UI, with the server of `make run`.

`.venv/bin/python -m tests.browser.screenshots` runs it; the labels are efficientnet_lite0's.
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
from tests.browser.person import PHONE, answered, choose, copy_of, payload
from tests.pictures import encode

_DOCS = Path("docs/images")
_DESKTOP = {"viewport": {"width": 1280, "height": 800}}
# Those that may be shown anywhere; the others are of ImageNet.
_MANY = [known.path for known in KNOWN if "imagenet" not in known.path.name]


def main() -> None:
    """Writes docs/images/page-light.png, page-dark.png and page-phone.png."""
    url = require_running().serving(PACKAGED_ARCHITECTURE).predictions_url
    with sync_playwright() as playwright:
        browser = launch(playwright.chromium)
        assert browser is not None, "no Chromium"
        light = opened(browser, url, **_DESKTOP)
        heat_map(light)
        taken(light, "page-light")
        dark = opened(browser, url, **_DESKTOP, color_scheme="dark")
        choose(dark, *map(copy_of, _MANY), *map(_mirrored, _MANY))
        expect(answered(dark)).to_have_count(2 * len(_MANY))
        dark.get_by_label("Order").select_option("Grouped by class")
        taken(dark, "page-dark")
        phone = opened(browser, url, **PHONE, color_scheme="dark")
        heat_map(phone)
        phone.locator(".result").first.evaluate("result => result.scrollIntoView()")
        phone.evaluate("window.scrollBy(0, -12)")
        taken(phone, "page-phone")
        browser.close()


def opened(browser: Browser, url: str, **options: object) -> Page:
    """Return the web UI in a window of its own."""
    page = browser.new_context(**options).new_page()  # type: ignore[arg-type]
    page.goto(url)
    return page


def heat_map(page: Page) -> None:
    """Classify the cat and show where its best class shows."""
    choose(page, copy_of(CAT))
    expect(answered(page)).to_have_count(1)
    page.locator(".guess:visible").first.click()
    expect(page.locator(".seen canvas:visible")).to_have_count(1)


def _mirrored(path: Path) -> FilePayload:
    with Image.open(path) as image:
        return payload(f"{path.stem}-mirrored.png", encode(ImageOps.mirror(image)))


def taken(page: Page, name: str) -> None:
    """Write what is on the screen."""
    page.mouse.move(0, 0)
    page.screenshot(path=_DOCS / f"{name}.png", animations="disabled")
    step(f"Wrote {_DOCS / name}.png")


if __name__ == "__main__":
    command(main)
