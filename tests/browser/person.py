"""What a person does with the page, and what the server says without one."""

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
# As high and wide enough to hit with a finger: Apple's guidelines, and WCAG 2.5.5.
FINGER = 44
NOTES = b"These are notes. " * 30


def ask(running: ServerState, content: bytes = CAT_BYTES, **fields: str) -> dict[str, Any]:
    """Return what the server answers without a browser."""
    return _post(running.predictions_url, content, fields)


def explain(running: ServerState, **fields: str) -> dict[str, Any]:
    """Return the numbers of the cat's heat map."""
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
    """As with the button for it."""
    page.set_input_files("#choose", list(files))  # type: ignore[arg-type]


def payload(name: str, content: bytes = CAT_BYTES, kind: str = "image/png") -> FilePayload:
    """A file that is on no disk."""
    return {"name": name, "mimeType": kind, "buffer": content}


def copy_of(path: Path) -> FilePayload:
    """The same picture in memory; the driver mixes no files of both kinds."""
    return payload(path.name, path.read_bytes())


def answered(page: Page) -> Locator:
    """The answered pictures' certainties."""
    return page.locator(".sure:not(:empty)")


def hold(page: Page) -> list[Route]:
    """Keep all requests for predictions from going on by themselves; return them as they come."""
    held: list[Route] = []
    page.route("**/predictions/**", lambda route: held.append(route))  # noqa: PLW0108
    return held


def save(page: Page, button: str, folder: Path) -> Path:
    """Return the file that this button downloads."""
    with page.expect_download() as download:
        page.get_by_role("button", name=button).click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def in_words(label: str) -> str:
    """As the page writes a class name."""
    return label.replace("_", " ")


def percent(probability: float) -> str:
    """As the page writes it: no more digits than mean something."""
    if 0 < probability < 0.01:
        return "<1%"
    return ">99%" if 0.99 < probability < 1 else f"{probability:.0%}"


def expect_the_cats_answer(page: Page, running: ServerState) -> None:
    """Of the picture that is open."""
    predictions = ask(running)["predictions"]
    opened = page.locator(".result.open")
    expect(opened.locator(".toggle")).to_have_text(in_words(predictions[0]["label"]))
    names = [in_words(row["label"]) for row in predictions]
    expect(opened.locator(".guess .name")).to_have_text(names)
    percentages = [percent(row["probability"]) for row in predictions]
    expect(opened.locator(".guess .percent")).to_have_text(percentages)
    expect(opened.locator(".sure")).to_have_text(percentages[0])


def everything(page: Page) -> None:
    """Each state that a picture can be in, on one page."""
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
