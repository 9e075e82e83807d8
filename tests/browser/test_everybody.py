"""For everybody: any eyes, fingers, screen, settings; and as little to fear as can be."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Locator, Page, Route, expect

from benchmarks.known import PHOTOGRAPHS
from scripts.samples import CAT
from scripts.serve.running import HOST, Running
from tests.browser.conftest import Console
from tests.browser.person import PHONE, answered, choose, everything

Open = Callable[..., Page]

# As tall as wide enough to hit with a finger: Apple's guidelines, and WCAG 2.5.5.
FINGER = 44

# What a picture's parts and a control's outline need beside what is next to them: WCAG 1.4.11.
CONTRAST = 3


@pytest.mark.parametrize(
    "options",
    [{"color_scheme": "light"}, {"color_scheme": "dark"}, PHONE],
    ids=["light", "dark", "phone"],
)
def test_axe_finds_nothing(
    open_page: Open, running: Running, console: Console, options: dict[str, Any]
) -> None:
    # axe works with means that the page's policy rightly denies.
    page = open_page(running.predictions_url, bypass_csp=True, **options)
    for state in ("empty", "full"):
        if state == "full":
            everything(page)
            console.expect("status of 400")
        results = Axe().run(page)
        assert results.violations_count == 0, (state, results.generate_report())
        # It looked: colours and names are what it is for.
        passed = {rule["id"] for rule in results.response["passes"]}
        assert {"color-contrast", "label", "button-name", "image-alt"} <= passed or state == "empty"


def background(element: Locator) -> str:
    colour: str = element.evaluate("element => getComputedStyle(element).backgroundColor")
    return colour


def luminance(colour: str) -> float:
    """Of `rgb(...)`, as WCAG has it, 0 to 1."""
    shares = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_light_and_dark_follow_the_system(open_page: Open, running: Running) -> None:
    light, dark = (
        luminance(
            background(open_page(running.predictions_url, color_scheme=scheme).locator("body"))
        )
        for scheme in ("light", "dark")
    )
    assert light > 0.8
    assert dark < 0.05


@pytest.mark.parametrize(
    "options",
    [
        {"color_scheme": "light"},
        {"color_scheme": "dark"},
        {"color_scheme": "light", "forced_colors": "active"},
        {"color_scheme": "dark", "forced_colors": "active"},
    ],
    ids=["light", "dark", "forced light", "forced dark"],
)
def test_bars_can_be_told_from_what_is_behind_them(
    open_page: Open, running: Running, options: dict[str, Any]
) -> None:
    page = open_page(running.predictions_url, **options)
    choose(page, CAT)
    expect(answered(page)).to_have_count(1)
    bar, track = page.locator(".guess .bar").first, page.locator(".guess .track").first
    assert contrast(background(bar), background(track)) >= CONTRAST


@pytest.mark.parametrize("width", [280, 320, 360, 390])
def test_nothing_is_wider_than_a_phone(
    open_page: Open, running: Running, console: Console, width: int
) -> None:
    phone = {**PHONE, "viewport": {"width": width, "height": 844}}
    page = open_page(running.predictions_url, **phone)
    expect(page.get_by_text("Take a photo")).to_be_visible()
    assert page.evaluate("() => document.documentElement.scrollWidth") == width
    everything(page)
    console.expect("status of 400")
    assert page.evaluate("() => document.documentElement.scrollWidth") == width
    buttons = [e.bounding_box() for e in page.locator("button:visible, select, summary").all()]
    assert all(box is not None and box["x"] + box["width"] <= width for box in buttons)


def test_whatever_can_be_pressed_is_large_enough_for_a_finger(
    open_page: Open, running: Running, console: Console
) -> None:
    page = open_page(running.predictions_url, **PHONE)
    everything(page)
    console.expect("status of 400")
    pressed = page.locator(
        "button:visible:not(.toggle), a.button:visible, .choice:visible, select, summary, "
        "input[type=range]:visible, input[type=search], .head:visible"
    )
    assert pressed.count() > 20
    for element in pressed.all():
        box = element.bounding_box()
        assert box is not None
        text = element.evaluate("element => element.outerHTML.slice(0, 80)")
        assert (box["width"] >= FINGER, box["height"] >= FINGER) == (True, True), (text, box)


def test_on_a_phone_the_answer_comes_to_where_one_looks(open_page: Open, running: Running) -> None:
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


@pytest.mark.parametrize(("wish", "behavior"), [("reduce", "auto"), ("no-preference", "smooth")])
def test_the_way_there_respects_who_wants_no_motion(
    open_page: Open, running: Running, wish: str, behavior: str
) -> None:
    page = open_page(running.predictions_url, reduced_motion=wish, **PHONE)
    page.evaluate(
        """() => {
            window.scrolls = [];
            Element.prototype.scrollIntoView = options => window.scrolls.push(options.behavior);
        }"""
    )
    choose(page, CAT)
    expect(answered(page)).to_have_count(1)
    assert set(page.evaluate("() => window.scrolls")) == {behavior}


def test_who_scrolls_away_is_left_alone(open_page: Open, running: Running) -> None:
    page = open_page(running.predictions_url, **PHONE)
    held: list[Route] = []
    page.route("**/predictions/**", lambda route: held.append(route))  # noqa: PLW0108
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


def test_a_screen_reader_is_told_once_for_all(page: Page) -> None:
    page.evaluate(
        """() => {
            window.said = [];
            const observer = new MutationObserver(changes => {
                for (const { target } of changes) {
                    const element = target.closest ? target : target.parentElement;
                    const live = element.closest("[role=status], [role=alert], [aria-live]");
                    if (live?.textContent) window.said.push(live.textContent);
                }
            });
            const all = { subtree: true, childList: true, characterData: true };
            observer.observe(document.body, all);
        }"""
    )
    choose(page, *PHOTOGRAPHS[:6])
    expect(answered(page)).to_have_count(6)
    page.wait_for_timeout(200)
    assert page.evaluate("() => window.said") == ["6 pictures are done. 6 answered."]
    choose(page, CAT)
    expect(answered(page)).to_have_count(7)
    page.locator("#threshold").fill("0.4")
    said = page.evaluate("() => window.said")[1:]
    assert len(said) == 1
    assert re.fullmatch(r"chelsea\.png: .+, \d+\.\d %", said[0])


def test_without_javascript_the_notice_comes_first_and_nothing_else_pretends_to_work(
    open_page: Open, running: Running
) -> None:
    page = open_page(running.predictions_url, java_script_enabled=False)
    assert page.locator("main").inner_text().startswith("This page needs JavaScript")
    for part in (".drop", ".samples", ".controls", ".more", ".empty"):
        expect(page.locator(part)).not_to_be_visible()


def test_untrained_weights_are_told_before_the_first_answer_and_on_each(page: Page) -> None:
    expect(page.get_by_role("note")).to_contain_text("Untrained random weights")
    expect(page.get_by_role("note")).to_be_in_viewport(ratio=1)
    choose(page, *PHOTOGRAPHS[:3])
    expect(page.locator(".caution:visible")).to_have_text(["Untrained random weights"] * 3)


def test_the_page_talks_to_its_own_server_only(page: Page, running: Running) -> None:
    hosts = set()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    page.reload()
    everything_but_errors = itertools.islice(PHOTOGRAPHS, 2)
    choose(page, *everything_but_errors)
    expect(answered(page)).to_have_count(2)
    page.locator(".toggle").first.click()
    page.locator(".guess:visible").first.click()
    expect(page.locator(".seen").first).to_be_visible()
    # A picture's own address is blob:http://..., from the browser's memory, a sample's data:.
    assert {host for host in hosts if host} == {f"{HOST}:{running.ports.inference}"}
