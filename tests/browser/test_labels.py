"""The web UI of a multi-label model."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from scripts.serve.running import ServerState
from tests.browser.person import MIN_TARGET, PHONE, answered, choose, predict, save

Open = Callable[..., Page]
LABELS = 3


@pytest.fixture(scope="module")
def image(shapes: Path, shapes_server: ServerState) -> Path:
    """An image with three labels."""
    paths = sorted((shapes / "test").glob("*.png"))
    return next(p for p in paths if len(predict(shapes_server, p.read_bytes())["labels"]) == LABELS)


@pytest.fixture(scope="module")
def answer(image: Path, shapes_server: ServerState) -> dict[str, Any]:
    return predict(shapes_server, image.read_bytes(), topk="6")


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [row["label"] for row in rows]


def test_labels_above_their_thresholds_are_marked_and_have_heat_maps(
    open_page: Open, shapes_server: ServerState, image: Path, answer: dict[str, Any]
) -> None:
    page = open_page(shapes_server.predictions_url)
    expect(page.locator(".model").first).to_contain_text("shapes")
    expect(page.locator("#facts")).to_contain_text("6 labels")
    # The model has no class for the sample images.
    expect(page.locator("#samples")).not_to_be_visible()
    choose(page, image)
    labels = names(answer["labels"])
    expect(page.locator(".toggle")).to_have_text(", ".join(labels))
    expect(page.locator(".sure")).to_have_text("3 labels")
    passing = [f"✓ {name}" for name in labels]
    expect(page.locator(".guess.passes .name")).to_have_text(passing)
    for number, name in enumerate(labels):
        page.locator(".guess.passes").nth(number).click()
        expect(page.locator(".why")).to_contain_text(f"“{name}”")
        expect(page.locator(".seen canvas")).to_be_visible()
    # Top-k does not hide labels.
    page.select_option("#topk", "1")
    expect(page.locator(".guess.passes .name")).to_have_text(passing)
    below = [row for row in answer["predictions"] if row not in answer["labels"]]
    page.select_option("#topk", "10")
    expect(page.locator(".guess.below .name")).to_have_text(names(below))


def test_one_threshold_overrides_the_classes_own_until_they_are_restored(
    open_page: Open, shapes_server: ServerState, image: Path, answer: dict[str, Any]
) -> None:
    page = open_page(shapes_server.predictions_url)
    own = page.locator("#own")
    expect(own).to_be_checked()
    expect(page.locator("#threshold-shown")).to_have_text("as set")
    choose(page, image)
    page.locator(".curl summary").click()
    expect(page.locator(".curl pre")).not_to_contain_text("threshold")
    for threshold, rows in ((0, answer["predictions"]), (1, [])):
        page.locator("#threshold").fill(str(threshold))
        expect(own).not_to_be_checked()
        expect(page.locator(".toggle")).to_have_text(", ".join(names(rows)) or "Not recognized")
        expect(page.locator(".curl pre")).to_contain_text(f"-F threshold={threshold} ")
    words = "The model is less than 100% sure of every class."
    expect(page.locator(".unsure")).to_have_text(words)
    own.check()
    expect(page.locator(".toggle")).to_have_text(", ".join(names(answer["labels"])))


def test_saved_results_contain_all_labels(
    open_page: Open, shapes_server: ServerState, image: Path, answer: dict[str, Any], tmp_path: Path
) -> None:
    page = open_page(shapes_server.predictions_url)
    choose(page, image, image)
    expect(answered(page)).to_have_count(2)
    with save(page, "Save CSV", tmp_path).open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [json.loads(row["labels"]) for row in rows] == [names(answer["labels"])] * 2
    assert {row["label"] for row in rows} == {answer["class_name"]}
    saved = json.loads(save(page, "Save JSON", tmp_path).read_text("utf-8"))
    assert [row["labels"] for row in saved] == [answer["labels"]] * 2


def test_the_multi_label_controls_are_accessible_on_a_phone(
    open_page: Open, shapes_server: ServerState, image: Path
) -> None:
    page = open_page(shapes_server.predictions_url, bypass_csp=True, color_scheme="dark", **PHONE)
    choose(page, image)
    page.locator(".guess.passes").first.click()
    expect(page.locator(".seen canvas")).to_be_visible()
    results = Axe().run(page)
    assert results.violations_count == 0, results.generate_report()
    row = page.locator("#own-thresholds").bounding_box()
    assert row is not None
    assert row["height"] >= MIN_TARGET
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
