"""The main promises of the web UI: predictions, explanations and accessibility."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from benchmarks.known import CAT_LABELS, KNOWN
from scripts.samples import CAT
from scripts.serve.running import ServerState
from tests.browser.conftest import Console
from tests.browser.person import (
    NOTES,
    PHONE,
    answered,
    choose,
    display_name,
    expect_cat_predictions,
    explain,
    payload,
    predict,
    show_every_state,
)

Open = Callable[..., Page]


def test_a_chosen_image_is_displayed_with_its_predictions(page: Page, running: ServerState) -> None:
    choose(page, CAT)
    image = page.locator(".photo img")
    expect(image).to_have_attribute("alt", "chelsea.png")
    assert (image.get_attribute("src") or "").startswith("blob:")
    expect_cat_predictions(page, running)
    assert image.evaluate("image => image.naturalWidth") == 451
    expect(page.locator(".about")).to_have_text(
        re.compile(r"^chelsea\.png, 241\u00a0kB, answered\u00a0in\u00a0\d+\.\d\d\u00a0s$")
    )
    widths = page.locator(".guess .bar").evaluate_all("bars => bars.map(bar => bar.style.width)")
    probabilities = [row["probability"] for row in predict(running)["predictions"]]
    assert [float(width.rstrip("%")) / 100 for width in widths] == pytest.approx(
        probabilities, abs=1e-5
    )


def test_known_photographs_are_recognized_without_a_warning(
    open_page: Open, lite0_server: ServerState
) -> None:
    page = open_page(lite0_server.predictions_url)
    expect(page.locator("#warning")).not_to_be_visible()
    page.get_by_role("button", name="cat").click()
    expect(answered(page)).to_have_count(1)
    assert page.locator(".guess .name").first.inner_text() in map(display_name, CAT_LABELS)
    choose(page, *(known.path for known in KNOWN))
    expect(answered(page)).to_have_count(len(KNOWN) + 1)
    for known in KNOWN:
        row = page.locator(".result").filter(has_text=known.path.name)
        label = row.locator(".toggle").inner_text()
        assert label in map(display_name, known.labels), known.path.name
    expect(page.locator(".caution:visible")).to_have_count(0)


def test_a_file_that_is_not_an_image_shows_the_servers_error_message(
    page: Page, running: ServerState, console: Console
) -> None:
    choose(page, payload("notes.txt", NOTES, "text/plain"))
    expect(page.locator(".message")).to_have_text(predict(running, NOTES)["message"])
    expect(page.locator(".again")).not_to_be_visible()
    console.expect("status of 400")


def test_threshold_and_top_k_change_the_displayed_predictions(
    page: Page, running: ServerState
) -> None:
    expect(page.locator("#threshold")).to_have_value("0.1")
    expect(page.locator("#threshold-shown")).to_have_text("10% sure")
    choose(page, CAT)
    expect_cat_predictions(page, running)
    for threshold in ("0.99", "0.13", "0.12", "0"):
        page.locator("#threshold").fill(threshold)
        body = predict(running, threshold=threshold)
        words = display_name(body["class_name"]) if body["recognized"] else "Not recognized"
        expect(page.locator(".toggle")).to_have_text(words)
        expect(page.locator(".unsure")).to_be_visible(visible=not body["recognized"])
    page.get_by_label("Predictions shown").select_option("10")
    names = [display_name(row["label"]) for row in predict(running, topk="10")["predictions"]]
    expect(page.locator(".guess .name")).to_have_text(names)
    page.get_by_label("Predictions shown").select_option("1")
    expect(page.locator(".guess")).to_have_count(1)


def test_each_prediction_has_a_heat_map_aligned_with_the_image(
    page: Page, running: ServerState, console: Console
) -> None:
    choose(page, CAT)
    expect(page.locator(".guess")).to_have_count(5)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    drawings = set()
    for row in predict(running)["predictions"][:2]:
        prediction = page.get_by_role(
            "button", name=re.compile(f"^{display_name(row['label'])} \\d")
        )
        prediction.click()
        expect(prediction).to_have_attribute("aria-pressed", "true")
        expect(page.locator(".guess[aria-pressed=true]")).to_have_count(1)
        explanation = explain(running, class_index=str(row["class_index"]))
        activation = np.array(explanation["map"])
        expect(page.locator(".why")).to_contain_text(
            _expected_text(display_name(row["label"]), activation.min(), activation.max())
        )
        expect(page.locator(".photo img")).to_have_css("filter", "grayscale(1)")
        photo, seen = (page.locator(name).bounding_box() for name in (".photo", ".seen"))
        assert photo is not None
        assert seen is not None
        scale = photo["width"] / explanation["image"]["width"]
        left, top, right, bottom = (
            explanation["crop"][edge] * scale for edge in ("left", "top", "right", "bottom")
        )
        assert (seen["x"], seen["y"], seen["width"], seen["height"]) == pytest.approx(
            (photo["x"] + left, photo["y"] + top, right - left, bottom - top), abs=0.6
        )
        heat = _drawn_heat(page)
        drawings.add(heat.tobytes())
        relative = (activation - activation.min()) / (activation.max() - activation.min())
        # Near the center of each of the 7x7 cells of 32x32 pixels, which lies between two pixels.
        assert heat[16::32, 16::32] / 255 == pytest.approx(relative, abs=0.05)
    console.expect("willReadFrequently")  # because the test reads the canvas
    assert len(drawings) == len(requests) == 2
    page.locator(".guess").first.click()
    expect(page.locator(".guess").first).to_have_attribute("aria-pressed", "true")
    assert len(requests) == 2


def _expected_text(name: str, least: float, most: float) -> str:
    if most < 0:
        return f"Every part of the image lowers the score of \u201c{name}\u201d, the brighter parts"
    against = "; gray parts lower it" if least < 0 else ""
    more = f"The brighter a part of the image, the more it raises the score of \u201c{name}\u201d"
    return f"{more}{against}."


def _drawn_heat(page: Page) -> np.ndarray:
    """Return the alpha channel of the canvas: uint8 (224, 224)."""
    alpha = page.locator(".seen canvas").evaluate(
        """canvas => {
            const { data } = canvas.getContext("2d").getImageData(0, 0, 224, 224);
            return Array.from(data.filter((_, i) => i % 4 === 3));
        }"""
    )
    return np.array(alpha, np.uint8).reshape(224, 224)


def test_everything_works_with_the_keyboard(page: Page, running: ServerState) -> None:
    # Registered first: the key press is faster than Playwright's wait for the dialog.
    page.on("filechooser", lambda chooser: chooser.set_files(CAT))
    page.keyboard.press("Tab")
    expect(page.locator("#choose")).to_be_focused()
    page.keyboard.press("Enter")
    expect_cat_predictions(page, running)
    second = display_name(predict(running)["predictions"][1]["label"])
    page.get_by_role("button", name=re.compile(f"^{re.escape(second)}")).focus()
    page.keyboard.press("Enter")
    expect(page.locator(".seen canvas")).to_be_visible()
    page.locator(".toggle").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".body")).not_to_be_visible()
    page.get_by_role("button", name="Remove chelsea.png").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".result")).to_have_count(0)
    expect(page.locator("#choose")).to_be_focused()


@pytest.mark.parametrize(
    "options", [{"color_scheme": "dark"}, {"color_scheme": "light", **PHONE}], ids=["dark", "phone"]
)
def test_axe_finds_no_accessibility_violations(
    open_page: Open, running: ServerState, console: Console, options: dict[str, Any]
) -> None:
    # The Content-Security-Policy blocks axe.
    page = open_page(running.predictions_url, bypass_csp=True, **options)
    for state in ("empty", "full"):
        if state == "full":
            show_every_state(page)
            console.expect("status of 400")
        results = Axe().run(page)
        assert results.violations_count == 0, (state, results.generate_report())
        # The most important rules were checked.
        passed = {rule["id"] for rule in results.response["passes"]}
        assert {"color-contrast", "label", "button-name", "image-alt"} <= passed or state == "empty"
