"""Accessibility: colors, phones, motion, screen readers, and pages without JavaScript."""

import re
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from benchmarks.known import PHOTOGRAPHS
from scripts.samples import CAT
from scripts.serve.running import ServerState
from tests.browser.conftest import Console
from tests.browser.person import (
    MIN_TARGET,
    PHONE,
    answered,
    choose,
    hold_requests,
    show_every_state,
)

Open = Callable[..., Page]

# Of a graphic and the adjacent color: WCAG 1.4.11.
MIN_CONTRAST = 3


def background(element: Locator) -> str:
    color: str = element.evaluate("element => getComputedStyle(element).backgroundColor")
    return color


def luminance(color: str) -> float:
    """Return WCAG's relative luminance, 0 to 1, of `rgb(...)`."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_colors_follow_the_system_scheme_and_bars_have_enough_contrast(page: Page) -> None:
    choose(page, CAT)
    expect(answered(page)).to_have_count(1)
    bar, track = page.locator(".guess .bar").first, page.locator(".guess .track").first
    for scheme, forced in product(("light", "dark"), ("none", "active")):
        media: dict[str, Any] = {"color_scheme": scheme, "forced_colors": forced}
        page.emulate_media(**media)
        brightness = luminance(background(page.locator("body")))
        assert brightness > 0.8 if scheme == "light" else brightness < 0.05
        assert contrast(background(bar), background(track)) >= MIN_CONTRAST, (scheme, forced)


def test_content_fits_a_phone_and_touch_targets_are_large_enough(
    open_page: Open, running: ServerState, console: Console
) -> None:
    page = open_page(running.predictions_url, **PHONE)
    expect(page.locator(".choice.touch")).to_be_visible()
    show_every_state(page)
    console.expect("status of 400")
    targets = page.locator(
        "button:visible:not(.toggle), a.button:visible, .choice:visible, select:visible, "
        "summary:visible, input[type=range]:visible, input[type=search], .head:visible"
    )
    assert targets.count() > 20
    for width in (280, 390):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("() => document.documentElement.scrollWidth") == width
        for element in targets.all():
            box = element.bounding_box()
            assert box is not None
            text = element.evaluate("element => element.outerHTML.slice(0, 80)")
            assert min(box["width"], box["height"]) >= MIN_TARGET, (text, box)
            assert box["x"] + box["width"] <= width, (text, box)


def test_a_new_result_scrolls_into_view_on_a_phone(open_page: Open, running: ServerState) -> None:
    page = open_page(running.predictions_url, **PHONE)
    drop = page.locator(".drop").bounding_box()
    choose(page, CAT)
    expect(answered(page)).to_have_count(1)
    for part in (page.locator(".toggle"), page.locator(".caution"), *page.locator(".guess").all()):
        expect(part).to_be_in_viewport(ratio=1)
    assert drop is not None
    box = page.locator(".drop").evaluate(
        "drop => [drop.offsetTop, drop.offsetHeight, drop.offsetWidth]"
    )
    assert box == pytest.approx([drop["y"], drop["height"], drop["width"]], abs=1)
    # The bar with the buttons for the next image covers no prediction.
    bar, last = (page.locator(part).bounding_box() for part in ("#next", ".guess >> nth=-1"))
    assert bar is not None
    assert last is not None
    assert last["y"] + last["height"] <= bar["y"]
    for name, several in (("Choose images", True), ("Take a photo", False)):
        with page.expect_file_chooser() as chooser:
            page.locator("#next").get_by_role("button", name=name).click()
        assert chooser.value.is_multiple() == several
    page.evaluate("() => scrollTo(0, 0)")
    expect(page.locator("#next")).not_to_be_visible()


def test_scrolling_respects_reduced_motion(open_page: Open, running: ServerState) -> None:
    page = open_page(running.predictions_url, **PHONE)
    page.evaluate(
        """() => {
            window.scrolls = new Set();
            Element.prototype.scrollIntoView = options => window.scrolls.add(options.behavior);
        }"""
    )
    page.emulate_media(reduced_motion="reduce")
    choose(page, CAT)
    expect(answered(page)).to_have_count(1)
    page.emulate_media(reduced_motion="no-preference")
    choose(page, CAT)
    expect(answered(page)).to_have_count(2)
    assert page.evaluate("() => [...window.scrolls]") == ["auto", "smooth"]


def test_scrolling_away_cancels_the_auto_scroll(open_page: Open, running: ServerState) -> None:
    page = open_page(running.predictions_url, **PHONE)
    held = hold_requests(page)
    choose(page, CAT)
    while not held:
        page.wait_for_timeout(20)
    page.mouse.wheel(0, -2000)
    page.wait_for_timeout(500)
    page.evaluate("() => scrollTo(0, 0)")
    held[0].continue_()
    expect(answered(page)).to_have_count(1)
    page.wait_for_timeout(300)
    assert page.evaluate("() => scrollY") == 0


def test_screen_readers_get_one_announcement_for_all_images(page: Page) -> None:
    page.evaluate(
        """() => {
            window.announced = [];
            const observer = new MutationObserver(changes => {
                for (const { target } of changes) {
                    const element = target.closest ? target : target.parentElement;
                    const live = element.closest("[role=status], [role=alert], [aria-live]");
                    if (live?.textContent) window.announced.push(live.textContent);
                }
            });
            const all = { subtree: true, childList: true, characterData: true };
            observer.observe(document.body, all);
        }"""
    )
    choose(page, *PHOTOGRAPHS[:6])
    expect(answered(page)).to_have_count(6)
    page.wait_for_timeout(200)
    assert page.evaluate("() => window.announced") == ["6 images are done. 6 answered."]
    choose(page, CAT)
    expect(answered(page)).to_have_count(7)
    page.locator("#threshold").fill("0.4")
    announced = page.evaluate("() => window.announced")[1:]
    assert len(announced) == 1
    assert re.fullmatch(r"chelsea\.png: .+, \d+%", announced[0])


def test_without_javascript_only_a_notice_is_shown(open_page: Open, running: ServerState) -> None:
    page = open_page(running.predictions_url, java_script_enabled=False)
    assert page.locator("main").inner_text().startswith("This page needs JavaScript")
    for part in (".drop", ".samples", ".controls", ".more", ".empty"):
        expect(page.locator(part)).not_to_be_visible()


def test_untrained_weights_are_reported_before_the_first_result_and_on_each(page: Page) -> None:
    expect(page.get_by_role("note")).to_contain_text("Untrained random weights")
    expect(page.get_by_role("note")).to_be_in_viewport(ratio=1)
    choose(page, *PHOTOGRAPHS[:3])
    expect(page.locator(".caution:visible")).to_have_text(["Untrained random weights"] * 3)
