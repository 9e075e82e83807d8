"""The page of a model that gives several labels a picture."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from scripts.serve.running import Running
from tests.browser.person import PHONE, ask, choose
from tests.conftest import Shapes

Open = Callable[..., Page]
LABELS = 3


@pytest.fixture(scope="module")
def picture(shapes: Shapes, shapes_server: Running) -> Path:
    """One that gets three labels."""
    pictures = sorted((shapes.folder / "test").glob("*.png"))
    found = (
        path for path in pictures if len(ask(shapes_server, path.read_bytes())["labels"]) == LABELS
    )
    return next(found)


@pytest.fixture(scope="module")
def answer(picture: Path, shapes_server: Running) -> dict[str, Any]:
    return ask(shapes_server, picture.read_bytes(), topk="6")


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [row["label"] for row in rows]


def test_all_labels_that_pass_are_named_and_marked(
    open_page: Open, shapes_server: Running, picture: Path, answer: dict[str, Any]
) -> None:
    page = open_page(shapes_server.predictions_url)
    expect(page.locator(".lead")).to_contain_text("shapes names all that it sees in it, out of")
    choose(page, picture)
    expect(page.locator(".toggle")).to_have_text(", ".join(names(answer["labels"])))
    expect(page.locator(".sure")).to_have_text("3 labels")
    passing = [f"✓ {name}" for name in names(answer["labels"])]
    expect(page.locator(".guess.passes .name")).to_have_text(passing)
    # However few guesses are wanted, no label is left out.
    page.select_option("#topk", "1")
    expect(page.locator(".guess.passes .name")).to_have_text(passing)
    below = [row for row in answer["predictions"] if row not in answer["labels"]]
    page.select_option("#topk", "10")
    expect(page.locator(".guess.below .name")).to_have_text(names(below))


def test_a_threshold_for_all_classes_takes_the_place_of_their_own_and_gives_it_back(
    open_page: Open, shapes_server: Running, picture: Path, answer: dict[str, Any]
) -> None:
    page = open_page(shapes_server.predictions_url)
    own = page.locator("#own")
    expect(own).to_be_checked()
    expect(page.locator("#threshold-shown")).to_have_text("as set")
    choose(page, picture)
    expect(page.locator(".sure")).to_have_text("3 labels")
    page.locator(".copy").click()
    expect(page.locator(".curl pre")).not_to_contain_text("threshold")
    for threshold, rows in ((0, answer["predictions"]), (1, [])):
        page.locator("#threshold").fill(str(threshold))
        expect(own).not_to_be_checked()
        expect(page.locator(".toggle")).to_have_text(", ".join(names(rows)) or "Not recognised")
        expect(page.locator(".curl pre")).to_contain_text(f"-F threshold={threshold} ")
    expect(page.locator(".unsure")).to_have_text(
        "The model is less than 100.0 % sure of every class."
    )
    own.check()
    expect(page.locator(".toggle")).to_have_text(", ".join(names(answer["labels"])))


def test_each_label_has_a_map(
    open_page: Open, shapes_server: Running, picture: Path, answer: dict[str, Any]
) -> None:
    page = open_page(shapes_server.predictions_url)
    choose(page, picture)
    for number, name in enumerate(names(answer["labels"])):
        page.locator(".guess.passes").nth(number).click()
        expect(page.locator(".why")).to_contain_text(f"“{name}”")
        expect(page.locator(".seen")).to_be_visible()


def test_saved_results_have_all_labels(
    open_page: Open, shapes_server: Running, picture: Path, answer: dict[str, Any]
) -> None:
    page = open_page(shapes_server.predictions_url)
    choose(page, picture, picture)
    expect(page.locator(".sure:not(:empty)")).to_have_count(2)
    with page.expect_download() as download:
        page.locator("#save-csv").click()
    text = Path(download.value.path()).read_text("utf-8-sig")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [json.loads(row["labels"]) for row in rows] == [names(answer["labels"])] * 2
    assert {row["label"] for row in rows} == {answer["class_name"]}
    with page.expect_download() as download:
        page.locator("#save-json").click()
    saved = json.loads(Path(download.value.path()).read_text())
    assert [row["labels"] for row in saved] == [answer["labels"]] * 2


@pytest.mark.parametrize("options", [{"color_scheme": "dark"}, PHONE], ids=["dark", "phone"])
def test_axe_finds_nothing(
    open_page: Open, shapes_server: Running, picture: Path, options: dict[str, Any]
) -> None:
    page = open_page(shapes_server.predictions_url, bypass_csp=True, **options)
    choose(page, picture)
    expect(page.locator(".sure")).to_have_text("3 labels")
    page.locator(".guess.passes").first.click()
    expect(page.locator(".seen")).to_be_visible()
    results = Axe().run(page)
    assert results.violations_count == 0, results.generate_report()
    row = page.locator("#own-thresholds").bounding_box()
    assert row is not None
    assert row["height"] >= 44
    width = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert width <= 0
