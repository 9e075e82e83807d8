"""Several images: concurrent requests, the list of results, and the saved files."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from benchmarks.known import PHOTOGRAPHS
from scripts.serve.running import ServerState
from tests.browser.conftest import Console
from tests.browser.person import (
    NOTES,
    answered,
    choose,
    display_name,
    hold_requests,
    payload,
    payload_of,
    predict,
    save,
)

pytestmark = pytest.mark.slow

TEN = PHOTOGRAPHS[:10]


def names(page: Page) -> list[str]:
    return page.locator(".file").all_text_contents()


def test_each_image_is_one_request_and_four_are_in_flight(page: Page) -> None:
    held = hold_requests(page)
    choose(page, *TEN)
    expect(page.locator(".result")).to_have_count(10)
    for done in range(10):
        expected = min(4, 10 - done)
        while len(held) < expected:
            page.wait_for_timeout(20)
        page.wait_for_timeout(100)
        assert len(held) == expected
        expect(page.locator("#all-progress")).to_have_js_property("value", done)
        held.pop(0).continue_()
        expect(answered(page)).to_have_count(done + 1)
    expect(page.locator("#all-progress")).not_to_be_visible()
    assert names(page) == [path.name for path in TEN]


def test_several_images_are_a_collapsed_list_with_the_newest_first(page: Page) -> None:
    choose(page, TEN[0])
    expect(page.locator(".body:visible")).to_have_count(1)
    choose(page, *TEN[1:4])
    expect(answered(page)).to_have_count(4)
    assert names(page) == [path.name for path in (*TEN[1:4], TEN[0])]
    expect(page.locator("#summary")).to_have_text("4 images. 4 answered.")
    expect(page.locator(".body:visible")).to_have_count(0)
    toggle = page.locator(".toggle").nth(2)
    expect(toggle).to_have_attribute("aria-expanded", "false")
    toggle.click()
    expect(toggle).to_have_attribute("aria-expanded", "true")
    expect(page.locator(".body:visible .guess")).to_have_count(5)
    assert page.locator(".photo img:visible").get_attribute("alt") == TEN[3].name
    toggle.click()
    expect(page.locator(".body:visible")).to_have_count(0)


def test_removed_images_are_not_sent(page: Page) -> None:
    choose(page, *TEN[:3])
    page.get_by_role("button", name=f"Remove {TEN[1].name}").click()
    expect(page.locator("#summary")).to_contain_text("2 images")
    assert names(page) == [TEN[0].name, TEN[2].name]
    expect(answered(page)).to_have_count(2)
    held = hold_requests(page)
    choose(page, *TEN)
    while len(held) < 4:
        page.wait_for_timeout(20)
    page.get_by_role("button", name="Clear all").click()
    expect(page.locator(".result")).to_have_count(0)
    expect(page.locator("#toolbar")).not_to_be_visible()
    page.wait_for_timeout(200)
    assert len(held) == 4
    page.unroute_all(behavior="ignoreErrors")
    choose(page, TEN[0])
    expect(answered(page)).to_have_count(1)


def test_saved_results_match_the_displayed_results(
    page: Page, running: ServerState, console: Console, tmp_path: Path
) -> None:
    formula, notes = '=HYPERLINK("x").png', "notes, mine.txt"
    choose(
        page,
        payload(formula, TEN[0].read_bytes()),
        payload(notes, NOTES, "text/plain"),
        payload_of(TEN[1]),
    )
    page.locator("#threshold").fill("0.05")
    page.get_by_label("Predictions shown").select_option("3")
    expect(answered(page)).to_have_count(2)
    expect(page.locator(".failed")).to_have_count(1)
    console.expect("status of 400")

    def expected(name: str, path: Path) -> dict[str, Any]:
        body = predict(running, path.read_bytes(), topk="3", threshold="0.05")
        best = {key: body["predictions"][0][key] for key in ("label", "class_id", "probability")}
        rest = {key: body[key] for key in ("recognized", "predictions", "warning")}
        return {"picture": name, **best, **rest}

    rows = [
        expected(formula, TEN[0]),
        {"picture": notes, "error": predict(running, NOTES)["message"]},
        expected(TEN[1].name, TEN[1]),
    ]
    assert json.loads(save(page, "Save JSON", tmp_path).read_text("utf-8")) == rows

    with save(page, "Save CSV", tmp_path).open(encoding="utf-8-sig", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["picture"] for row in table] == [f"'{formula}", notes, TEN[1].name]
    assert [row["error"] for row in table] == ["", rows[1]["error"], ""]
    for written, row in zip(table, rows, strict=True):
        assert written["label"] == row.get("label", "")
        assert written["probability"] == str(row.get("probability", ""))
        assert written["recognized"] == str(row.get("recognized", "")).lower()


def test_results_can_be_grouped_and_sorted_and_are_saved_in_that_order(
    page: Page, running: ServerState, tmp_path: Path
) -> None:
    best = {path: predict(running, path.read_bytes())["predictions"][0] for path in TEN}
    by_label = {row["label"]: path for path, row in best.items()}
    # The class with two images is the one with the lowest probability.
    pair, *singles = sorted(by_label.values(), key=lambda path: best[path]["probability"])
    assert singles
    two = [payload("10.png", pair.read_bytes()), payload("9.png", pair.read_bytes())]
    choose(page, *map(payload_of, singles), *two)
    expect(answered(page)).to_have_count(len(singles) + 2)
    sure = {path.name: best[path]["probability"] for path in singles}
    sure |= {"9.png": best[pair]["probability"], "10.png": best[pair]["probability"]}
    page.locator("#threshold").fill("0")
    page.get_by_label("Order").select_option("Grouped by class")
    ones = sorted((display_name(best[path]["label"]) for path in singles), key=str.lower)
    headings = [
        f"{display_name(best[pair]['label'])}2 images",
        *(f"{name}1 image" for name in ones),
    ]
    expect(page.locator(".group")).to_have_text(headings)
    page.get_by_label("Order").select_option("Least sure first")
    expect(page.locator(".group")).to_have_count(0)
    assert [sure[name] for name in names(page)] == sorted(sure[name] for name in names(page))
    page.get_by_label("Order").select_option("File name")
    assert names(page)[:2] == ["9.png", "10.png"]
    saved = json.loads(save(page, "Save JSON", tmp_path).read_text("utf-8"))
    assert [row["picture"] for row in saved] == names(page)
    page.locator("#threshold").fill("1")
    page.get_by_label("Order").select_option("Grouped by class")
    expect(page.locator(".group")).to_have_text([f"Not recognized{len(sure)} images"])


def test_at_most_500_images_are_accepted(page: Page, console: Console) -> None:
    page.route("**/predictions/**", lambda _: None)
    choose(page, *[payload(f"{i}.png", b"x") for i in range(502)])
    expect(page.locator(".result")).to_have_count(500)
    expect(page.locator("#notice")).to_have_text("These are the first 500; 2 more were left out.")
    page.unroute_all(behavior="ignoreErrors")
    console.expect("status of 400", optional=True)
