"""User actions on the web UI, and the responses to expect."""

from pathlib import Path
from typing import Any

import requests
from playwright.sync_api import FilePayload, Locator, Page, Route, expect

from benchmarks.known import PHOTOGRAPHS
from scripts.samples import CAT
from scripts.serve.running import ServerState

TIMEOUT = 60
CAT_BYTES = CAT.read_bytes()
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
# CSS pixels in both directions: Apple's guidelines, and WCAG 2.5.5.
MIN_TARGET = 44
NOTES = b"These are notes. " * 30


def predict(running: ServerState, content: bytes = CAT_BYTES, **fields: str) -> dict[str, Any]:
    """Return the server's response to a request without a browser."""
    return _post(running.predictions_url, content, fields)


def explain(running: ServerState, **fields: str) -> dict[str, Any]:
    """Return the explanation of the cat image."""
    return _post(
        running.predictions_url.replace("/predictions/", "/explanations/"), CAT_BYTES, fields
    )


def _post(url: str, content: bytes, fields: dict[str, str]) -> dict[str, Any]:
    headers = {"Accept": "application/json"}
    answer = requests.post(
        url, files={"file": content}, data=fields, headers=headers, timeout=TIMEOUT
    )
    body: dict[str, Any] = answer.json()
    return body


def choose(page: Page, *files: Path | FilePayload) -> None:
    """Choose files with the file input."""
    page.set_input_files("#choose", list(files))  # type: ignore[arg-type]


def payload(name: str, content: bytes = CAT_BYTES, kind: str = "image/png") -> FilePayload:
    """Return a file in memory."""
    return {"name": name, "mimeType": kind, "buffer": content}


def payload_of(path: Path) -> FilePayload:
    """Return the image in memory; Playwright cannot mix paths and payloads."""
    return payload(path.name, path.read_bytes())


def answered(page: Page) -> Locator:
    """Return the probabilities of all images with a response."""
    return page.locator(".sure:not(:empty)")


def hold_requests(page: Page) -> list[Route]:
    """Hold all prediction requests; return the list to which they are added."""
    held: list[Route] = []
    page.route("**/predictions/**", lambda route: held.append(route))  # noqa: PLW0108
    return held


def save(page: Page, button: str, folder: Path) -> Path:
    """Download the file of this button and return its path."""
    with page.expect_download() as download:
        page.get_by_role("button", name=button).click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def display_name(label: str) -> str:
    """Return a class name as the web UI writes it."""
    return label.replace("_", " ")


def percent(probability: float) -> str:
    """Return a probability as the web UI writes it."""
    if 0 < probability < 0.01:
        return "<1%"
    return ">99%" if 0.99 < probability < 1 else f"{probability:.0%}"


def expect_cat_predictions(page: Page, running: ServerState) -> None:
    """Check the predictions of the open image."""
    predictions = predict(running)["predictions"]
    opened = page.locator(".result.open")
    expect(opened.locator(".toggle")).to_have_text(display_name(predictions[0]["label"]))
    names = [display_name(row["label"]) for row in predictions]
    expect(opened.locator(".guess .name")).to_have_text(names)
    percentages = [percent(row["probability"]) for row in predictions]
    expect(opened.locator(".guess .percent")).to_have_text(percentages)
    expect(opened.locator(".sure")).to_have_text(percentages[0])


def show_every_state(page: Page) -> None:
    """Show a result in each state: failed, collapsed, and open with a heat map."""
    choose(page, payload("notes.txt", NOTES, "text/plain"))
    expect(page.locator(".failed")).to_have_count(1)
    choose(page, PHOTOGRAPHS[5])
    expect(answered(page)).to_have_count(1)
    choose(page, payload("a" * 200 + ".png"))
    expect(answered(page)).to_have_count(2)
    page.locator(".guess:visible").first.click()
    expect(page.locator(".seen canvas:visible")).to_have_count(1)
    for summary in page.locator("summary:visible").all():
        summary.click()
    expect(page.locator(".copy:visible")).to_have_count(4)
